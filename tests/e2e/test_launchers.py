"""Every launcher starts the same job: the losses are those of one plain process."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import yaml

from bigtrain.launching.spawn import free_port
from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain, small_config

BIGTRAIN = [sys.executable, "-m", "bigtrain"]
STEPS = 3


def program(name):
    """A launcher as a user calls it: the script that is installed beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


def torchrun(folder):
    return [([program("torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "bigtrain"], {})]


def torchrun_on_two_nodes(folder):
    there = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [([program("torchrun"), *there, "--node-rank", str(node), "-m", "bigtrain"], {}) for node in (0, 1)]


def deepspeed(folder):
    options = ["--num_gpus", "2", "--master_port", str(free_port()), "--module", "bigtrain"]
    return [([program("deepspeed"), *options], {})]


def deepspeed_with_a_hostfile(folder):
    hostfile = folder / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    there = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [([program("deepspeed"), *there, "--node_rank", str(node), "--module", "bigtrain"], {}) for node in (0, 1)]


def accelerate(folder):
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(free_port()), "--module", "bigtrain"]
    return [([program("accelerate"), "launch", *options], {})]


def srun(folder):
    """Two tasks on one node, with the variables of srun's manual; the port, as two runs of this test may meet."""
    step = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_GTIDS": "0,1",
        "MASTER_PORT": str(free_port()),
    }
    return [(BIGTRAIN, step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}) for task in (0, 1)]


LAUNCHERS = {  # how it is started, as what it is named, and the engine
    "deepspeed-hostfile": (deepspeed_with_a_hostfile, "deepspeed", "ddp"),
    "deepspeed": (deepspeed, "deepspeed", "zero2"),
    "torchrun-nodes": (torchrun_on_two_nodes, "torchrun", "ddp"),
    "torchrun": (torchrun, "torchrun", "fsdp"),
    "accelerate": (accelerate, "accelerate launch", "fsdp"),
    "srun": (srun, "srun", "ddp"),
}
LONG = ("deepspeed", "deepspeed-hostfile", "torchrun", "accelerate")  # run with the long tests
NAMES = [pytest.param(name, marks=pytest.mark.soak if name in LONG else ()) for name in LAUNCHERS]


def words(config, name, processes, engine="ddp"):
    return ["run", str(config), f"name={name}", f"parallel.processes={processes}", f"parallel.engine={engine}"]


def run(folder, commands, arguments):
    """Start `commands` at the same time, each with the arguments; returns their output together."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, *arguments],
            env=environment | variables,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, variables in commands
    ]
    try:
        with ThreadPoolExecutor(len(started)) as threads:
            output = "\n".join(threads.map(lambda process: process.communicate(timeout=300)[0], started))
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), output
    return output


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(folder of all runs, a function that gives what a launcher has printed); they share the token stores."""
    folder = tmp_path_factory.mktemp("launchers")
    config = small_config(folder, steps=STEPS)
    values = yaml.safe_load(config.read_text())
    values["stages"] = [values["stages"][0] | {"export": False}]
    values["parallel"]["device"] = "cpu"
    config.write_text(yaml.safe_dump(values, sort_keys=False))

    @cache
    def output(name):
        if name in LAUNCHERS:
            commands, _, engine = LAUNCHERS[name]
            return run(folder, commands(folder), words(config, name, 3, engine))
        done = bigtrain(*words(config, name, {"one": 1, "bigtrain": 2}[name]), cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    output("one")
    return folder / "runs", output


def losses(folder):
    return {(row["kind"], row["step"]): row["loss"] for row in read_metrics(folder)}


@pytest.mark.parametrize("name", ["bigtrain", *NAMES])
def test_the_losses_are_those_of_one_process(launched, name):
    folder, output = launched
    output(name)
    expected = losses(folder / "one")
    assert list(expected) == [("evaluation", 0), ("step", 1), ("step", 2), ("step", 3), ("evaluation", 3)]
    assert losses(folder / name) == pytest.approx(expected, rel=1e-6)
    assert json.loads((folder / name / "run.json").read_text())["attempts"][0]["world_size"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_that_overrides_the_number_of_processes_is_told(launched, name):
    _, output = launched
    says = LAUNCHERS[name][1]
    assert output(name).count(f"processes: 2, as {says} says; parallel.processes: 3 does not count there") == 1


def test_who_decided_the_number_of_processes_without_a_launcher(launched):
    _, output = launched
    assert "processes: 1, as parallel.processes says\n" in output("one")
    assert "processes: 2, as parallel.processes says\n" in output("bigtrain")


def test_the_speed_of_the_network_is_told(launched):
    folder, output = launched
    output("srun")
    events = [json.loads(line) for line in (folder / "srun" / "events.jsonl").read_text().splitlines()]
    (network,) = [event for event in events if event["kind"] == "network"]
    assert (network["processes"], network["hosts"]) == (2, 1)
    assert 1e6 < network["bus_bytes_per_second"] < 1e12
    assert 1e-6 < network["latency_seconds"] < 1
    assert output("srun").count("network: all-reduce ") == 1
    assert " us over 2 processes on 1 host\n" in output("srun")
    assert "network:" not in output("one")
