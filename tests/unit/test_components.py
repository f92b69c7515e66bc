"""Components are chosen by name: ours, and a class of the user's own that no other file knows."""

import os
import subprocess
import sys

import pytest

from bigtrain.config import differences, load, load_config, to_yaml
from bigtrain.config.show import resolved
from bigtrain.errors import ConfigError
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.sgd import SGD
from bigtrain.training.schedules.cosine import Cosine
from bigtrain.training.schedules.linear import Linear
from tests.support import bigtrain, final_state, numbers, small_config
from tests.unit.test_config import GOOD

S = "stages.pretrain."
OWN = '''
from abc import abstractmethod
from bigtrain.config.core import mathematics
from bigtrain.optim import Optimizer
from bigtrain.training.schedules import Schedule

class SignDescent(Optimizer):
    """Steps of the size lr against the sign of the gradient."""

    scale: float = mathematics("Factor of each step.", 1.0, gt=0)

    def torch_optimizer(self, groups):
        import torch

        class Sign(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self):
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            self.state[p]["last"] = p.grad.clone()
                            p -= group["lr"] * scale * p.grad.sign()

        scale = self.scale
        return Sign(groups, {"lr": self.lr})

    def moments(self, name, shape):
        return ("last",)

class Halves(Schedule):
    def after_warmup(self, step, steps):
        return 0.5**step

class Unfinished(Optimizer):
    def moments(self, name, shape):
        return ()

class Other:
    pass

NOTHING = 3
'''


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that loads GOOD with overrides, in a folder that has a module `mine` with OWN."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "run.yaml").write_text(GOOD)
    yield lambda *overrides: load_config(tmp_path / "run.yaml", overrides)
    sys.modules.pop("mine", None)


def test_a_name_chooses_and_defaults_do(config):
    stage = config().stages[0]
    assert (stage.optimizer, stage.schedule) == (AdamW(lr=3e-4), Cosine())
    stage = config(S + "optimizer={name: sgd, lr: 0.1}", S + "schedule={name: linear, min_ratio: 0}").stages[0]
    assert (stage.optimizer, stage.schedule) == (SGD(lr=0.1), Linear(min_ratio=0.0))


def test_a_name_alone_stands_for_the_component_with_its_defaults(config, tmp_path):
    assert config(S + "schedule=linear").stages[0].schedule == Linear()
    assert config(S + "schedule=linear", S + "schedule.min_ratio=0.5").stages[0].schedule == Linear(min_ratio=0.5)
    (tmp_path / "run.yaml").write_text(GOOD.replace("    steps: 10", "    steps: 10\n    schedule: linear"))
    loaded = load(tmp_path / "run.yaml", [S + "schedule.min_ratio=0.5"])
    assert loaded.run.stages[0].schedule == Linear(min_ratio=0.5)
    told = {key: origin for key, _, origin in resolved(loaded) if key.startswith("stages.pretrain.schedule")}
    assert told["stages.pretrain.schedule.name"].endswith("run.yaml:11")
    assert told["stages.pretrain.schedule.min_ratio"] == "command line"
    assert told["stages.pretrain.schedule.warmup_ratio"] == "default"


def test_the_resolved_file_chooses_the_same(config, tmp_path):
    run = config(S + "optimizer={name: sgd, lr: 0.1}", S + "schedule=mine:Halves")
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("schedule.name=cosin", "schedule.name: there is no schedule cosin; did you mean `cosine`? One of your own is"),
        ("optimizer.name=muon", "optimizer.name: there is no optimizer muon; known here: adamw, sgd. One of your own"),
        ("optimizer.name=3", "optimizer.name: there is no optimizer 3; known here"),
        ("optimizer=sgd", "optimizer.lr: this key is required."),
        ("optimizer=3", "optimizer: expected keys and values below it, got 3."),
        ("schedule={name: constant, min_ratio: 0.1}",
         "schedule.min_ratio: is a key of cosine, linear and warmup_stable_decay; remove it, or choose one of these."),
        ("optimizer={name: sgd, lr: 1, betas: [0.9, 0.9]}",
         "optimizer.betas: is a key of adamw; remove it, or choose that."),
        ("optimizer={name: sgd, lr: 1, momentun: 0.8}", "optimizer.momentun: unknown key; did you mean `momentum`?"),
        ("optimizer={name: sgd, lrr: 1}", "optimizer.lrr: unknown key; did you mean `lr`?"),
        ("optimizer={name: sgd, lr: a}", "optimizer.lr: input should be a valid number, got a."),
        ("optimizer={name: sgd, lr: 1, steps: 3}", "optimizer.steps: unknown key; it belongs below `profile` or "),
        ("optimizer={name: 'mine:SignDescent', lr: 1, scalle: 2}", "optimizer.scalle: unknown key; did you mean `sc"),
        ("optimizer={name: 'mine:SignDescent', lr: 1, scale: 0}", "optimizer.scale: input should be greater than 0"),
        ("optimizer={name: 'mine:Sign', lr: 1}", "optimizer.name: mine:Sign: mine ("),
        ("optimizer={name: 'mine:Sign', lr: 1}", "has no Sign; the nearest is SignDescent."),
        ("optimizer={name: 'mine:Other', lr: 1}", "mine:Other: it is no subclass of bigtrain.optim.Optimizer."),
        ("optimizer={name: 'mine:Halves', lr: 1}", "mine:Halves: it is no subclass of bigtrain.optim.Optimizer."),
        ("optimizer={name: 'mine:NOTHING', lr: 1}", "mine:NOTHING: it is no subclass of bigtrain.optim.Optimizer."),
        ("optimizer={name: 'mine:Unfinished', lr: 1}",
         "mine:Unfinished: it lacks torch_optimizer, which bigtrain.optim.Optimizer asks for."),
        ("optimizer={name: 'yours:Sign', lr: 1}", "yours cannot be imported: No module named 'yours'. It was"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_component_is_told_at_its_key(config, given, told):
    with pytest.raises(ConfigError) as refused:
        config(S + given)
    assert str(refused.value).startswith(f"command line: {S}{given.partition('=')[0].partition('.')[0]}")
    assert told in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_a_changed_component_is_a_difference(config):
    old, new = config(), config(S + "optimizer={name: sgd, lr: 3e-4}", F_SCHEDULE)
    assert differences(old, new, "mathematics") == [
        ("stages.pretrain.optimizer.name", "adamw", "sgd"),
        ("stages.pretrain.optimizer.weight_decay", 0.1, 0.0),
        ("stages.finetune.schedule.warmup_ratio", 0.0, 0.25),
    ]


F_SCHEDULE = "stages.finetune.schedule.warmup_ratio=0.25"


def test_reading_all_components_imports_nothing_heavy():
    code = (
        "import sys; from bigtrain.config.load import _homes; list(_homes('x'));"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_optimizer_and_a_schedule_of_ones_own_touch_no_other_file(tmp_path):
    """Two ranks train two steps, save, and a further step goes on from there."""
    (tmp_path / "mine_too.py").write_text(OWN)
    own = ["stages.pretrain.optimizer={name: 'mine_too:SignDescent', lr: 1e-3, scale: 2.0, ema: 0.9}",
           "stages.pretrain.schedule={name: 'mine_too:Halves'}", "parallel.engine=zero2"]  # fmt: skip
    config = small_config(tmp_path, steps=2)
    done = bigtrain("run", config, *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "small"
    rates = [lr for kind, stage, *_, lr in numbers(folder) if (kind, stage) == ("step", "pretrain")]
    assert rates == [1e-3, 0.5e-3]
    step, state = final_state(folder, "pretrain")
    assert step == 2
    assert {slot for _, slot in state} == {"weight", "last", "ema"}
    (tmp_path / "mine_too.py").rename(tmp_path / "gone.py")
    refused = bigtrain("run", config, *own, cwd=tmp_path)
    assert refused.returncode == 2
    assert "mine_too cannot be imported: No module named 'mine_too'. It was looked for among the" in refused.stderr
    assert f"on PYTHONPATH and in {os.path.realpath(tmp_path)}." in refused.stderr
