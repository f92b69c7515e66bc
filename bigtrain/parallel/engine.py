"""The step contract: what every engine promises, and the pieces of a step that all engines share.

- The task's weight (supervised targets, or rows) is summed over the ranks before the first backward.
- Every rank runs the same number of micro-batches of the same shape; missing rows are dummies without weight.
- Gradients are those of (sum of the loss over the global batch) / (weight of the global batch).
- The gradient norm is the global one, before clipping.
- bf16 and fp16 cast the parameters for forward and backward; master weights, moments, gradient
  accumulation, reduction and loss are fp32. No autocast.
- A parameter without `requires_grad` stays as it is: it is kept as it is computed with, without a master and moments,
  and has no part in the gradient norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigtrain.data.batches import Batch
from bigtrain.distributed.collectives import sum_over_ranks
from bigtrain.parallel.micro_batches import micro_batches
from bigtrain.state import BUFFER, WEIGHT, Box, StateReader

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Flags(NamedTuple):
    """What a rank tells all others in a step.

    stop, save: it was asked to stop, to save. busy: it is still writing a checkpoint.
    """

    stop: bool = False
    save: bool = False
    busy: bool = False


class Outcome(NamedTuple):
    """What a step did, the same on every rank; scalars on the engine's device, read by the host when it likes.

    loss: its sum over the global batch divided by the weight, float64.
    weight: of the global batch, as the task counts it (supervised targets, or rows), float64.
    grad_norm: 2-norm of the whole gradient before clipping, float32.
    flags: how many ranks set each of `Flags` before this step, float64 of shape (len(Flags._fields),).
    """

    loss: Tensor
    weight: Tensor
    grad_norm: Tensor
    flags: Tensor


NO_FLAGS = Flags()


class Engine(Protocol):
    """Runs steps and holds this rank's share of the state. Two implementations: torch mesh and DeepSpeed."""

    def step(self, batch: Batch, lr: float, flags: Flags = NO_FLAGS) -> Outcome:
        """One optimizer update with learning rate `lr`. All ranks get the sum of `flags`."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """The task's sums over all rows of all batches and all ranks, without dropout: float64, on the CPU."""
        ...

    def boxes(self) -> Iterator[Box]:
        """This rank's share of what training changes: over all ranks, each element of each slot exactly once."""
        ...

    def not_finite(self) -> list[str]:
        """The weights, frozen ones too, and slots in which any rank has a number that is not finite, by name;
        collective."""
        ...

    def load(self, reader: StateReader, progress: dict[str, float]) -> None:
        """Take weights, and optimizer slots where the reader has them, and the scalars of `progress()`."""
        ...

    def progress(self) -> dict[str, float]:
        """The scalars that stand beside the weights: `updates` done by the optimizer, `loss_scale` in fp16."""
        ...

    def close(self) -> None:
        """Let go of the model, so that the process group can be torn down."""
        ...


def reduce_before_step(weight: Tensor, flags: Flags, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight of the global batch, how many ranks set each of `flags`): float64 on `device`, a scalar and a vector, the
    same on every rank. weight: of this rank's rows, a scalar on the CPU."""
    counts = torch.cat([weight[None], weight.new_tensor(flags)]).to(device, torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts[0], counts[1:]


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the parameters that do not train in the precision in which the model computes."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def moments_of(reader: StateReader, name: str) -> list[str]:
    """The optimizer's slots that a reader has of a parameter."""
    return [slot for slot in reader.slots_of(name) if slot not in (WEIGHT, BUFFER)]


def not_finite(boxes: Iterable[Box], dtype: torch.dtype) -> list[str]:
    """The weights and slots in which any rank has a number that is not finite, by name; collective.

    dtype: in which the model computes; a weight has to be finite there too. Buffers are left out: a mask may be
    infinite.
    """
    trained = [box for box in boxes if box.slot != BUFFER]
    bad: list[str] = []
    if trained:
        extremes = torch.stack([torch.stack(box.tensor.aminmax()) for box in trained])  # (boxes, 2); nan if any is
        for box, largest in zip(trained, extremes.abs().amax(1).tolist(), strict=True):
            limit = torch.finfo(dtype if box.slot == WEIGHT else torch.float32).max
            if not largest <= limit:
                bad.append(box.name if box.slot == WEIGHT else f"{box.slot} of {box.name}")
    everyone: list[list[str]] = [bad]
    if dist.get_world_size() > 1:
        everyone = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, bad)
    return list(dict.fromkeys(itertools.chain(*everyone)))


def evaluate(
    module: nn.Module,
    batches: Iterable[Batch],
    micro_batch_size: int,
    data_size: int,
    device: torch.device,
    **shape: bool,
) -> dict[str, Tensor]:
    """`Engine.evaluate` for any module that maps a micro-batch to sums; `shape`: as `micro_batches` takes it."""
    was_training = module.training
    module.eval()
    totals: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            for micro in micro_batches(batch, micro_batch_size, data_size, **shape):
                sums = module({key: tensor.to(device, non_blocking=True) for key, tensor in micro.items()})
                for key, value in sums.items():
                    value = value.detach().to(torch.float64)
                    totals[key] = totals[key] + value if key in totals else value
    module.train(was_training)
    return {key: value.cpu() for key, value in sum_over_ranks(totals).items()}


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make a step's random draws a function of (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)
