"""Warm-up, a long time at the peak, a short decay: the length of the training may be decided late.

Hu et al. 2024 (MiniCPM, arXiv:2404.06395); the shape 1-sqrt is that of Hägele et al. 2024 (arXiv:2405.18392).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from bigtrain.config.core import Broken, mathematics
from bigtrain.training.schedules import Decaying

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig, StageConfig

SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


class WarmupStableDecay(Decaying):
    """1 up to the last D steps; min_ratio + (1 - min_ratio) * f(n / D) in the n-th of these, n from 1 to D.

    f(x) is 1 - x (linear), (1 + cos(pi * x)) / 2 (cosine) or 1 - sqrt(x) (1-sqrt).
    """

    name: Literal["warmup_stable_decay"] = mathematics(
        "The peak after the warm-up, and a decay in the last steps.", "warmup_stable_decay"
    )
    min_ratio: float = mathematics("Learning rate of the last step, as a part of the peak.", 0.0, ge=0, le=1)
    decay: Literal["linear", "cosine", "1-sqrt"] = mathematics("Shape of the decay.", "linear")
    decay_steps: int | None = mathematics("Steps of the decay.", None, ge=0)
    decay_ratio: float = mathematics("The same as a part of all steps; used without decay_steps.", 0.1, ge=0, le=1)

    def rate(self, step: int, steps: int, peak: float) -> float:
        decay = self.num_decay_steps(steps)
        if step < steps - decay:
            return super().rate(step, steps, peak)
        return peak * self.between(SHAPES[self.decay](min(1.0, (step - (steps - decay) + 1) / max(1, decay))))

    def after_warmup(self, step: int, steps: int) -> float:  # noqa: ARG002
        return 1.0

    def num_decay_steps(self, steps: int) -> int:
        """Of a stage of `steps` steps."""
        return self.decay_steps if self.decay_steps is not None else round(self.decay_ratio * steps)

    def too_long(self, steps: int) -> Broken:
        found = list(super().too_long(steps))
        warmup, decay = self.num_warmup_steps(steps), self.num_decay_steps(steps)
        if not found and warmup + decay > steps:
            key = "decay_ratio" if self.decay_steps is None else "decay_steps"
            told = f"{decay} steps of decay and {warmup} of warm-up are more than the whole stage ({steps} steps)."
            found = [((key,), told)]
        yield from found

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:
        yield from super().check(run, stage)
        default = type(self).model_fields["decay_ratio"].default
        if self.decay_steps is not None and self.decay_ratio != default:
            yield ("decay_ratio",), "has no effect beside decay_steps; remove one of them."
