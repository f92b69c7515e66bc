"""A run that is killed and started again ends where an uninterrupted one ends, to the last bit."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bigtrain.checkpoint import complete
from bigtrain.observability.stream import read_metrics
from tests.forked import start_command
from tests.support import assert_same_end, bigtrain, final_state, numbers, run, small_config

STEPS = 16


def kill_after_step(command, folder, stage, step):
    """SIGKILL the launcher as soon as its run has reported a step; its ranks must end with it."""
    process = start_command(*command)
    while process.poll() is None and not reported(folder, stage, step):
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0, "the run ended before it could be killed"
    process.stdout.read()  # ends when the last rank has ended, for they hold the pipe


def reported(folder, stage, step):
    if not (folder / "metrics.jsonl").exists():
        return False
    rows = [r for r in read_metrics(folder) if r["stage"] == stage and r["kind"] == "step"]
    return bool(rows) and rows[-1]["step"] >= step


@pytest.mark.parametrize(
    "engine", ["fsdp", *(pytest.param(engine, marks=pytest.mark.soak) for engine in ("ddp", "zero1", "zero2", "zero3"))]
)
def test_killed_in_each_stage_and_started_again(tmp_path, engine):
    """With packing, shuffling, accumulation, dropout, evaluation and a moving average of the weights."""
    killed_in_each_stage(tmp_path, [f"parallel.engine={engine}"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_killed_on_gpus_and_started_again(tmp_path, engine):
    killed_in_each_stage(tmp_path, [f"parallel.engine={engine}", "parallel.processes=auto", "precision=bf16"])


def killed_in_each_stage(tmp_path, overrides):
    config = small_config(tmp_path, steps=STEPS, every=4, dropout=0.1, ema=0.9, deterministic=True)
    run(config, *overrides, "name=whole")
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    for stage, step in (("pretrain", 6), ("finetune", 5)):
        kill_after_step(["run", str(config), *overrides, "name=broken"], broken, stage, step)
    assert "pretrain   is finished" in run(config, *overrides, "name=broken")
    assert_same_end(broken, whole, STEPS)
    for stage, peak in (("pretrain", 3e-3), ("finetune", 1e-3)):  # cosine from the peak to a tenth of it
        rates = [row["lr"] for row in read_metrics(broken) if row["stage"] == stage and row["kind"] == "step"]
        cosine = [math.cos(math.pi * (step + 1) / STEPS) for step in range(STEPS)]
        assert rates == pytest.approx([peak * (0.55 + 0.45 * value) for value in cosine], rel=1e-12)
    exported = bigtrain("export", broken, "--ema", "--dtype", "fp32")
    assert exported.stdout.strip() == str(broken / "finetune" / "export-ema"), exported.stderr
    weights = load_file(broken / "finetune" / "export-ema" / "model.safetensors")
    averages = final_state(broken, "finetune")[1]
    assert all(torch.equal(tensor, averages[name, "ema"]) for name, tensor in weights.items())


@pytest.mark.soak
def test_another_engine_and_world_size_take_over(tmp_path):
    config = small_config(tmp_path, steps=12, every=4)
    run(config, "name=whole", "parallel.engine=zero2")
    kill_after_step(
        ["run", str(config), "name=moved", "parallel.engine=zero2"], tmp_path / "runs" / "moved", "pretrain", 5
    )
    run(config, "name=moved", "parallel.engine=fsdp", "parallel.processes=3")
    moved, whole = numbers(tmp_path / "runs" / "moved"), numbers(tmp_path / "runs" / "whole")
    assert [row[:3] for row in moved] == [row[:3] for row in whole]
    for row, expected in zip(moved, whole, strict=True):
        assert row[3] == pytest.approx(expected[3], rel=1e-6)
        assert row[4] == expected[4]


def stop_after_step(config, folder, step, send):
    """Ask a run to stop once it has reported a step; returns (its output, the newest checkpoint's name)."""
    command = [sys.executable, "-m", "bigtrain", "run", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not reported(folder, "pretrain", step):
        time.sleep(0.01)
    send(process)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert (folder / "preempted").exists()
    assert errors == ""
    return output, complete(folder / "pretrain" / "checkpoints")[-1].name


@pytest.mark.soak
def test_asked_to_stop_it_saves_and_goes_on_when_started_again(tmp_path):
    """The command is asked the first time, then one of its ranks alone: all of them stop after the same step."""
    config = small_config(tmp_path)
    changes = {"steps": 100_000, "schedule": {"name": "constant"}, "checkpoint": {}, "evaluate": None, "held_out": 0.0}
    values = yaml.safe_load(config.read_text())
    values["stages"] = [values["stages"][0] | changes]
    config.write_text(yaml.safe_dump(values))
    folder = tmp_path / "runs" / "small"

    output, first = stop_after_step(config, folder, 3, lambda process: process.send_signal(signal.SIGTERM))
    assert f"asked to stop: saved at step {int(first.removeprefix('step-'))} of pretrain; start it again" in output

    def ask_last_rank(process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[-1]), signal.SIGUSR1)

    begun = int(first.removeprefix("step-"))
    output, second = stop_after_step(config, folder, begun + 3, ask_last_rank)
    assert f"resumed at step {begun}" in output
    ended = int(second.removeprefix("step-"))
    run(config, "name=whole", f"stages.pretrain.steps={ended}", "stages.pretrain.export=false")
    assert numbers(folder) == numbers(tmp_path / "runs" / "whole")
