"""The run's folder: one run lives in it, stages can be begun anew, nothing is deleted."""

import errno
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from bigtrain import run_folder
from bigtrain.checkpoint import set_aside
from bigtrain.config import difference, differences, load_config
from bigtrain.config.folder import RESERVED
from bigtrain.config.load import load
from bigtrain.config.origin import Origin
from bigtrain.errors import BigtrainError, CheckpointError, ConfigError, ending_of
from bigtrain.inference.places import PretrainedPlace, locate
from bigtrain.launching import start as starting
from bigtrain.observability.stream import Files, Stream, read_metrics
from bigtrain.run_folder import RunFolder
from tests import tiny
from tests.support import final_state, small_config
from tests.support import step as step_event


@pytest.fixture
def run(tmp_path):
    """(config with overrides, its folder) of a run that has begun, both stages finished."""
    path = small_config(tmp_path)

    def config(*overrides):
        return load_config(path, overrides)

    folder = RunFolder(config().folder)
    folder.begin(config(), None, world_size=2)
    stream = Stream([Files(folder.path, 1)])
    for stage in ("pretrain", "finetune"):
        last = folder.checkpoints(stage) / "step-00000003"
        last.mkdir(parents=True)
        (last / "manifest.json").write_text("{}")
        folder.export(stage).mkdir()
        folder.record(stage, finished=True, steps=3, exported_step=3)
        for step in (1, 2, 3):
            stream.emit(step_event(stage, step, loss=float(step)))
    stream.close()
    return config, folder


def test_the_same_run_may_go_on_with_another_execution(run):
    config, folder = run
    folder.check(config("parallel.engine=fsdp", "parallel.processes=3", "stages.pretrain.checkpoint.keep=1"))
    assert folder.begin(config(), None, world_size=3) == 2
    assert [attempt["world_size"] for attempt in folder.metadata()["attempts"]] == [2, 3]
    assert folder.metadata()["attempts"][0]["versions"]["torch"].startswith("2.")


HOLD = """
import sys
from pathlib import Path
from bigtrain.config import load_config
from bigtrain.config.load import load
from bigtrain.run_folder import RunFolder

config = load_config(Path(sys.argv[1]))
folder = RunFolder(config.folder)
folder.begin(config, None, world_size=1)
print("begun", flush=True)
sys.stdin.read()
"""


def test_a_second_job_in_the_same_folder_waits_for_the_first_or_is_refused(tmp_path, monkeypatch, capsys):
    path = small_config(tmp_path)
    config = load_config(path)
    folder = RunFolder(config.folder)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    job = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **pipes)
    assert job.stdout.readline() == "begun\n"
    monkeypatch.setattr(run_folder, "ENDING_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=r"another job, begun at 20\d\d-.* is at work in .*small\. Two jobs cannot"):
        folder.begin(config, "pretrain", world_size=1)
    assert "; waiting up to 0 s" in capsys.readouterr().err
    assert len(folder.metadata()["attempts"]) == 1
    monkeypatch.setattr(run_folder, "ENDING_SECONDS", 60.0)
    job.kill()  # its lock goes with it
    assert folder.begin(config, None, world_size=1) == 2
    folder.leave()
    job.communicate()
    assert RunFolder(config.folder).begin(config, None, world_size=1) == 3


def test_each_attempt_says_how_it_ended_as_far_as_anybody_knows(tmp_path):
    path = small_config(tmp_path)
    config = load_config(path)
    first, since = RunFolder(config.folder), time.time()
    first.end("refused", "its data is not there", since)
    assert not first.path.exists()  # there is no run to speak of
    job = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    job.stdout.readline()
    RunFolder(config.folder).end("refused", "another job is at work", time.time())
    assert ["ended" in attempt for attempt in first.metadata()["attempts"]] == [False]
    job.kill()
    job.communicate()
    for how, reason in (("failed", "the disk is full"), ("preempted", None), ("finished", None)):
        folder, since = RunFolder(config.folder), time.time()
        folder.begin(config, None, world_size=1)
        folder.end(how, reason, since)
        folder.leave()
        RunFolder(config.folder).end("refused", f"after {how}", time.time())
    ends = [(attempt["ended"]["how"], attempt["ended"]["reason"]) for attempt in first.metadata()["attempts"]]
    assert ends[0] == ("killed", "it was killed, or its machine was lost: it left no word of its end")
    assert ends[1:3] == [("failed", "the disk is full"), ("refused", "after failed")]
    assert ends[3:] == [
        ("preempted", None),
        ("refused", "after preempted"),
        ("finished", None),
        ("refused", "after finished"),
    ]
    assert [attempt.get("world_size") for attempt in first.metadata()["attempts"]] == [1, 1, None, 1, None, 1, None]


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (ConfigError("seed: no"), ("refused", "seed: no")),
        (CheckpointError("the disk is full"), ("failed", "the disk is full")),
        (ZeroDivisionError("division by zero"), ("failed", "ZeroDivisionError: division by zero")),
        (SystemExit(), ("failed", "SystemExit")),
        (KeyboardInterrupt(), ("failed", "stopped from the keyboard")),
    ],
)
def test_what_an_error_says_of_the_end(error, ending):
    assert ending_of(error) == ending


def test_a_folder_that_a_job_is_about_to_begin_is_free(tmp_path):
    """As a job that was killed then leaves it."""
    path = small_config(tmp_path)
    folder = RunFolder(load_config(path).folder)
    folder.path.mkdir(parents=True)
    (folder.path / "lock").touch()
    assert folder.begin(load(path, here=True).run, None, world_size=1) == 1


def test_no_stage_may_be_named_as_what_else_lies_in_the_folder(tmp_path):
    folder = RunFolder(tmp_path)
    ours = (
        folder.tokenizer,
        folder.architecture,
        folder.first_weights,
        folder.preempted,
        folder.save_request,
        tmp_path / "lock",
    )
    assert {path.name for path in ours} == set(RESERVED)


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    config = load_config(small_config(tmp_path))
    folder = RunFolder(config.folder)
    assert not folder.is_at_work()
    assert folder.begin(config, None, world_size=1) == 1
    assert capsys.readouterr().err == (
        f"the disk of {folder.path} has no locks: a second job could train the same run as well.\n"
    )


def test_another_mathematics_is_refused_with_the_choice(run):
    config, folder = run
    with pytest.raises(ConfigError) as error:
        folder.check(config("stages.finetune.optimizer.lr=1"))
    assert "stages.finetune.optimizer.lr: 0.001 in the run, 1.0 now" in str(error.value)
    assert "`--restart finetune`" in str(error.value)
    with pytest.raises(ConfigError, match="seed: 0 in the run, 1 now"):
        folder.check(config("seed=1"), restart="pretrain")  # the seed is not the stage's


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.from_config.hidden_size=64", "model.from_config.hidden_size: 32 in the run, 64 now"),
        ("tokenizer.train.vocab_size=500", "tokenizer.train.vocab_size: 400 in the run, 500 now"),
        ("stages.pretrain.data.0.split=train", "stages.pretrain.data.0.split: null in the run, train now"),
        ("stages.pretrain.global_batch_size=7", "stages.pretrain.global_batch_size: 5 in the run, 7 now"),
        ("stages.pretrain.schedule.name=linear", "stages.pretrain.schedule.name: cosine in the run, linear now"),
    ],
)
def test_what_differs_is_named_and_each_choice_is_told_with_what_it_means(run, override, told):
    config, folder = run
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    with pytest.raises(ConfigError) as error:
        folder.check(config(override))
    text = str(error.value)
    assert told in text
    assert "set the values back: the run goes on from its newest checkpoint" in text
    assert "another `name`: a run of its own from the first step on" in text
    restart = "`--restart pretrain`: pretrain, and finetune, which starts from it, is trained from its first step"
    assert (restart in text) == override.startswith("stages.")
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_data_may_lie_elsewhere_and_is_then_looked_at(run):
    config, folder = run
    moved = config("stages.pretrain.data.0.source=stdlib")
    folder.check(moved)
    assert folder.is_finished(config()) and not folder.is_finished(moved)


def test_restart_sets_the_stage_and_its_dependents_aside(run):
    config, folder = run
    assert folder.is_finished(config())
    manifest = folder.checkpoints("finetune") / "step-00000003" / "manifest.json"
    manifest.rename(manifest.with_name("gone"))
    assert not folder.is_finished(config())
    manifest.with_name("gone").rename(manifest)
    folder.record("finetune", exported_step=2)  # an export of an earlier checkpoint
    assert not folder.is_finished(config())
    folder.record("finetune", exported_step=3)
    folder.begin(config("stages.pretrain.optimizer.lr=1"), "pretrain", world_size=2)
    assert not folder.is_finished(config())
    assert not folder.stage("pretrain").exists()
    assert folder.stage("pretrain.1").exists()
    assert folder.stage("finetune.1").exists()
    assert read_metrics(folder.path) == []
    assert folder.metadata()["stages"]["finetune.1"]["finished"]
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8  # nothing was deleted


@pytest.mark.parametrize(
    "override",
    [
        "stages.pretrain.sequence_length=32",
        "stages.pretrain.optimizer.lr=1e-4",
        "stages.pretrain.data.0.source=stdlib",
        "stages.pretrain.name=first",
        "stages.finetune.from=null",
        "model.from_config.hidden_size=64",
        "tokenizer.train.vocab_size=500",
        "precision=bf16",
        "seed=1",
    ],
)
def test_a_run_that_has_saved_nothing_takes_any_change(tmp_path, override):
    """Whatever the attempt before has left: records, rows, the tokenizer, half a checkpoint, a torn line."""
    path = small_config(tmp_path)
    first = load_config(path)
    if "name=first" in override:
        path.write_text(path.read_text().replace("from: pretrain", "from: first"))
    changed = load_config(path, [override])
    folder = RunFolder(first.folder)
    folder.begin(first, None, world_size=1)
    folder.tokenizer.mkdir()
    (folder.tokenizer / "manifest.json").write_text("{}")
    folder.record("pretrain", data=[], steps=6)
    stream = Stream([Files(folder.path, 1)])
    for step in (1, 2):
        stream.emit(step_event("pretrain", step, loss=1.0))
    stream.close()
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "stage": "pretrain", "st')
    half = folder.checkpoints("pretrain") / "step-00000002"
    half.mkdir(parents=True)
    (half / "weights-00000.safetensors").touch()
    folder.check(changed)
    assert folder.begin(changed, None, world_size=1) == 2
    assert folder.metadata()["stages"] == {}
    assert folder.metadata()["seed"] == changed.seed
    assert read_metrics(folder.path) == []
    assert not folder.tokenizer.exists()
    left = {path.name for path in folder.path.iterdir()}
    assert left == {"config.yaml", "lock", "events.jsonl", "metrics.jsonl", "run.json"}
    assert load_config(folder.path / "config.yaml") == changed


@pytest.mark.parametrize("state", ["checkpoint", "damaged", "finished", "imported"])
def test_only_a_stage_with_a_state_is_bound_to_its_values(run, state):
    config, folder = run
    shutil.rmtree(folder.stage("finetune"))
    folder.begin(config(), "finetune", world_size=1)
    folder.check(config("stages.finetune.optimizer.lr=1", "stages.finetune.global_batch_size=7"))
    with pytest.raises(ConfigError, match="seed: 0 in the run, 1 now"):
        folder.check(config("seed=1"))  # pretrain has been trained with it
    if state in ("checkpoint", "damaged"):
        folder.record("pretrain", finished=False)
        last = folder.checkpoints("pretrain") / "step-00000003"
        if state == "damaged":
            (last / "manifest.json").unlink()
            last.rename(last.with_name("damaged-step-00000003"))
    else:
        shutil.rmtree(folder.stage("pretrain"))
        folder.record("pretrain", finished=state == "finished", **({"imported": "x"} if state == "imported" else {}))
    with pytest.raises(ConfigError, match=r"`--restart pretrain`: pretrain, and finetune, which"):
        folder.check(config("stages.pretrain.optimizer.lr=1"))
    folder.check(config("stages.pretrain.optimizer.lr=1"), restart="pretrain")


def test_a_stage_is_not_restarted_from_one_that_has_lost_its_checkpoints(run):
    """Nothing is set aside; what the message advises is accepted."""
    config, folder = run
    last = folder.checkpoints("pretrain") / "step-00000003"
    set_aside(last)
    for begin in (folder.check, lambda *given: folder.begin(*given, world_size=1)):
        with pytest.raises(
            ConfigError, match=r"(?s)--restart finetune: finetune starts from pretrain, and "
        ) as refused:
            begin(config(), "finetune")
    assert (folder.checkpoints("finetune") / "step-00000003").exists()
    assert "`--restart pretrain`: pretrain, and finetune, which starts from it, is trained" in str(refused.value)
    folder.check(config(), "pretrain")
    shutil.move(*re.search("`mv (.*)`", str(refused.value))[1].split())
    folder.check(config(), "finetune")
    shutil.rmtree(last)
    with pytest.raises(ConfigError, match=f"put a checkpoint back into {last.parent}"):
        folder.check(config(), "finetune")
    shutil.rmtree(folder.stage("pretrain"))
    folder.record("pretrain", finished=False)
    folder.check(config(), "finetune")  # the first stage will be trained before


def test_a_stage_with_damaged_checkpoints_alone_says_what_can_be_used(run):
    _, folder = run
    stage, last = folder.stage("finetune"), folder.checkpoints("finetune") / "step-00000003"
    set_aside(last)
    looks = (lambda: locate(stage), lambda: check_origin(stage))
    for way in (lambda text: "train it anew with `--restart finetune`, or put whole" in text,
                lambda text: f"use its export, {stage / 'export'}, as a pretrained model, or put" in text):  # fmt: skip
        for look in looks:
            with pytest.raises(BigtrainError, match="stage finetune has no checkpoint any more, as") as refused:
                look()
            assert way(str(refused.value))
        (stage / "export" / "config.json").touch()
    assert locate(stage / "export") == PretrainedPlace(str(stage / "export"))
    assert locate(folder.path).stage.name == "pretrain"
    set_aside(folder.checkpoints("pretrain") / "step-00000003")
    with pytest.raises(CheckpointError, match="stage finetune has no checkpoint any more"):
        locate(folder.path)
    shutil.move(*re.search("`mv (.*)`", str(refused.value))[1].split())
    assert locate(stage).checkpoint == last


def check_origin(stage):
    if problem := Origin.of(str(stage)).problem():
        raise ConfigError(problem)


def test_restart_of_what_has_not_begun_leaves_nothing(run):
    config, folder = run
    before = folder.metadata()["stages"]
    folder.begin(config(), "finetune", world_size=1)
    assert folder.metadata()["stages"] == {"pretrain": before["pretrain"], "finetune.1": before["finetune"]}
    rows = (folder.path / "metrics.jsonl").read_text()
    (folder.checkpoints("finetune") / "step-00000001").mkdir(parents=True)
    folder.begin(config(), "finetune", world_size=1)
    assert folder.metadata()["stages"] == {"pretrain": before["pretrain"], "finetune.1": before["finetune"]}
    assert (folder.path / "metrics.jsonl").read_text() == rows
    assert not folder.stage("finetune").exists()
    assert not folder.stage("finetune.2").exists()
    (folder.stage("finetune") / "trace").mkdir(parents=True)
    (folder.stage("finetune") / "trace" / "step-1.json").touch()  # of a profiler
    folder.begin(config(), "finetune", world_size=1)
    assert (folder.stage("finetune.2") / "trace" / "step-1.json").exists()


def test_restart_of_the_last_stage_leaves_the_first(run):
    config, folder = run
    folder.begin(config("stages.finetune.steps=2"), "finetune", world_size=2)
    assert folder.stage("pretrain").exists()
    assert {row["stage"] for row in read_metrics(folder.path)} == {"pretrain"}


def test_unknown_stage(run):
    config, folder = run
    with pytest.raises(ConfigError, match="no such stage; did you mean `finetune`"):
        folder.check(config(), restart="finetun")


def test_a_folder_of_something_else(tmp_path):
    config = load_config(small_config(tmp_path))
    folder = RunFolder(config.folder)
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        folder.check(config)


def test_the_last_row_of_a_step_counts_and_a_torn_line_does_not(tmp_path):
    stream = Stream([Files(tmp_path, 1)])
    for step, loss in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25)):
        stream.emit(step_event("a", step, loss=loss))
    stream.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "stage": "a", "st')
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.25), (3, 0.3)]
    stream = Stream([Files(tmp_path, 2)])
    stream.emit(step_event("a", 4, loss=0.4))
    stream.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_the_words_of_a_difference(tmp_path):
    """No Python in them."""
    path = small_config(tmp_path)

    def told(*overrides):
        changes = differences(load_config(path), load_config(path, overrides), "mathematics")
        return "\n".join(difference(*change) for change in changes)

    package = load_config(path).stages[0].data[0].source
    both = f"stages.pretrain.data=[{{source: '{package}', weight: 2}}, {{source: chats6.jsonl, weight: 1}}]"
    assert told(both) == (
        f"stages.pretrain.data:\n    - {package}\n    + {package}, weight 2\n    + chats6.jsonl, weight 1"
    )
    assert told("stages.pretrain.optimizer.max_grad_norm=null") == (
        "stages.pretrain.optimizer.max_grad_norm: 1.0 in the run, null now"
    )
    assert told("stages.pretrain.clean={repair: true}") == "stages.pretrain.clean: null in the run, repair true now"
    assert told("model.from_config.tie_word_embeddings=false") == (
        "model.from_config.tie_word_embeddings: true in the run, false now"
    )
    assert told("model.from_config.head_dim=8") == "model.from_config.head_dim: absent in the run, 8 now"
    assert told("tokenizer.add_tokens=[<a>]") == "tokenizer.add_tokens:\n    + <a>"


def events(folder):
    return [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]


def test_every_attempt_that_ends_badly_is_an_event(tmp_path):
    config = load_config(small_config(tmp_path))
    folder = RunFolder(config.folder)
    folder.end("refused", "before there is a run", time.time())
    assert not folder.path.exists()
    for reason in ("the disk is full", None):
        since = time.time()
        folder.begin(config, None, world_size=1)
        if reason:
            folder.end("failed", reason, since)
    RunFolder(config.folder).end("refused", "another job is at work", time.time())
    folder.leave()  # as a job that is killed
    folder.end("refused", "seed: 1", time.time())
    folder.begin(config, None, world_size=1)
    folder.end("finished", None, since)
    told = [(event["kind"], event["reason"]) for event in events(folder)]
    killed = "it was killed, or its machine was lost: it left no word of its end"
    assert told == [
        ("failed", "the disk is full"),
        ("refused", "another job is at work"),
        ("refused", "seed: 1"),
        ("killed", killed),
    ]
    assert [attempt["ended"]["how"] for attempt in folder.metadata()["attempts"]] == [
        "failed",
        "killed",
        "refused",
        "finished",
    ]


def test_a_start_that_is_refused_or_fails_is_an_event(tmp_path, monkeypatch):
    """Whoever finds out: the rules about this machine, the check of the folder, the launcher of the ranks."""
    path = small_config(tmp_path)
    config = load_config(path)
    with pytest.raises(ConfigError):
        starting.load_here(path, ["stages.pretrain.data.0.source=gone.jsonl"])
    folder = RunFolder(config.folder)
    assert not folder.path.exists()
    since = time.time()
    folder.begin(config, None, world_size=1)
    folder.record("pretrain", finished=True, steps=6, data=[])
    folder.end("finished", None, since)
    folder.leave()
    with pytest.raises(ConfigError):
        starting.load_here(path, ["stages.pretrain.data.0.source=gone.jsonl"])
    with pytest.raises(ConfigError):
        starting.start(load_config(path, ["seed=1"]))
    killed = "rank 1 was killed by signal 9 (SIGKILL); the machine was probably out of memory."
    told = [(1, killed), (1, "rank 0 failed:\nTraceback (most recent call last):\n  ...\nZeroDivisionError: no")]
    for code, text in told:
        monkeypatch.setattr(starting, "spawn_command", lambda *given, c=code, t=text: given[-1](c, t) or c)
        assert starting.start(config) == 1
    reasons = [(event["kind"], event["reason"].splitlines()[0]) for event in events(folder)]
    assert [kind for kind, _ in reasons] == ["refused", "refused", "failed", "failed"]
    assert "gone.jsonl" in reasons[0][1] and "trains something else" in reasons[1][1]
    assert [reason for _, reason in reasons[2:]] == [killed, "rank 0 failed: ZeroDivisionError: no"]
    assert [attempt["ended"]["how"] for attempt in folder.metadata()["attempts"]][1:] == [kind for kind, _ in reasons]


@pytest.mark.parametrize("saved", ["step-00000002", "step-00000001"])
def test_a_run_whose_run_json_was_taken_away_is_finished_and_described_again(tmp_path, saved):
    """As the message about a damaged one advises; it has all of its steps behind it, or the last one before it."""
    config = tiny.config(tmp_path, export=True, checkpoint={"every": 1})
    folder = tiny.train(config)
    metadata, (_, state) = json.loads((folder / "run.json").read_text()), final_state(folder, "p")
    (folder / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"take it away \(`mv .*run\.json .*run\.json\.damaged`\): the run goes on"):
        tiny.train(config)
    (folder / "run.json").rename(folder / "run.json.damaged")
    if saved == "step-00000001":
        shutil.rmtree(folder / "p" / "checkpoints" / "step-00000002")
    tiny.train(config)
    again, (step, reached) = json.loads((folder / "run.json").read_text()), final_state(folder, "p")
    assert again["stages"].keys() == {"p"} and len(again["attempts"]) == 1
    assert again["stages"]["p"] == metadata["stages"]["p"] | {"from": saved}
    assert step == 2 and all(torch.equal(tensor, state[name]) for name, tensor in reached.items())
    steps = [row["step"] for row in read_metrics(folder) if row["kind"] == "step"]
    assert steps == [1, 2]
    assert RunFolder(folder).is_finished(load_config(config))
