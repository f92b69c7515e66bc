"""`bigtrain bench` times the steps of a user's own file and leaves nothing but the token stores."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.bench import PARTS
from tests.support import bigtrain, small_config


@pytest.mark.parametrize("engine", [pytest.param("fsdp", marks=pytest.mark.soak), "zero2"])
def test_a_stage_is_timed_and_nothing_kept(tmp_path, engine):
    config = small_config(tmp_path)
    process = bigtrain("bench", config, f"parallel.engine={engine}", "--steps", 4, "--stage", "finetune")
    assert process.returncode == 0, process.stderr
    told = process.stdout
    assert f"finetune: llama · 2 processes · {engine} · fp32 · cpu · 5 x 128 tokens a step" in told
    speed = re.search(r"([\d,]+) tokens per second, ([\d,]+) per process", told)
    assert all(float(number.replace(",", "")) > 0 for number in speed.groups())
    assert "6 N + 12 L H T = " in told and "no peak is known of this CPU" in told
    rows = {
        name: (float(ms), float(share)) for name, ms, share in re.findall(r"^  (\w+) +([\d.]+) +([\d.]+)%", told, re.M)
    }
    assert list(rows) == [*PARTS, "step"]
    for part in ("forward", "backward", "communication", "optimizer"):
        assert rows[part][1] > 0, told
    for column in (0, 1):
        assert sum(rows[part][column] for part in PARTS) == pytest.approx(
            rows["step"][column], abs=0.05 * len(PARTS) + 0.05
        )
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["stores"]
    assert process.stderr == ""


def test_unknown_stage(tmp_path):
    process = bigtrain("bench", small_config(tmp_path), "--stage", "finetnue")
    assert process.returncode == 2
    assert "did you mean `finetune`?" in process.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.soak
def test_benchmark_trains_what_a_plain_loop_and_the_trainer_train():
    script = Path(__file__).parents[2] / "benchmarks" / "throughput.py"  # refuses losses that differ
    command = [sys.executable, script, "--steps", "2", "--sizes", "1M", "--contestants", "plain,Trainer,bigtrain"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    assert re.search(r"bigtrain / plain = \d.*\n.*bigtrain / Trainer = \d", process.stdout)
