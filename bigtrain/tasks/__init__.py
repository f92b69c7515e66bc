"""What a batch means: how documents become samples, the model's inputs, the loss as sums, the metrics."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from bigtrain.data.prepare import Encoder
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.tasks.sft import Sft


class Task(Encoder, Protocol):
    """A task never calls the model; the engine does, with what `inputs` gives."""

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments for the model's forward."""
        ...

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What each target adds to `loss`, of shape (targets of the batch,)."""
        ...

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        """Scalars that add up over tokens, rows and ranks: `loss` (differentiable), `targets`, and metrics.

        logits: (..., vocabulary) for the tensors of `batch`, (...): whole rows, or some tokens of them.
        """
        ...


TASKS: dict[str, type[Task]] = {"pretrain": Pretrain, "sft": Sft}
