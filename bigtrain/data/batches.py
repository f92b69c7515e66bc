"""batches(step): one rank's share of a global batch, as a pure function of (stores, seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORE = -100  # a target with this id is not trained on


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    tensors: `input_ids`, `targets` (already shifted; IGNORE where nothing is to be learned) and
        `position_ids` (restart at each document), int64 of shape (rows, length), on the CPU.
        A rank may have no rows: then the shape is (0, length).
    rows: sequences in the whole global batch, over all ranks.
    step: the step that the batch belongs to; seeds dropout.
    """

    tensors: dict[str, Tensor]
    rows: int
    step: int
