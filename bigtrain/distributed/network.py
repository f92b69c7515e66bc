"""How fast the ranks talk to each other, measured in a moment."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

CPU_BYTES, GPU_BYTES = 16 << 20, 64 << 20
SECONDS = 0.15  # for the large all-reduces, of which there are 1 to ROUNDS
ROUNDS = 8


@dataclass(frozen=True)
class Network:
    """Medians of all-reduces. The bandwidth is what each link has to carry, whatever the number of ranks n: 2 (n-1) / n
    times the bytes of the tensor per second, as nccl-tests defines it
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, bus bandwidth of all-reduce)."""

    bus_bytes_per_second: float
    latency_seconds: float
    processes: int
    hosts: int


def measure(device: torch.device, hosts: int) -> Network:
    """All-reduce one number and some MiB, several times each. Collective; takes less than half a second."""
    size = dist.get_world_size()
    number = torch.zeros(1, device=device)
    large = torch.zeros((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    for tensor in (number, number):  # the first makes connections
        _seconds(tensor)
    latency = statistics.median(_seconds(number) for _ in range(20))
    slowest = torch.tensor([_seconds(large)], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    rounds = min(ROUNDS, max(1, int(SECONDS / slowest.item())))
    seconds = statistics.median(_seconds(large) for _ in range(rounds))
    return Network(2 * (size - 1) / size * large.nbytes / seconds, latency, size, hosts)


def _seconds(tensor: torch.Tensor) -> float:
    """Of one all-reduce, to the end."""
    begun = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - begun
