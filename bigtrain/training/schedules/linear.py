"""A straight line down."""

from __future__ import annotations

from typing import Literal

from bigtrain.config.core import mathematics
from bigtrain.training.schedules import Decaying


class Linear(Decaying):
    """min_ratio + (1 - min_ratio) * (1 - x), where x rises to 1 in the last step."""

    name: Literal["linear"] = mathematics("Decay along a line after the warm-up.", "linear")

    def after_warmup(self, step: int, steps: int) -> float:
        return self.between(1 - min(1.0, (step + 1) / max(1, steps)))
