"""Under torchrun's elastic agent a run goes on without a human when it loses a rank, or a node."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bigtrain.launching.spawn import free_port
from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain, small_config

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
STEPS = 60
QUICK = "last_call_timeout=6,keep_alive_interval=1,keep_alive_max_attempt=2"  # to notice that a node is lost


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the run's file, the losses of the run that nothing interrupts)."""
    folder = tmp_path_factory.mktemp("elastic")
    config = small_config(folder, steps=STEPS, every=10)
    values = yaml.safe_load(config.read_text())
    values["stages"] = [values["stages"][0] | {"export": False, "evaluate": None, "held_out": 0.0}]
    values["parallel"] |= {"device": "cpu", "engine": "fsdp"}
    config.write_text(yaml.safe_dump(values))
    finished = bigtrain("run", config, "name=whole")
    assert finished.returncode == 0, finished.stderr
    return config, losses(folder / "runs" / "whole")


def losses(folder):
    return [row["loss"] for row in read_metrics(folder) if row["kind"] == "step"]


def agent(config, name, *options):
    return subprocess.Popen(
        [TORCHRUN, *options, "-m", "bigtrain", "run", str(config), f"name={name}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(folder, process):
    """Until two ranks train, and the run has saved."""
    while not list(folder.glob("pretrain/checkpoints/step-*/manifest.json")) or attempts(folder)[-1] != 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def ranks_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def attempts(folder):
    metadata = json.loads((folder / "run.json").read_text())
    return [attempt["world_size"] for attempt in metadata["attempts"]]


def resumed_at(output):
    return [int(step) for step in re.findall(r"resumed at step (\d+)", output)]


@pytest.mark.soak
def test_a_rank_is_lost(whole):
    config, expected = whole
    folder = config.parent / "runs" / "rank"
    run = agent(config, "rank", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    wait_for_checkpoint(folder, run)
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert attempts(folder) == [2, 2]
    assert len(resumed_at(output)) == 1
    assert losses(folder) == expected


def test_replicas_that_cannot_shrink_are_told(whole):
    config, _ = whole
    left = {"RANK": "0", "WORLD_SIZE": "1"}
    refused = bigtrain("run", config, "name=replicas", "parallel.replicate=2", variables=left)
    assert refused.returncode == 2
    assert "parallel.replicate: 1 as the number of processes is no multiple of 2" in refused.stderr
    assert not (config.parent / "runs" / "replicas").exists()


def test_a_node_is_lost(whole):
    """The node that is lost is not the one where the nodes meet; the other goes on alone."""
    config, expected = whole
    folder = config.parent / "runs" / "node"
    rendezvous = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    rendezvous += ["--rdzv-id", "bigtrain", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    host = agent(config, "node", *rendezvous, "--rdzv-conf", f"{QUICK},is_host=1")
    lost = agent(config, "node", *rendezvous, "--rdzv-conf", f"{QUICK},is_host=0")
    wait_for_checkpoint(folder, host)
    for pid in (lost.pid, *ranks_of(lost)):  # a node takes all with it
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    output, _ = host.communicate(timeout=180)
    assert host.returncode == 0, output
    assert attempts(folder)[-2:] == [2, 1]  # on a slow machine the host may begin alone
    assert resumed_at(output)
    assert losses(folder) == pytest.approx(expected, rel=1e-6)
