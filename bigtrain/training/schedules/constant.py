"""No decay."""

from __future__ import annotations

from typing import Literal

from bigtrain.config.core import mathematics
from bigtrain.training.schedules import Schedule


class Constant(Schedule):
    """The peak, from the warm-up on."""

    name: Literal["constant"] = mathematics("The peak after the warm-up, to the end.", "constant")

    def after_warmup(self, step: int, steps: int) -> float:  # noqa: ARG002
        return 1.0
