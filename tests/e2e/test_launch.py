"""`bigtrain launch` becomes the launcher that it names, and the run goes to its end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain, small_config

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def one_stage(folder, **changes):
    """The first stage of the small run, two steps long."""
    file = small_config(folder, steps=2, **changes)
    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**config, "stages": config["stages"][:1]}))
    return file


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [("torchrun", 2), ("deepspeed", 2), ("accelerate", 2), ("accelerate", 1)],
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
    rows = read_metrics(folder / "runs" / "small")
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2]


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


def elastic(*words, **options):
    command = [sys.executable, "-m", "bigtrain.launching.elastic", "--nproc-per-node", "2", "--no-python", *words]
    return subprocess.Popen(command, env=ALONE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 75", 75), ("exit 2", 2), ("kill -KILL $$$$", 137)])
def test_elastic_ends_with_the_code_of_the_rank_that_failed(script, code):
    process = elastic("sh", "-c", script)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told


def test_elastic_passes_a_signal_on_and_says_that_it_was_one(tmp_path):
    process = elastic(sys.executable, "-c", RANK, cwd=tmp_path)
    while len(list(tmp_path.glob("begun-*"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert {file.name for file in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
