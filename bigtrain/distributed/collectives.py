"""Collectives of Python values and of sums, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.config.environment import tell
from bigtrain.errors import BigtrainError, CheckpointError, ReportedError

Result = TypeVar("Result")


def from_first(action: Callable[[], Result]) -> Result:
    """Call `action` on rank 0 and return its result on every rank. Collective.

    A BigtrainError that it raises there is raised on every rank: as ReportedError, or in a world of one as it is.
    """
    result: list[Any] = [None]
    text, exit_code = "", 0
    if dist.get_rank() == 0:
        try:
            result = [action()]
        except BigtrainError as error:
            if dist.get_world_size() == 1:
                raise
            text, exit_code = str(error), error.exit_code
    end_together(text, exit_code)
    dist.broadcast_object_list(result, src=0)
    return result[0]


def end_together(text: str, exit_code: int) -> None:
    """Raises ReportedError on every rank if rank 0 has a `text`; rank 0 prints it first. Collective."""
    if text:
        tell(text, exit_code)
    reason = [(text, exit_code)]
    dist.broadcast_object_list(reason, src=0)
    if reason[0][0]:
        dist.barrier()  # all have read it: a rank may leave
        raise ReportedError(*reason[0])


def read_together(read: Callable[[], None]) -> None:
    """Let every rank read its share of a state; collective. When one of them fails, all raise: that one its own
    CheckpointError, the others one like it."""
    failed: CheckpointError | None = None
    try:
        read()
    except CheckpointError as error:
        failed = error
    if dist.get_world_size() > 1:
        reasons: list[CheckpointError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, failed)
        failed = failed or next((reason for reason in reasons if reason is not None), None)
    if failed is not None:
        raise failed


def sum_over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same keys, each tensor summed over the ranks, in one collective. All have one dtype."""
    keys = sorted(sums)
    together = torch.cat([sums[key].flatten() for key in keys])
    if dist.get_world_size() > 1:
        dist.all_reduce(together)
    parts = together.split([sums[key].numel() for key in keys])
    return {key: part.view_as(sums[key]) for key, part in zip(keys, parts, strict=True)}
