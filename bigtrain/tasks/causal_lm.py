"""Next-token prediction: the inputs of a causal language model and the sums that its logits become."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigtrain.data.batches import IGNORE


class CausalLM:
    """What pretraining and finetuning share; they differ in how documents become samples."""

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The model's arguments. Documents of a packed row are told apart by restarting positions alone:
        that needs no attention mask and no cache (transformers reads packing from `position_ids` only then)."""
        return {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "attention_mask": None,
            "use_cache": False,
        }

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each target (nats, fp32), all in one row; 0 where nothing is to be learned."""
        return F.cross_entropy(
            logits.float().flatten(0, -2), batch["targets"].flatten(), ignore_index=IGNORE, reduction="none"
        )

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        """Cross-entropy summed over the supervised targets (nats, fp32) and their number;
        outside training also how many were predicted right."""
        logits = logits.float().flatten(0, -2)
        targets = batch["targets"].flatten()
        sums = {
            "loss": F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"),
            "targets": (targets != IGNORE).sum(),
        }
        if not training:
            sums["correct"] = (logits.argmax(-1) == targets).sum()
        return sums
