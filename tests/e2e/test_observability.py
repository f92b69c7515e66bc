"""Trackers and the profiler get what the run's own files have, also where nothing can be printed."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.observability.stream import read_metrics
from tests.support import small_config


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run with all trackers, none of which may need an account or the network."""
    folder = tmp_path_factory.mktemp("tracked")
    config = small_config(
        folder,
        steps=4,
        every=2,
        trackers=["tensorboard", "wandb", "mlflow", "trackio"],
        profile={"steps": [2, 3]},
        parallel={"engine": "ddp", "processes": 2, "micro_batch_size": 2},
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-m", "bigtrain", "run", str(config)]
    with Path("/dev/full").open("w") as full, (folder / "errors").open("w") as errors:
        process = subprocess.run(command, env=environment, cwd=folder, stdout=full, stderr=errors, timeout=900)
    assert process.returncode == 0, (folder / "errors").read_text()
    return folder


def losses(folder):
    rows = [row for row in read_metrics(folder / "runs" / "small") if row["kind"] == "step"]
    return [row["loss"] for row in rows if row["stage"] == "pretrain"]


def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "runs" / "small" / "tensorboard"))
    events.Reload()
    logged = events.Scalars("pretrain/loss")
    assert [event.step for event in logged] == [1, 2, 3, 4]
    assert [event.value for event in logged] == pytest.approx(losses(tracked), rel=1e-6)
    assert [event.step for event in events.Scalars("finetune/held_out_loss")] == [4, 6, 8]


def test_mlflow_without_a_server(tracked):
    """As installed: in the database that it makes by itself."""
    with sqlite3.connect(tracked / "mlflow.db") as connection:
        rows = connection.execute("select value from metrics where key = 'pretrain/loss' order by step").fetchall()
    assert [value for (value,) in rows] == pytest.approx(losses(tracked))


def test_trackio(tracked):
    [database] = (tracked / "trackio").glob("bigtrain*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("select metrics from metrics order by id")]
    assert [row["pretrain/loss"] for row in rows if "pretrain/loss" in row] == pytest.approx(losses(tracked))


def test_wandb_keeps_an_offline_run(tracked):
    [file] = (tracked / "runs" / "small" / "wandb").glob("offline-run-*/*.wandb")
    assert b"pretrain/loss" in file.read_bytes()


def test_the_profiler_traces_the_steps_that_were_named(tracked):
    for stage in ("pretrain", "finetune"):
        for rank in (0, 1):
            trace = json.loads((tracked / "runs" / "small" / stage / "profile" / f"rank-{rank}.trace.json").read_text())
            names = [event.get("name", "") for event in trace["traceEvents"]]
            assert sum(name.startswith("Optimizer.step") for name in names) == 2, (
                "one optimizer step in each of two steps"
            )


def test_lost_output_is_told_of_and_the_run_goes_on(tracked):
    sentence = "the progress on standard output: No space left on device. The run goes on without it."
    assert (tracked / "errors").read_text().count(sentence) == 1
    events = [json.loads(line) for line in (tracked / "runs" / "small" / "events.jsonl").read_text().splitlines()]
    assert [event["what"] for event in events if event["kind"] == "reporting_failed"] == [sentence.partition(":")[0]]
    assert events[-1]["kind"] == "finished"
    assert (tracked / "runs" / "small" / "finetune" / "export" / "model.safetensors").is_file()
