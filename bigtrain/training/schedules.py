"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from bigtrain.config.schema import ScheduleConfig

# Part of the way from the peak (1) to the end (0), after a part `x` of the steps that follow the warm-up.
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "constant": lambda _: 1.0,
}


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of step `step` (from 0) of a stage of `steps` steps.

    Warm-up is linear and reaches the peak in its last step; the decay reaches peak * min_ratio in the last step.
    """
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else round(schedule.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup + 1) / max(1, steps - warmup)
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * SHAPES[schedule.name](min(1.0, part)))
