"""The command, as a user types it."""

import json
import math
import os

import pytest
import yaml

from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain, small_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two stages: (config, run folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    parallel = {"engine": "zero2", "processes": 2, "micro_batch_size": 2}
    config = small_config(folder, steps=20, every=10, parallel=parallel)
    process = bigtrain("run", config)
    assert process.returncode == 0, process.stderr
    return config, folder / "runs" / "small", process.stdout


def test_the_loss_falls_in_both_stages(finished):
    _, folder, _ = finished
    for stage in ("pretrain", "finetune"):
        losses = [r["loss"] for r in read_metrics(folder) if r["stage"] == stage and r["kind"] == "evaluation"]
        assert len(losses) == 3  # before, in the middle, after
        assert losses[-1] < losses[0] - 0.05
    first = next(r for r in read_metrics(folder) if r["kind"] == "evaluation")
    assert first["loss"] == pytest.approx(math.log(400), rel=0.05)  # of random weights: the vocabulary's entropy


def test_every_step_has_a_row(finished):
    _, folder, _ = finished
    rows = [r for r in read_metrics(folder) if r["kind"] == "step" and r["stage"] == "pretrain"]
    assert [r["step"] for r in rows] == list(range(1, 21))
    for row in rows:
        assert row["tokens"] == 5 * 64
        assert 0 < row["targets"] <= row["tokens"]
        assert row["step_seconds"] > 0
        assert row["memory_bytes"] > 50e6
        assert row["tokens_per_second"] == row["tokens"] / row["step_seconds"]


def test_the_run_folder(finished):
    _, folder, _ = finished
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["stages"][0]["optimizer"]["betas"] == [0.9, 0.95]
    metadata = json.loads((folder / "run.json").read_text())
    assert [attempt["world_size"] for attempt in metadata["attempts"]] == [2]
    assert metadata["stages"]["pretrain"]["from"] == "random weights"
    assert metadata["stages"]["finetune"]["from"] == "pretrain, step-00000020"
    assert metadata["stages"]["finetune"]["data"][0]["documents"] > 10
    kinds = [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.count("checkpoint_saved") == 4
    for stage in ("pretrain", "finetune"):
        saved = sorted(p.name for p in (folder / stage / "checkpoints").iterdir())
        assert saved == ["step-00000010", "step-00000020"]


def test_running_it_again_says_that_it_is_finished(finished):
    config, folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    again = bigtrain("run", config)
    assert again.returncode == 0
    assert f"{folder} is finished: nothing to do." in again.stdout
    assert "held-out   loss" in again.stdout
    assert (folder / "metrics.jsonl").read_text() == before


def test_what_decides_the_mathematics_cannot_change(finished):
    config, _, _ = finished
    refused = bigtrain("run", config, "stages.pretrain.optimizer.lr=1e-2")
    assert refused.returncode == 2
    assert "stages.pretrain.optimizer.lr: 0.003 in the run, 0.01 now" in refused.stderr
    assert "--restart pretrain" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_wrong_key_is_answered_before_anything_is_written(tmp_path):
    config = small_config(tmp_path, precison="bf16")
    refused = bigtrain("run", config)
    assert refused.returncode == 2
    assert "precison: unknown key; did you mean `precision`?" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_the_option_that_the_deepspeed_launcher_adds_is_taken(tmp_path):
    refused = bigtrain("--local_rank=0", "run", small_config(tmp_path), "nam=other")
    assert refused.returncode == 2
    assert "command line: nam: unknown key; did you mean `name`?" in refused.stderr


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(tmp_path, engine):
    config = small_config(tmp_path, steps=6, every=1, trackers=["tensorboard"])
    process = bigtrain("run", config, "stages.pretrain.optimizer.lr=1e30", f"parallel.engine={engine}")
    assert process.returncode == 1
    assert "stage pretrain, step 2: the loss is" in process.stderr
    assert "Traceback" not in process.stderr
    saved = [path.name for path in (tmp_path / "runs" / "small" / "pretrain" / "checkpoints").iterdir()]
    assert saved == ["step-00000001"]
    folder = tmp_path / "runs" / "small"
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    failed = [event["reason"] for event in told if event["kind"] == "failed"]
    assert len(failed) == 1 and failed[0].startswith("stage pretrain, step 2: the loss is")
    [logged] = (folder / "tensorboard").glob("events.*")  # what it has reported before is not lost
    assert b"pretrain/loss" in logged.read_bytes()


def test_flex_attention_is_refused_without_a_gpu(tmp_path):
    refused = bigtrain("run", small_config(tmp_path, attention="flex"), "parallel.processes=1")
    assert refused.returncode == 2
    assert refused.stderr.count("attention: flex needs a GPU") == 1
    assert not (tmp_path / "runs").exists()


def test_a_machine_that_cannot_compile_is_told(tmp_path):
    config = small_config(tmp_path, steps=1)
    variables = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = bigtrain("run", config, "parallel.compile=true", "parallel.processes=1", env=os.environ | variables)
    assert process.returncode == 1
    assert (
        "stage pretrain: torch.compile cannot compile this model here; set parallel.compile: false." in process.stderr
    )
    assert "Traceback" not in process.stderr


def test_fp16_is_refused_without_a_gpu(tmp_path):
    refused = bigtrain("run", small_config(tmp_path, precision="fp16"))
    assert refused.returncode == 2
    assert refused.stderr.count("precision: fp16 needs a GPU") == 1


def test_a_source_that_is_not_there(tmp_path):
    config = small_config(tmp_path)
    refused = bigtrain("run", config, f"stages.pretrain.data.0.source={tmp_path}/nothing.jsonl")
    assert refused.returncode == 2
    assert "nothing.jsonl" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no documents"),
        ("{not json\n", "is not JSON"),
        ('{"txt": "words"}\n', "no column `text`"),
    ],
)
def test_a_source_without_documents_is_told_before_anything_is_written(tmp_path, content, message):
    source = tmp_path / "documents.jsonl"
    source.write_text(content)
    config = small_config(tmp_path)
    refused = bigtrain("run", config, f"stages.pretrain.data.0.source={source}")
    assert refused.returncode == 2
    assert refused.stderr.count(message) == 1
    assert str(source) in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_a_hub_name_that_cannot_be_had_is_told_before_anything_is_written(tmp_path):
    config = small_config(tmp_path, model={"from_pretrained": "nobody/nothing"}, tokenizer=None)
    refused = bigtrain("run", config, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")})
    assert refused.returncode == 2
    assert refused.stderr.count("model.from_pretrained: nobody/nothing cannot be opened") == 1
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_other_documents_are_refused_on_a_resume(finished):
    config, folder, _ = finished
    source = config.parent / "functions.jsonl"
    original, stat = source.read_text(), source.stat()
    (folder / "finetune" / "checkpoints" / "step-00000020" / "manifest.json").rename(folder / "kept.json")
    metadata = json.loads((folder / "run.json").read_text())
    metadata["stages"]["finetune"]["finished"] = False
    (folder / "run.json").write_text(json.dumps(metadata))
    try:
        source.write_text(original + '{"prompt": "one more", "completion": "document"}\n')
        refused = bigtrain("run", config)
    finally:
        source.write_text(original)
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (folder / "kept.json").rename(folder / "finetune" / "checkpoints" / "step-00000020" / "manifest.json")
    assert refused.returncode == 2
    assert "stages.finetune.data" in refused.stderr
    assert "has changed since this stage began" in refused.stderr
    assert "--restart finetune" in refused.stderr


def test_a_restarted_stage_is_trained_anew_and_the_old_one_kept(finished):
    """Last in this file: it changes the run of the others."""
    config, folder, _ = finished
    before = [r for r in read_metrics(folder) if r["stage"] == "pretrain"]
    again = bigtrain(
        "run", config, "stages.finetune.steps=5", "stages.finetune.evaluate.every=5", "--restart", "finetune"
    )
    assert again.returncode == 0, again.stderr
    assert "pretrain   is finished (20 steps)" in again.stdout
    rows = read_metrics(folder)
    assert [r for r in rows if r["stage"] == "pretrain"] == before
    assert [r["step"] for r in rows if r["stage"] == "finetune" and r["kind"] == "step"] == [1, 2, 3, 4, 5]
    attempts = json.loads((folder / "run.json").read_text())["attempts"]  # those that were refused count too
    assert {r["attempt"] for r in rows if r["stage"] == "finetune"} == {len(attempts)}
    assert (folder / "finetune.1" / "checkpoints" / "step-00000020" / "manifest.json").exists()
    assert (folder / "finetune" / "export" / "model.safetensors").exists()
