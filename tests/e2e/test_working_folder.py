"""Files of the working folder take no library's place, `module:name` finds its module there with any number of
processes, and the ranks of one host listen to nobody else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bigtrain.launching.spawn import free_port
from bigtrain.observability.stream import read_metrics
from tests.support import small_config

SHADOWS = ("calendar", "json", "torch", "transformers", "yaml", "wandb")
EARLY = ("typing", "types", "operator")  # `python -m` itself imports these, before anything of bigtrain
COMMAND = [str(Path(sys.executable).with_name("bigtrain"))]
SHADOW = "import pathlib, sys\npathlib.Path(__file__).with_suffix('.imported').touch()\nraise SystemExit('shadow')\n"
ROWS = '''
import os, pathlib
import wandering  # beside this file

def listeners():
    """The addresses at which this process listens, as /proc/net has them."""
    mine = set()
    for entry in pathlib.Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(entry))
        except OSError:
            pass
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                yield words[1].partition(":")[0]

def rows():
    with open("listeners-" + os.environ.get("RANK", "alone"), "a") as file:
        file.write("".join(f"{address}\\n" for address in listeners()))
    for number in range(200):
        yield {"text": wandering.text(number)}
'''
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A working folder with modules that are named as libraries are, a source of its own, and a run of one stage."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(SHADOW)
    (folder / "my_rows.py").write_text(ROWS)
    (folder / "wandering.py").write_text("def text(number):\n    return f'the {number}th of some rows ' * 3\n")
    config = small_config(folder, steps=2)
    values = yaml.safe_load(config.read_text())
    values["stages"] = [values["stages"][0] | {"data": [{"source": "my_rows:rows"}], "export": False}]
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


@pytest.fixture
def early(workplace):
    """Files named as modules are that `python -m` imports first."""
    for name in EARLY:
        (workplace / f"{name}.py").write_text(SHADOW)
    yield
    for name in EARLY:
        (workplace / f"{name}.py").unlink()


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def run(folder, command, *words, verb="run"):
    done = subprocess.run(
        [*command, verb, "small.yaml", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.glob("*.imported")) == []


@pytest.mark.usefixtures("early")
def test_with_one_process_and_with_two_it_is_the_same_and_ranks_listen_to_each_other_alone(workplace):
    run(workplace, COMMAND, "name=one", "parallel.processes=1")
    for file in workplace.glob("listeners-*"):
        file.unlink()
    run(workplace, COMMAND, "name=two", f"output={workplace / 'two'}", "parallel.processes=2")
    assert losses(workplace / "two" / "two") == pytest.approx(losses(workplace / "runs" / "one"), rel=1e-6)
    found = {line for file in workplace.glob("listeners-[01]") for line in file.read_text().split()}
    assert found
    assert found <= LOOPBACK


def test_the_module_is_the_same_program(workplace):
    run(workplace, [sys.executable, "-m", "bigtrain"], "--dry-run")


@pytest.mark.soak
def test_under_torchrun_it_is_the_same(workplace):
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port()), "-m", "bigtrain"]
    run(workplace, torchrun, "name=torchrun", "output=torchrun")
    assert json.loads((workplace / "torchrun" / "torchrun" / "run.json").read_text())["attempts"][0]["world_size"] == 2


@pytest.mark.soak
@pytest.mark.usefixtures("early")
def test_launched_it_is_the_same(workplace):
    run(workplace, COMMAND, "--with", "torchrun", "--processes", "2", "name=launched", "output=launched", verb="launch")
    assert json.loads((workplace / "launched" / "launched" / "run.json").read_text())["attempts"][0]["world_size"] == 2
