"""A reader that fails is told of and dropped; the others, and whoever emits, do not notice."""

import json
import threading
from pathlib import Path

import pytest

from bigtrain.config import load_config
from bigtrain.config.schema import ProfileConfig
from bigtrain.observability.events import CheckpointSaved, Evaluation, Finished, Prepared, Preparing
from bigtrain.observability.hooks import StepHooks
from bigtrain.observability.profiler import Profiler
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Files, Stream, read_metrics
from bigtrain.observability.summary import Summary, summary
from bigtrain.observability.trackers import Tracker
from bigtrain.resilience.requests import Requests, TimeLimit, heard
from bigtrain.run_folder import RunFolder
from tests.support import Rows, small_config, step

BEGUN = Preparing(what="tokenizer")


class Failing:
    name = "the failing one"

    def __init__(self, error, when):
        self.error, self.when, self.asked = error, when, 0

    def __call__(self, event):
        self.asked += 1
        if self.when == event.kind:
            raise self.error

    def close(self):
        if self.when == "close":
            raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no server"), SystemExit(1)])
@pytest.mark.parametrize("when", ["preparing", "step", "close"])
def test_a_failing_reader_is_dropped_and_told_of_once(error, when, capsys):
    before, after, failing = Rows(), Rows(), Failing(error, when)
    stream = Stream([before, failing, after])
    stream.emit(BEGUN)
    for _ in range(3):
        stream.emit(step())
    stream.close()
    for events in (before, after) if when != "close" else (before,):  # readers are closed last to first
        assert [e["kind"] for e in events if e["kind"] != "reporting_failed"] == ["preparing", "step", "step", "step"]
        told = [event for event in events if event["kind"] == "reporting_failed"]
        assert [event["what"] for event in told] == ["the failing one"]
    reason = {OSError: "No space left on device", RuntimeError: "no server", SystemExit: "1"}[type(error)]
    assert capsys.readouterr().err == f"the failing one: {reason}. The run goes on without it.\n"
    assert failing.asked == {"preparing": 1, "step": 2, "close": 4}[when]


def test_two_readers_that_fail_at_once(capsys):
    events = Rows()
    Stream([Failing(OSError("a"), "preparing"), Failing(OSError("b"), "reporting_failed"), events]).emit(BEGUN)
    assert sorted(event["kind"] for event in events) == ["preparing", "reporting_failed", "reporting_failed"]
    assert capsys.readouterr().err.count("goes on without it") == 2


def test_interrupts_pass():
    with pytest.raises(KeyboardInterrupt):
        Stream([Failing(KeyboardInterrupt(), "preparing")]).emit(BEGUN)


def test_events_of_several_threads_and_a_loss_do_not_wait_for_each_other():
    stream = Stream([Failing(OSError("a"), "step")])
    threads = [threading.Thread(target=stream.emit, args=(step(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_the_run_goes_on_when_its_own_files_cannot_be_written(tmp_path, capsys):
    """A full disk, a folder that is gone."""
    for name in ("metrics.jsonl", "events.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to("/dev/full")
        events = Rows()
        stream = Stream([Files(folder, 1), events])
        stream.emit(BEGUN)
        stream.emit(step())
        stream.close()
        assert "No space left on device" in capsys.readouterr().err
        assert [event["kind"] for event in events if event["kind"] != "reporting_failed"] == ["preparing", "step"]
    stream = Stream([Files(tmp_path / "gone", 1)])
    stream.emit(BEGUN)
    assert capsys.readouterr().err.startswith("metrics.jsonl and events.jsonl: No such file or directory")


def test_events_hold_no_secrets(tmp_path):
    events = Rows()
    stream = Stream([Files(tmp_path, 1), events])
    counts = {"source": "https://u:hunter2@h/x", "parts": ["s3://k:hunter2@b"]}
    stream.emit(Prepared(stage="s", folder="f", counts=counts))
    stream.emit(step())
    stream.close()
    assert "hunter2" not in (tmp_path / "events.jsonl").read_text()
    assert events[0]["source"] == "https://u:***@h/x" and events[0]["parts"] == ["s3://k:***@b"]
    assert read_metrics(tmp_path)[0]["loss"] == 1.0


def test_a_save_that_cannot_be_answered_does_not_stop_the_clock(tmp_path, capsys):
    limit = TimeLimit(1000.0, begun=0.0)
    requests = Requests(tmp_path / "gone" / "save-now", limit)
    requests.save = True
    requests.saving(3)
    stream = Stream(requests.readers())
    stream.emit(CheckpointSaved(stage="s", step=3, folder="x", stalled_seconds=0.0, seconds=1.0))
    assert "the answers to `bigtrain save`: No such file" in capsys.readouterr().err
    stream.emit(step(step_seconds=50.0))
    assert limit._step == 50.0
    assert not heard(tmp_path / "gone" / "save-now").exists()


def test_lost_output_and_other_readers(capsys):
    events = Rows()
    stream = Stream([events, Progress(Path("/dev/full").open("w"))])  # noqa: SIM115
    for what in ("tokenizer", "data"):
        stream.emit(Preparing(what=what))
    assert capsys.readouterr().err == (
        "the progress on standard output: No space left on device. The run goes on without it.\n"
    )
    assert [event["kind"] for event in events] == ["preparing", "reporting_failed", "preparing"]


def test_a_tracker_that_cannot_start_or_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    events = Rows()
    stream = Stream([events, Tracker("tensorboard", "r", {}, tmp_path)])
    stream.emit(BEGUN)
    stream.emit(step())
    stream.close()
    assert [event["kind"] for event in events] == ["preparing", "reporting_failed", "step"]
    assert "the tracker tensorboard: " in capsys.readouterr().err

    monkeypatch.setattr("bigtrain.observability.trackers.FINISH_SECONDS", 0.1)
    tracker = Tracker("tensorboard", "r", {}, tmp_path)
    tracker._tracker = Failing(RuntimeError("no server"), "close")
    tracker._tracker.finish = tracker._tracker.close
    with pytest.raises(RuntimeError, match="no server"):
        tracker.close()
    never = threading.Event()
    tracker._tracker.finish = never.wait
    with pytest.raises(TimeoutError, match=r"not sent everything within 0.1 s"):
        tracker.close()
    never.set()


def test_a_profiler_that_fails_is_dropped(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file where the folder should be")
    events = Rows()
    stream = Stream([events])
    hooks = StepHooks([Profiler(ProfileConfig(steps=[1, 1]), "s", 5, tmp_path, rank=0, stream=stream)], stream)
    hooks(0)
    hooks(1)
    assert not hooks
    assert [(event["kind"], event["what"]) for event in events] == [("reporting_failed", "the profiler")]
    assert capsys.readouterr().err.startswith("the profiler: File exists")


METADATA = {
    "model": "llama",
    "parameters": 1000,
    "from": "random weights",
    "steps": 4,
    "data": [{"source": "a.jsonl", "documents": 7}],
}


def finished_run(tmp_path, seconds=(1.0, 1.1, 0.9, 8.0, 1.0), losses=(4.0, 2.48)):
    """A run's folder with what a summary reads."""
    config = load_config(small_config(tmp_path))
    config = config.model_copy(update={"stages": config.stages[:1]})
    folder = RunFolder(config.folder)
    folder.path.mkdir(parents=True)
    answers = [{"prompt": "say\x1b[31m", "answer": "two\nlines\tand \x1b[2J"}]
    (folder.path / "run.json").write_text(json.dumps({"stages": {"pretrain": {**METADATA, "answers": answers}}}))
    files = Files(folder.path, 1)
    for number, took in enumerate(seconds, 1):
        rate = {"step_seconds": took, "tokens_per_second": 1000 / took}
        files(step("pretrain", number, steps=5, tokens=1000, targets=400, **rate))
    for number, loss in enumerate(losses):
        metrics = {"loss": loss, "accuracy": 0.1}
        files(Evaluation(stage="pretrain", step=number, metrics=metrics, seconds=1.0))
    files.close()
    return config, folder


def test_the_words_of_the_summary(tmp_path, capsys):
    config, folder = finished_run(tmp_path)
    Stream([Summary(config.stages, folder)]).emit(Finished(folder=str(folder.path), seconds=1.0))
    told = capsys.readouterr().out
    assert "trained    5.0k positions, 2.0k of them supervised targets, in 5 steps of a.jsonl (7 documents)" in told
    assert "loss 4.0000 -> 2.4800 (-38 %)" in told
    assert "slow       1 step took more than 3 times the median of 1 s; the slowest 8 s, at step 4" in told
    assert r"say\x1b[31m" in told and "two\n             lines\tand " in told and "\x1b" not in told


def test_a_summary_of_even_steps_names_no_slow_one(tmp_path):
    config, folder = finished_run(tmp_path, seconds=(1.0, 2.9), losses=(2.0, 1.997))
    assert "slow " not in summary(config.stages, folder)
    assert "(-0.1 %)" in summary(config.stages, folder)


def test_a_summary_without_what_it_reads(tmp_path, capsys):
    config, folder = finished_run(tmp_path)
    (folder.path / "metrics.jsonl").unlink()
    assert "4 steps of a.jsonl (7 documents); metrics.jsonl has no row of them" in summary(config.stages, folder)
    (folder.path / "run.json").write_text("{")
    Stream([Summary(config.stages, folder)]).emit(Finished(folder=str(folder.path), seconds=1.0))
    assert capsys.readouterr().err.startswith("the summary: ")
