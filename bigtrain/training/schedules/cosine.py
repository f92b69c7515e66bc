"""Half a period of a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""

from __future__ import annotations

import math
from typing import Literal

from bigtrain.config.core import mathematics
from bigtrain.training.schedules import Decaying


class Cosine(Decaying):
    """min_ratio + (1 - min_ratio) * (1 + cos(pi * x)) / 2, where x rises to 1 in the last step."""

    name: Literal["cosine"] = mathematics("Decay along half a cosine after the warm-up.", "cosine")

    def after_warmup(self, step: int, steps: int) -> float:
        x = min(1.0, (step + 1) / max(1, steps))
        return self.between((1 + math.cos(math.pi * x)) / 2)
