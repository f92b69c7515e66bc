"""Which device a process computes on; the machines of these tests are named by their number of GPUs."""

import subprocess
import sys

import pytest
import torch

from bigtrain.distributed.world import choose_device
from bigtrain.errors import ConfigError


def test_each_process_takes_its_own_gpu():
    assert choose_device("auto", "fp16", 3, gpus=8) == torch.device("cuda", 3)
    assert choose_device("cuda", "bf16", 0, gpus=1) == torch.device("cuda", 0)


def test_without_gpus_or_by_choice_it_is_the_cpu():
    assert choose_device("auto", "bf16", 3, gpus=0) == torch.device("cpu")
    assert choose_device("cpu", "fp32", 9, gpus=8) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "precision", "local_rank", "gpus", "message"),
    [
        ("auto", "bf16", 8, 8, r"parallel.processes: more processes than GPUs: this machine has 8"),
        ("cuda", "bf16", 0, 0, "parallel.device: cuda was asked for"),
        ("auto", "fp16", 0, 0, "precision: fp16 needs a GPU"),
        ("cpu", "fp16", 0, 8, "precision: fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_had_is_refused(device, precision, local_rank, gpus, message):
    with pytest.raises(ConfigError, match=message):
        choose_device(device, precision, local_rank, gpus)


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_a_variable_that_hides_the_gpus_is_named(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=rf"shows no GPU with CUDA_VISIBLE_DEVICES={visible}; use auto or cpu"):
        choose_device("cuda", "bf16", 0, gpus=0)


DETERMINISTIC = """
import os
from bigtrain.distributed.world import DETERMINISTIC, use_deterministic_kernels

use_deterministic_kernels()
import torch
import torch._inductor.config

assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
assert not torch.utils.deterministic.fill_uninitialized_memory
assert torch._inductor.config.deterministic
assert os.environ.items() >= DETERMINISTIC.items()
"""


def test_deterministic_kernels():
    """In a process of its own: they stay chosen."""
    subprocess.run([sys.executable, "-c", DETERMINISTIC], check=True)


@pytest.mark.parametrize("local_rank", range(8))
def test_a_process_that_is_shown_one_gpu_takes_it(local_rank):
    """As `srun --gpus-per-task=1` and wrappers of mpirun show it."""
    assert choose_device("auto", "bf16", local_rank, gpus=1) == torch.device("cuda", 0)
    assert choose_device("cuda", "fp16", local_rank, gpus=1) == torch.device("cuda", 0)
