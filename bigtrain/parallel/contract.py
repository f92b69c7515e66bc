"""The step contract: what every engine promises, and the pieces of a step that all engines share.

- Targets are counted and summed over the ranks before the first backward.
- Every rank runs the same number of micro-batches of the same shape; missing rows are dummies without targets.
- Gradients are those of (sum of the loss over the global batch) / (targets in the global batch).
- The gradient norm is the global one, before clipping.
- bf16 and fp16 cast the parameters for forward and backward; master weights, moments, gradient
  accumulation, reduction and loss are fp32. No autocast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigtrain.data.batches import IGNORE, Batch
from bigtrain.state import Box, Reader

if TYPE_CHECKING:
    from bigtrain.tasks import Task

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Outcome(NamedTuple):
    """What a step did, the same on every rank; scalars on the engine's device, read by the host when it likes.

    loss: mean over the supervised targets of the global batch, float64.
    targets: their number, float64.
    grad_norm: 2-norm of the whole gradient before clipping, float32.
    """

    loss: Tensor
    targets: Tensor
    grad_norm: Tensor


class Engine(Protocol):
    """Runs steps and holds this rank's share of the state. Two implementations: torch mesh and DeepSpeed."""

    def step(self, batch: Batch, lr: float) -> Outcome:
        """One optimizer update with learning rate `lr`."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's sums over all rows of all batches and all ranks, without dropout."""
        ...

    def boxes(self) -> Iterator[Box]:
        """This rank's share: over all ranks, each element of each slot exactly once."""
        ...

    def load(self, reader: Reader, progress: dict[str, float]) -> None:
        """Take weights, and optimizer slots where the reader has them, and the scalars of `progress()`."""
        ...

    def progress(self) -> dict[str, float]:
        """The scalars that stand beside the weights: `updates` done by the optimizer, `loss_scale` in fp16."""
        ...

    def close(self) -> None:
        """Let go of the model, so that the process group can be torn down."""
        ...


class TaskModule(nn.Module):
    """Model and task as one module, so that an engine owns forward and backward: batch in, sums out."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = self.model(**self.task.inputs(batch))
        return self.task.sums(output, batch, training=self.training)


def micro_batches(batch: Batch, size: int, world_size: int) -> list[dict[str, Tensor]]:
    """Split a rank's rows into micro-batches: as many, of the same shape, on every rank.

    With fewer rows per rank than `size`, micro-batches shrink to what the fullest rank has.
    """
    fullest = -(-batch.rows // world_size)
    size = min(size, fullest)
    count = -(-fullest // size)
    tensors = {key: _padded(key, tensor, count * size) for key, tensor in batch.tensors.items()}
    return [{key: tensor[i * size : (i + 1) * size] for key, tensor in tensors.items()} for i in range(count)]


def _padded(key: str, tensor: Tensor, rows: int) -> Tensor:
    missing, length = rows - tensor.shape[0], tensor.shape[1]
    if missing == 0:
        return tensor
    if key == "position_ids":
        dummy = torch.arange(length, dtype=tensor.dtype).expand(missing, length)
    else:
        dummy = torch.full((missing, length), IGNORE if key == "targets" else 0, dtype=tensor.dtype)
    return torch.cat([tensor, dummy])


def count_targets(batch: Batch, device: torch.device) -> Tensor:
    """Supervised targets of the global batch: a float64 scalar on `device`, the same on every rank."""
    count = (batch.tensors["targets"] != IGNORE).sum().to(device, torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(count)
    return count


def sum_over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same keys, each scalar summed over the ranks, in one collective."""
    keys = sorted(sums)
    together = torch.stack([sums[key] for key in keys])
    if dist.get_world_size() > 1:
        dist.all_reduce(together)
    return dict(zip(keys, together.unbind(), strict=True))


def evaluate(
    module: nn.Module, batches: Iterable[Batch], micro_batch_size: int, device: torch.device
) -> dict[str, float]:
    """`Engine.evaluate` for any module that maps a micro-batch to sums."""
    was_training = module.training
    module.eval()
    totals: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            for micro in micro_batches(batch, micro_batch_size, dist.get_world_size()):
                sums = module({key: tensor.to(device, non_blocking=True) for key, tensor in micro.items()})
                for key, value in sums.items():
                    value = value.detach().to(torch.float64)
                    totals[key] = totals[key] + value if key in totals else value
    module.train(was_training)
    return {key: value.item() for key, value in sum_over_ranks(totals).items()}


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make a step's random draws a function of (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the state: those that the model's state dict has.

    Found without asking for that dict, which would make FSDP reshard on the rank that asks.
    """
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
