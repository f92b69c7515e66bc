"""Next-token prediction: the inputs of a causal language model and the sums that its logits become."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bigtrain.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor


class CausalLM(Task):
    """What pretraining and finetuning share; they differ in how documents become samples."""

    model_kind = "causal_lm"
    sums_over = "tokens"
    generates = True

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The model's arguments. Documents of a packed row are told apart by restarting positions alone:
        that needs no attention mask and no cache (transformers reads packing from `position_ids` only then)."""
        return {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "attention_mask": None,
            "use_cache": False,
        }

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """The number of supervised targets."""
        from bigtrain.data.types import IGNORE

        return (batch["targets"] != IGNORE).sum()

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each target (nats, fp32), all in one row; 0 where nothing is to be learned."""
        import torch.nn.functional as F

        from bigtrain.data.types import IGNORE

        return F.cross_entropy(
            logits.float().flatten(0, -2), batch["targets"].flatten(), ignore_index=IGNORE, reduction="none"
        )

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        """Cross-entropy summed over the supervised targets (nats, fp32) and their number;
        outside training also how many were predicted right."""
        import torch.nn.functional as F

        from bigtrain.data.types import IGNORE

        logits = logits.float().flatten(0, -2)
        targets = batch["targets"].flatten()
        sums = {
            "loss": F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"),
            "targets": (targets != IGNORE).sum(),
        }
        if not training:
            sums["correct"] = (logits.argmax(-1) == targets).sum()
        return sums

    def metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """loss: nats per target. accuracy: part of the targets that were the likeliest token. targets: their number."""
        targets = sums["targets"].item()
        loss = sums["loss"].item() / targets if targets else math.nan
        accuracy = sums["correct"].item() / targets if targets else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": accuracy,
            "targets": int(targets),
        }
