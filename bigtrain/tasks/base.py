"""What every task declares and computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bigtrain.data.prepare import Encoder

if TYPE_CHECKING:
    from torch import Tensor

Sums = dict[str, "Tensor"]


class Task(Encoder, Protocol):
    """A task never calls the model; the engine does, with what `inputs` gives.

    model_kind: which model and head it needs (`bigtrain.models.kinds`). sums_over: what its sums add up over; of
    `tokens` the engine may compute logits and sums some tokens at a time, of `rows` it gives whole rows.
    """

    model_kind: str
    sums_over: Literal["tokens", "rows"]

    @property
    def model_values(self) -> Mapping[str, Any]:
        """What of the model's configuration follows from the task, like its labels."""
        ...

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments for the model's forward."""
        ...

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """What the loss is divided by, of these rows: a scalar that adds up over rows and ranks."""
        ...

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What each of `batch["targets"]` adds to `loss`, in one row, fp32; 0 where nothing is to be learned."""
        ...

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> Sums:
        """Tensors of fixed shapes that add up over tokens, rows and ranks: `loss` (a scalar, differentiable), and
        outside training all that `metrics` needs.

        logits: (..., classes) for the tensors of `batch`, (...): whole rows, or some tokens of them.
        """
        ...

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` and other numbers, from the sums (float64) over all that is evaluated."""
        ...
