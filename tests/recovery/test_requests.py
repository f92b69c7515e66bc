"""A running job is asked to save, and leaves before its time is over."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from bigtrain.checkpoint import Checkpoint, complete
from bigtrain.config import load_config
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launching import asking
from bigtrain.observability.events import CheckpointSaved, CheckpointsPlanned, Evaluation
from bigtrain.resilience.requests import TimeLimit
from bigtrain.run_folder import RunFolder
from tests.forked import start_command
from tests.support import bigtrain, small_config, step


def long_run(folder, **changes):
    """A run's file of one stage that does not end by itself."""
    path = small_config(folder, **changes)
    values = yaml.safe_load(path.read_text())
    stage = {"steps": 1_000_000, "schedule": {"name": "constant"}, "checkpoint": {}, "evaluate": None, "held_out": 0.0}
    values["stages"] = [values["stages"][0] | stage]
    path.write_text(yaml.safe_dump(values))
    return path


def start(config):
    """A job that trains: it has shown a step."""
    job = start_command("run", config)
    for line in job.stdout:
        if line.lstrip().startswith("step "):
            return job
    raise AssertionError("it ended before its first step")


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def saved_steps(folder):
    return [event["step"] for event in events(folder) if event["kind"] == "checkpoint_saved"]


def test_saved_when_asked(tmp_path):
    """Also what `bigtrain save` says where nobody trains."""
    config = long_run(tmp_path)
    folder = tmp_path / "runs" / "small"
    nobody = bigtrain("save", tmp_path)
    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert "holds no run" in nobody.stderr

    job = start(config)
    asked = bigtrain("save", folder)
    assert (asked.returncode, asked.stderr) == (0, "")
    saved = folder / "pretrain" / "checkpoints" / asked.stdout.strip().rsplit("/", 1)[1]
    assert complete(saved.parent)[0] == saved
    job.terminate()
    job.stdout.read()
    assert job.wait() == 75
    step, last = Checkpoint(saved).step, Checkpoint(complete(saved.parent)[-1]).step
    assert last > step
    assert saved_steps(folder) == [step, last]

    after = bigtrain("save", folder)
    assert after.returncode == 1
    assert f"no job answers in {folder}" in after.stderr
    assert not list(folder.glob("save-now*"))


def test_it_leaves_when_its_time_is_over(tmp_path):
    job = start(long_run(tmp_path, time_limit="25s"))
    output = job.stdout.read()
    assert job.wait() == 75
    folder = tmp_path / "runs" / "small"
    last = Checkpoint(complete(folder / "pretrain" / "checkpoints")[-1]).step
    assert saved_steps(folder) == [last]
    assert f"saved at step {last} of pretrain" in output
    assert (folder / "preempted").exists()
    times = {event["kind"]: event["time"] for event in events(folder)}
    assert times["preempted"] - times["started"] < 25


JOB = """
import contextlib, sys
from pathlib import Path
import filelock
from bigtrain.resilience.requests import Requests

folder = Path(sys.argv[1])
with filelock.FileLock(folder / "lock"), Requests(folder / "save-now") if sys.argv[2:] else contextlib.nullcontext():
    print("at work", flush=True)
    sys.stdin.read()
"""


def at_work(folder, *listens):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    job = subprocess.Popen([sys.executable, "-c", JOB, str(folder), *listens], **pipes)
    job.stdout.readline()
    return job


def test_a_job_that_does_not_train_is_not_waited_for_long(tmp_path, monkeypatch):
    """One at work is given its time; where there is none, the answer comes sooner."""
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(asking, "UNSEEN_SECONDS", float("inf"))
    job = at_work(tmp_path)
    assert RunFolder(tmp_path).is_at_work()
    with pytest.raises(BigtrainError, match="no job answers"):
        asking.ask_to_save(tmp_path)
    job.communicate()
    assert not RunFolder(tmp_path).is_at_work()
    monkeypatch.setattr(asking, "ANSWER_SECONDS", float("inf"))
    monkeypatch.setattr(asking, "UNSEEN_SECONDS", 0.2)
    with pytest.raises(BigtrainError, match="no job answers"):
        asking.ask_to_save(tmp_path)
    assert not list(tmp_path.glob("save-now*"))


@pytest.mark.parametrize(
    ("end", "silence", "told"),
    [
        pytest.param(lambda job: job.stdin.close(), 60.0, "ended before it had saved", id="ends"),
        pytest.param(lambda job: job.kill(), 2.0, "no sign of life", id="killed"),
    ],
)
def test_a_job_that_hears_and_does_not_save(tmp_path, monkeypatch, end, silence, told):
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(asking, "SILENCE_SECONDS", silence)
    job = at_work(tmp_path, "listens")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(asking.ask_to_save, tmp_path)
        while not (tmp_path / "save-now.heard").exists() and not answer.done():
            time.sleep(0.01)
        end(job)
        with pytest.raises(BigtrainError, match=told):
            answer.result()
    job.wait()
    assert not list(tmp_path.glob("save-now*"))


def test_the_reserve_follows_what_took_longest(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limit = TimeLimit(600.0, begun=1000.0)
    limit(CheckpointsPlanned(bytes=5_000_000_000, free_bytes=0, keep=1))  # 100 s on a slow disk
    for seconds in (3.0, 10.0, 4.0):
        limit(step(step_seconds=seconds))
    limit(Evaluation(stage="s", step=1, metrics={}, seconds=20.0))
    clock[0] = 1600.0 - 2 * (10 + 20 + 100) - TimeLimit.MARGIN - 0.1
    assert not limit.reached
    clock[0] += 0.2
    assert limit.reached
    limit(CheckpointSaved(stage="s", step=1, folder="f", stalled_seconds=0.0, seconds=30.0))  # as it turns out
    assert not limit.reached
    clock[0] = 1600.0 - 2 * (10 + 20 + 30) - TimeLimit.MARGIN
    assert limit.reached


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1h30m", 5400), ("2d", 172800), ("1d1h1m1s", 90061)])
def test_times(tmp_path, text, seconds):
    assert load_config(small_config(tmp_path), [f"time_limit={text}"]).time_limit_seconds == seconds


@pytest.mark.parametrize("text", ["90", "1.5h", "h", "1 h", "-5m"])
def test_no_times(tmp_path, text):
    with pytest.raises(ConfigError, match="time_limit"):
        load_config(small_config(tmp_path), [f"time_limit={text!r}"])
