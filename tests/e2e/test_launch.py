"""`bigtrain launch` becomes the launcher that it names, and the run goes to its end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from bigtrain.observability.stream import read_metrics
from tests.forked import run_command
from tests.support import bigtrain, small_config

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def one_stage(folder, steps=2):
    """The first stage of the small run."""
    file = small_config(folder, steps=steps)
    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**config, "stages": config["stages"][:1]}))
    return file


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        *(pytest.param(name, 2, marks=pytest.mark.soak) for name in ("torchrun", "deepspeed", "accelerate")),
        ("accelerate", 1),
    ],
)
def test_it_starts_as_many_processes_as_it_says(tmp_path, launcher, processes):
    folder = tmp_path / 'it\'s $local_rank $$; "x"'
    folder.mkdir()
    config = one_stage(folder)
    words = ["--with", launcher, "--processes", processes]
    done = bigtrain("launch", config, "parallel.device=cpu", *words, env=ALONE)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"starting {launcher} ")
    assert f" · {processes} process" in done.stdout
    assert steps(folder / "runs" / "small") == [1, 2]


RANK = """
import os, pathlib, signal, sys

def told(number, frame):
    pathlib.Path("saved-" + os.environ["RANK"]).touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, told)
pathlib.Path("begun-" + os.environ["RANK"]).touch()
while True:
    signal.pause()
"""


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 75", 75), ("exit 2", 2), ("kill -KILL $$$$", 137)])
def test_elastic_ends_with_the_code_of_the_rank_that_failed(script, code):
    words = ["--nproc-per-node", "2", "--no-python", "sh", "-c", script]
    process = run_command(words, module="bigtrain.launching.elastic", timeout=120)
    assert process.returncode == code, process.stderr


def test_elastic_passes_a_signal_on_and_says_that_it_was_one(tmp_path):
    command = [sys.executable, "-m", "bigtrain.launching.elastic", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", RANK]
    process = subprocess.Popen(command, env=ALONE, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("begun-*"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert {file.name for file in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


# The batch script's srun: the real ranks, with the variables of a real srun, and USR1 passed on to all of them.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[sys.argv.index("bigtrain") + 1 :]
same = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_ID": "0", "SLURM_GTIDS": "0,1"}}
ranks = [
    subprocess.Popen(
        [sys.executable, "-m", "bigtrain", *words],
        env={{**os.environ, **same, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}},
    )
    for rank in range(2)
]
signal.signal(signal.SIGUSR1, lambda number, frame: [rank.send_signal(number) for rank in ranks])
sys.exit(max(rank.wait() for rank in ranks))
"""
SCONTROL = """#!/bin/sh
echo "$@" >>requeued
"""


def test_the_slurm_script_saves_goes_back_into_the_queue_and_continues(tmp_path):
    config, folder = one_stage(tmp_path, steps=60), tmp_path / "runs" / "small"
    script = bigtrain("launch", config, "--with", "slurm", "--print").stdout
    for name, program in ("srun", SRUN), ("scontrol", SCONTROL):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {**ALONE, "SLURM_JOB_ID": "4321", "SLURM_CPUS_PER_TASK": "1", "PATH": path}
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=slurm)
    while not (folder / "metrics.jsonl").exists() or not steps(folder):
        assert job.poll() is None, "the script ended before its run had begun"
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)  # as Slurm does before the time limit
    assert job.wait(timeout=120) != 0
    assert (tmp_path / "requeued").read_text() == "requeue Incomplete 4321\n"
    done = len(steps(folder))
    assert 0 < done < 60

    again = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=slurm, timeout=300)
    assert again.returncode == 0
    assert (tmp_path / "requeued").read_text() == "requeue Incomplete 4321\n"
    assert steps(folder) == list(range(1, 61))  # nothing was lost, nothing done twice


def steps(folder):
    rows = [row for row in read_metrics(folder) if row["kind"] == "step"]
    return [row["step"] for row in rows]
