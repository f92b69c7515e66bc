"""One rank fails: its own words come first and once, and no process stays behind."""

import signal
import subprocess
import sys

import pytest

from bigtrain.run_folder import RunFolder
from tests.forked import living
from tests.support import bigtrain, small_config

SOURCE = """
import os, signal

if os.environ.get("RANK") == "1":
    {failure}

def rows():
    for i in range(300):
        question, answer = f"What is {{i}} and {{i}}?", f"{{2 * i}}"
        yield {{"prompt": question, "completion": answer, "text": f"{{question}} {{answer}}"}}
"""


def fail(folder, failure, stage="pretrain"):
    """Run with a user's source that fails while rank 1 imports it; returns the process and what is left of it."""
    (folder / "mine.py").write_text(SOURCE.format(failure=failure))
    config = small_config(folder)
    sources = f"stages.{stage}.data=[{{source: 'mine:rows'}}]"
    process = bigtrain(
        "run", config, sources, "parallel.engine=fsdp", cwd=folder, variables={"PYTHONPATH": str(folder)}
    )
    return process, living(folder)


def ending(folder):
    """What run.json says of how the run's attempt ended."""
    (attempt,) = RunFolder(folder / "runs" / "small").metadata()["attempts"]
    return attempt["ended"]["how"], attempt["ended"]["reason"]


def test_the_failing_ranks_traceback_comes_first_and_once(tmp_path):
    broken = "lambda *_, **__: (_ for _ in ()).throw(RuntimeError('the disk is on fire'))"
    build = "from bigtrain.pipeline.build import StageBuilder"
    process, left = fail(tmp_path, f"{build}\n    StageBuilder.empty_model = {broken}")
    assert process.returncode == 1
    lines = process.stderr.strip().splitlines()
    assert lines[0] == "rank 1 failed:"
    assert lines[-1] == "RuntimeError: the disk is on fire"
    assert ending(tmp_path) == ("failed", "rank 1 failed: RuntimeError: the disk is on fire")
    assert process.stderr.count("Traceback (most recent call last)") == 1
    assert left == []


def test_a_rank_that_fails_inside_a_step_is_the_one_that_is_told_of(tmp_path):
    """The others wait for it in a collective and fail too: of that nothing is to be read."""
    failure = "import torch\n    torch.optim.AdamW.step = lambda *_: 1 / 0"
    process, left = fail(tmp_path, failure, "finetune")
    assert process.returncode == 1
    lines = process.stderr.strip().splitlines()
    assert lines[0] == "rank 1 failed:"
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert process.stderr.count("Traceback (most recent call last)") == 1
    assert left == []


def test_a_killed_rank_is_named(tmp_path):
    process, left = fail(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert process.returncode == 1
    assert "rank 1 was killed by signal 9 (SIGKILL); the machine was probably out of memory." in process.stderr
    assert "Traceback" not in process.stderr
    assert ending(tmp_path) == ("failed", process.stderr.strip())
    assert left == []


@pytest.mark.parametrize(
    "number", [*(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL]
)
def test_no_rank_outlives_the_command(tmp_path, number):
    config = small_config(tmp_path, steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "bigtrain", "run", str(config)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job, as these tests may be, begins with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if "step 1/" in line:
            break
    assert len(living(tmp_path)) == 3  # the command and two ranks
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)  # ends when all that hold the pipes have ended
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert living(tmp_path) == []
