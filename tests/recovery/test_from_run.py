"""A run that starts from another run's stage: new sources, lengths and optimizer on its weights."""

import json
import shutil

import pytest
import yaml

from bigtrain import evaluate, run
from bigtrain.checkpoint import complete
from bigtrain.config import load_config
from bigtrain.config.load import load
from bigtrain.config.schema import SourceConfig
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.inference.load import load_model
from bigtrain.launching.dry_run import dry_run
from bigtrain.observability.stream import read_metrics
from bigtrain.pipeline.preflight import try_inputs
from bigtrain.run_folder import RunFolder
from tests import support

FIRST = {"export": False, "held_out": 0.0, "evaluate": None, "checkpoint": {"every": 2, "keep": 9}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(its file, its stage's folder) of a run of four steps."""
    config = support.small_config(tmp_path_factory.mktemp("source"), steps=4)
    values = yaml.safe_load(config.read_text())
    values["name"], values["parallel"]["processes"] = "source", 1
    values["stages"] = [values["stages"][0] | FIRST]
    config.write_text(yaml.safe_dump(values))
    return config, run(config).folder / "pretrain"


def follower(source, **model):
    """The file of a run that starts from `model`, on other text, in sequences of another length."""
    config, stage = source
    values = yaml.safe_load(config.read_text())
    values["name"], values["model"] = "follower", model or {"from_run": str(stage)}
    del values["tokenizer"]
    texts = config.parent / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} and {n} are {2 * n}. " * 9}) + "\n" for n in range(99)))
    changes = {"sequence_length": 64, "global_batch_size": 3, "steps": 3, "checkpoint": {"every": 2}, "export": True}
    evaluation = {"evaluate": {"data": [{"source": str(texts)}]}, "data": [{"source": str(texts)}]}
    values["stages"] = [values["stages"][0] | changes | evaluation | {"name": "more"}]
    path = config.with_name("follower.yaml")
    path.write_text(yaml.safe_dump(values))
    return path, texts


def everything(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "overrides",
    [["parallel.processes=1"], pytest.param(["parallel.engine=zero3", "name=sharded"], marks=pytest.mark.soak)],
)
def test_it_starts_from_the_newest_weights_with_their_tokenizer(source, overrides):
    _, stage = source
    path, texts = follower(source)
    before = everything(stage.parent)
    support.run(path, *overrides)
    assert everything(stage.parent) == before
    folder = RunFolder(load_config(path, overrides).folder)
    first = read_metrics(folder.path)[0]
    expected = evaluate(stage, [SourceConfig(source=str(texts))])
    assert (first["kind"], first["step"], first["targets"]) == ("evaluation", 0, expected.metrics["targets"])
    assert first["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert folder.metadata()["origin"] == {
        "run": str(stage.parent),
        "stage": "pretrain",
        "step": 4,
        "checkpoint": str(stage / "checkpoints" / "step-00000004"),
        "tasks": ["pretrain"],
    }
    assert folder.metadata()["stages"]["more"]["from"] == f"{stage}, step-00000004"
    same = [where / "tokenizer" / "tokenizer.json" for where in (folder.path, stage.parent)]
    assert same[0].read_bytes() == same[1].read_bytes()
    card = (folder.export("more") / "README.md").read_text()
    assert "- first weights: `source, stage pretrain`" in card


def test_it_goes_on_when_the_other_run_is_gone_or_has_gone_on(source, tmp_path):
    _, stage = source
    copy = tmp_path / "source"
    shutil.copytree(stage.parent, copy)
    path, _ = follower(source, from_run=str(copy / "pretrain" / "checkpoints" / "step-00000002"))
    overrides = ["parallel.processes=1", "name=orphan", "stages.more.sequence_length=32"]
    folder = RunFolder(run(path, overrides).folder)
    assert folder.metadata()["origin"]["step"] == 2
    whole = support.numbers(folder.path)
    shutil.rmtree(complete(folder.checkpoints("more"))[-1])
    shutil.rmtree(copy)
    assert support.numbers(run(path, overrides).folder) == whole
    assert load_model(folder.path).what.endswith("stage more, step 3")
    assert folder.metadata()["origin"]["step"] == 2


@pytest.mark.parametrize(
    ("from_run", "told"),
    [
        ("{run}", r"there is no run in .*; name RUN_DIR/STAGE, or one checkpoint of it"),
        ("{run}/pretran", r"has no stage pretran with checkpoints; did you mean `pretrain`\?"),
        ("{run}/pretrain/checkpoints/step-00000003", r"of step 3; it has step-00000002, step-00000004"),
        ("{run}/../unbegun/more", "is this run itself"),
    ],
)
def test_a_missing_one_is_told_before_anything_is_written(source, from_run, told):
    _, stage = source
    path, _ = follower(source, from_run=from_run.format(run=stage.parent))
    with pytest.raises(ConfigError, match=rf"follower\.yaml:\d+: model\.from_run: .*{told}"):
        load(path, ["name=unbegun"], here=True)


def test_a_dry_run_says_where_the_weights_come_from(source, capsys):
    _, stage = source
    path, _ = follower(source)
    dry_run(load(path, ["name=unbegun", "parallel.processes=1"]))
    assert f"{stage / 'checkpoints' / 'step-00000004'}" in capsys.readouterr().out.replace("\n", "")


def test_a_sequence_longer_than_its_positions_is_told(source):
    path, _ = follower(source)
    with pytest.raises(ConfigError, match=r"sequence_length: 256 is longer than max_position_embeddings \(128\)"):
        load(path, ["stages.more.sequence_length=256", "name=unbegun"], here=True)


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_one_is_told_and_left_as_it_is(source, tmp_path, how):
    _, stage = source
    copy = tmp_path / "source"
    shutil.copytree(stage.parent, copy)
    newest = copy / "pretrain" / "checkpoints" / "step-00000004"
    data = (newest / "weights-00000.safetensors").read_bytes()
    (newest / "weights-00000.safetensors").write_bytes(data[:-1] + (b"" if how == "cut" else bytes([data[-1] ^ 1])))
    path, _ = follower(source, from_run=str(copy / "pretrain"))
    before = everything(copy)
    with pytest.raises(CheckpointError) as refused:
        if how == "cut":
            try_inputs(load_config(path))
        else:
            run(path, ["parallel.processes=1", f"name={how}"])
    other = newest.with_name("step-00000002")
    assert f"{newest}/weights-00000.safetensors" in str(refused.value)
    assert f"That run is left as it is; name another one, like model.from_run={other}." in str(refused.value)
    assert everything(copy) == before
    if how == "changed":
        assert run(path, ["parallel.processes=1", f"name={how}", f"model.from_run={other}"]).finished


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.from_pretrained=gpt2", "model: give one of from_config, from_pretrained and from_run; found from_pre"),
        ("tokenizer={from_pretrained: gpt2}", "tokenizer: model.from_run brings that run's tokenizer; remove this key"),
    ],
)
def test_it_is_the_only_origin(source, override, told):
    path, _ = follower(source)
    with pytest.raises(ConfigError, match=told):
        load_config(path, [override])
