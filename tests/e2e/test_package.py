"""bigtrain as a package: the wheel, and the same from Python as from the command line."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import bigtrain
from bigtrain import BigtrainError, RunError, evaluate, generate, load_config, load_model, run
from bigtrain.errors import ConfigError
from bigtrain.observability.stream import read_metrics
from tests import support, tiny
from tests.forked import call
from tests.support import small_config

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from bigtrain import load_config, run
result = run(load_config(sys.argv[1], ["stages.pretrain.steps=3"]))
print(result.folder, result.finished, result.stages["pretrain"].steps, result.stages["pretrain"].loss)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The built wheel, unpacked where nothing of the checkout is."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, cwd=folder)
    [wheel] = folder.glob("bigtrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        names = archive.namelist()
    return folder / "site", names


def test_the_wheel_has_types_licence_and_the_command_and_nothing_else(installed):
    site, names = installed
    assert "bigtrain/py.typed" in names
    templates = {"command.sh", "slurm.sbatch", "kubernetes.yaml"}
    assert {f"bigtrain/launching/templates/{name}.tmpl" for name in templates} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bigtrain"}
    [entry_points] = site.glob("*.dist-info/entry_points.txt")
    assert "bigtrain = bigtrain.cli:main" in entry_points.read_text()


def test_run_from_python_with_the_wheel_alone(installed, tmp_path):
    site, _ = installed
    config = small_config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import bigtrain; print(bigtrain.__file__)"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, config], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert program.returncode == 0, program.stderr
    steps = [r for r in read_metrics(tmp_path / "runs" / "small") if r["kind"] == "step" and r["stage"] == "pretrain"]
    assert len(steps) == 3
    assert program.stdout.splitlines()[-1] == f"{tmp_path / 'runs' / 'small'} True 3 {steps[-1]['loss']}"


def test_wrong_input_raises_config_error(tmp_path):
    with pytest.raises(ConfigError, match="did you mean `steps`"):
        load_config(small_config(tmp_path), ["stages.pretrain.stepz=3"])


def one_stage(folder):
    """A run's file of two steps in this process alone."""
    path = small_config(folder, steps=2)
    config = yaml.safe_load(path.read_text())
    config["stages"] = config["stages"][:1]
    config["stages"][0]["checkpoint"] = {"every": 1}
    config["parallel"]["processes"] = 1
    path.write_text(yaml.safe_dump(config))
    return path


def test_three_lines_compare_three_learning_rates(tmp_path, capfd):
    """In one process, one run after the other, and with processes of their own."""
    call(compare_learning_rates, tmp_path)
    assert "Traceback" not in "".join(capfd.readouterr())


def compare_learning_rates(tmp_path):
    config, results = one_stage(tmp_path), {}
    for lr in (1e-3, 3e-3, 1e-2):
        results[lr] = run(load_config(config, [f"name=lr-{lr}", f"stages.pretrain.optimizer.lr={lr}"]))
    assert [result.folder for result in results.values()] == [tmp_path / "runs" / f"lr-{lr}" for lr in results]
    held_out = {lr: result.stages["pretrain"].held_out_loss for lr, result in results.items()}
    assert held_out[1e-3] > held_out[3e-3] > held_out[1e-2]  # in two steps the largest gets furthest

    two = run(config, ["name=two", "stages.pretrain.optimizer.lr=0.01", "parallel.processes=2"])
    one, other = results[1e-2].stages["pretrain"], two.stages["pretrain"]
    assert two.finished and one.finished
    assert other.loss == pytest.approx(one.loss, abs=1e-6)
    assert other.held_out_loss == pytest.approx(one.held_out_loss, abs=1e-6)
    assert (other.steps, other.metrics["lr"]) == (2, one.metrics["lr"])
    assert one.metrics.keys() == other.metrics.keys() >= {"grad_norm", "targets", "held_out_accuracy"}

    rows = [row for row in read_metrics(two.folder) if row["kind"] == "evaluation"]
    assert (other.held_out_loss, other.metrics["held_out_perplexity"]) == (rows[-1]["loss"], rows[-1]["perplexity"])
    assert run(config, ["name=two", "stages.pretrain.optimizer.lr=0.01"]) == two  # finished: nothing is trained
    assert evaluate(two.folder).loss == pytest.approx(other.held_out_loss, abs=1e-6)
    assert isinstance(generate(load_model(other.export), "def", max_new_tokens=3), str)


@pytest.mark.soak
def test_runs_of_any_engine_follow_each_other(tmp_path):
    """DeepSpeed starts once in a process, and makes it a rank: its runs get processes of their own."""
    config = tiny.config(tmp_path)
    engines = ("zero2", "zero3")
    losses = [run(config, [f"name={e}", f"parallel.engine={e}"]).stages["p"].loss for e in engines]
    assert losses == pytest.approx([losses[0]] * 2, abs=1e-6)


def test_a_run_that_fails_says_so_with_what_it_has_reached(tmp_path, monkeypatch):
    config = load_config(one_stage(tmp_path))
    monkeypatch.setattr("bigtrain.training.reports.Reports._check_finite", diverge)
    with pytest.raises(BigtrainError, match="diverged"):
        run(config)
    for code, told in ((75, "asked to stop, and has saved"), (1, "failed with exit code 1")):
        monkeypatch.setattr("bigtrain.launching.start.start", lambda *_, code=code, **__: code)
        with pytest.raises(RunError, match=told) as error:
            run(config)
        stage = error.value.result.stages["pretrain"]
        assert (error.value.exit_code, stage.steps, stage.finished, stage.export) == (code, 1, False, None)


def diverge(_, step, *__):
    if step == 2:
        raise BigtrainError("diverged")


def test_the_package_shows_its_public_names():
    assert {"load_config", "run", "evaluate", "generate", "export", "RunResult"} <= set(dir(bigtrain))
    assert all(getattr(bigtrain, name) is not None for name in dir(bigtrain))
    assert bigtrain.__version__ == importlib.metadata.version("bigtrain")


def test_the_version(tmp_path):
    told = support.bigtrain("--version", cwd=tmp_path)
    assert (told.returncode, told.stdout, told.stderr) == (0, f"bigtrain {bigtrain.__version__}\n", "")
