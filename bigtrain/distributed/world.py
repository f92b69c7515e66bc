"""The processes of a run: who this one is, and the group it talks in."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from bigtrain.config.environment import PROCESSES_WHY, join_seconds, shown
from bigtrain.distributed import consistency
from bigtrain.distributed.network import Network, measure
from bigtrain.distributed.rendezvous import INTERFACES, first_line, on_one_host, rendezvous
from bigtrain.errors import BigtrainError, ConfigError, ReportedError


@dataclass(frozen=True)
class World:
    """rank and size over all nodes; local_rank on this node; device is the one that this process computes on;
    chosen says in words what was decided for the user, and why. network and store (of the rendezvous, for keys of later
    watchers) are None in a world of one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    chosen: tuple[str, ...] = ()
    network: Network | None = None
    store: dist.Store | None = None


@contextmanager
def joined(
    device: str, precision: str, metadata: Mapping[str, str] | None = None, deterministic: bool = False
) -> Iterator[World]:
    """Join the process group that the launcher's environment names; without one, be a world of one.

    device: auto, cpu or cuda. metadata: must be the same on all ranks (`consistency.in_common`). deterministic: use
    only kernels that give the same bits every time.

    Raises ConfigError for a device that is not there, or cannot do `precision`; ReportedError when ranks are missing or
    differ; BigtrainError when they cannot reach each other.
    """
    if deterministic:
        use_deterministic_kernels()
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device, precision, local_rank, gpus=torch.cuda.device_count())
    os.environ.setdefault("DS_ACCELERATOR", chosen.type)  # DeepSpeed would guess, and say so, when it is imported
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
            os.environ[name] = str(chosen.index)  # by which DeepSpeed chooses its device
    why = os.environ.get(PROCESSES_WHY, "")
    network, store = _form(rank, size, chosen, dict(metadata or {}))
    words = (_why_device(device, chosen), f"processes: {size}{', ' if why else ''}{why}")
    try:
        yield World(rank, size, local_rank, chosen, words, network, store)
    except BaseException as error:
        if size == 1 or isinstance(error, ReportedError):
            dist.destroy_process_group()
        raise  # of several ranks the group stays: without it the others would fail before this one has told why
    dist.destroy_process_group()


def _form(
    rank: int, size: int, device: torch.device, metadata: dict[str, str]
) -> tuple[Network, dist.Store] | tuple[None, None]:
    """Form the process group once all ranks are there and agree, and try how fast it is."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # it needs no address
        return None, None
    metadata |= {consistency.SIZE: str(size), consistency.DEVICE: device.type}
    store, hosts = rendezvous(rank, size, metadata, consistency.differences_among, gpu=gpu_identity(device))
    if on_one_host() and LOOPBACK in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)  # it listens where the other ranks are, and nobody else
    try:
        patience = timedelta(seconds=join_seconds()) if backend == "gloo" else None  # NCCL's own is ten minutes
        dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=patience)
        network = measure(device, hosts)
    except RuntimeError as error:  # torch's own and gloo's
        raise BigtrainError(
            f"rank {rank} on {platform.node()} cannot talk to the other ranks over {backend}: {first_line(error)}. "
            f"{INTERFACES} `ip -brief address` lists them. Check that no firewall stands between the hosts, and look "
            "for what the other ranks say."
        ) from None
    if patience is not None:  # was for forming the group; its collectives get torch's usual time
        assert dist.group.WORLD is not None
        dist.group.WORLD.set_timeout(default_pg_timeout)
    return network, store


def _why_device(asked: str, chosen: torch.device) -> str:
    if asked != "auto":
        return f"device: {chosen.type}, as parallel.device says"
    if chosen.type == "cuda":
        return "device: cuda, as this machine has a GPU"
    return f"device: cpu, as this machine has no GPU{_hiding()}"


def _hiding() -> str:
    """What may hide GPUs, in words; empty if nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" with CUDA_VISIBLE_DEVICES={shown(visible)}"


LOOPBACK = "lo"  # the interface's name on Linux
DETERMINISTIC = {  # of cuBLAS, transformers (for flash attention) and PyTorch's compiler
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}


def use_deterministic_kernels() -> None:
    """Let this process compute with kernels that give the same bits every time; to be called before the device is used.

    An operation that has no such kernel raises RuntimeError. Source: PyTorch's notes on reproducibility.
    """
    os.environ |= DETERMINISTIC
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no step reads any
    torch.backends.cudnn.benchmark = False


def choose_device(device: str, precision: str, local_rank: int, gpus: int) -> torch.device:
    """What a process computes on, on a machine that shows `gpus`. Raises ConfigError as `joined` does."""
    if device == "cuda" and not gpus:
        raise ConfigError(
            f"parallel.device: cuda was asked for, but this machine shows no GPU{_hiding()}; use auto or cpu."
        )
    if device == "cpu" or not gpus:
        if precision == "fp16":
            raise ConfigError("precision: fp16 needs a GPU, and this run computes on the CPU; use bf16 or fp32.")
        return torch.device("cpu")
    if gpus == 1:  # a launcher may show each process a GPU of its own; whether two share one, the ranks will tell
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise ConfigError(
            f"parallel.processes: more processes than GPUs: this machine has {gpus}, and process {local_rank} has none "
            f"of its own. Start {gpus}, or set parallel.device: cpu."
        )
    return torch.device("cuda", local_rank)


def gpu_identity(device: torch.device) -> str | None:
    """What tells a GPU from the others of its host; None for a CPU."""
    if device.type != "cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    part = visible[device.index] if len(visible) > device.index else ""
    # the parts of a GPU that is divided (MIG) may share its id
    return part if part.startswith("MIG-") else str(torch.cuda.get_device_properties(device).uuid)
