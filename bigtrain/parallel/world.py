"""The processes of a run: who this one is, and the group it talks in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bigtrain.config.environment import PROCESSES_WHY
from bigtrain.errors import ConfigError


@dataclass(frozen=True)
class World:
    """rank and size over all nodes; local_rank on this node; device is the one that this process computes on;
    chosen says in words what was decided for the user, and why."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    chosen: tuple[str, ...] = ()


@contextmanager
def joined(device: str, precision: str) -> Iterator[World]:
    """Join the process group that the launcher's environment names; without one, be a world of one.

    `device` is auto, cpu or cuda. Raises ConfigError for a device that is not there, or cannot do `precision`.
    """
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device, precision, local_rank, gpus=torch.cuda.device_count())
    os.environ.setdefault("DS_ACCELERATOR", chosen.type)  # DeepSpeed would guess, and say so, when it is imported
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    store = dist.HashStore() if size == 1 else None  # a world of one needs no address
    dist.init_process_group(backend, rank=rank, world_size=size, store=store)
    try:
        yield World(rank, size, local_rank, chosen, (_why_device(device, chosen), _why_processes(size)))
    except BaseException:
        if size == 1:
            dist.destroy_process_group()
        raise  # of several ranks the group stays: without it the others would fail before this one has told why
    dist.destroy_process_group()


def _why_device(asked: str, chosen: torch.device) -> str:
    if asked != "auto":
        return f"device: {chosen.type}, as parallel.device says"
    return f"device: {chosen.type}, as this machine has {'a' if chosen.type == 'cuda' else 'no'} GPU"


def _why_processes(size: int) -> str:
    if PROCESSES_WHY in os.environ:
        return f"processes: {size}, {os.environ[PROCESSES_WHY]}"
    return f"processes: {size}, " + ("as the launcher says" if "RANK" in os.environ else "as parallel.processes says")


def choose_device(device: str, precision: str, local_rank: int, gpus: int) -> torch.device:
    """What a process computes on, on a machine that shows `gpus`. Raises ConfigError as `joined` does."""
    if device == "cuda" and not gpus:
        raise ConfigError("parallel.device: cuda was asked for, but this machine shows no GPU; use auto or cpu.")
    if device == "cpu" or not gpus:
        if precision == "fp16":
            raise ConfigError("precision: fp16 needs a GPU, and this run computes on the CPU; use bf16 or fp32.")
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ConfigError(
            f"parallel.processes: more processes than GPUs: this machine has {gpus}, and process {local_rank} has none "
            f"of its own. Start {gpus}, or set parallel.device: cpu."
        )
    return torch.device("cuda", local_rank)
