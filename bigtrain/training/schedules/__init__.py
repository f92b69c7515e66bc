"""The learning rate as a pure function of the step. Schedules, one file each."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from bigtrain.config.core import Broken, Component, mathematics

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig, StageConfig


class Schedule(Component):
    """A linear warm-up, which reaches the peak in its last step, and what a subclass does after it."""

    warmup_steps: int | None = mathematics("Steps until the peak.", None, ge=0)
    warmup_ratio: float = mathematics("The same as a part of all steps; used without warmup_steps.", 0.0, ge=0, le=1)

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) of the `steps` that follow the warm-up, as a part of the peak."""

    def rate(self, step: int, steps: int, peak: float) -> float:
        """The rate of step `step` (from 0) of a stage of `steps` steps."""
        warmup = self.num_warmup_steps(steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * self.after_warmup(step - warmup, steps - warmup)

    def num_warmup_steps(self, steps: int) -> int:
        """Of a stage of `steps` steps."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_ratio * steps)

    def too_long(self, steps: int) -> Broken:
        """(key, message) for what does not fit into a stage of `steps` steps."""
        if self.warmup_steps is not None and self.warmup_steps > steps:
            yield (
                ("warmup_steps",),
                f"{self.warmup_steps} is longer than the whole stage ({steps} steps): the learning rate would never "
                "reach its peak.",
            )

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:
        yield from super().check(run, stage)
        if self.warmup_steps is not None and self.warmup_ratio:
            yield ("warmup_ratio",), "has no effect beside warmup_steps; remove one of them."
        if stage.num_steps is not None:
            yield from self.too_long(stage.num_steps)


class Decaying(Schedule):
    """A schedule that ends at a part of the peak."""

    min_ratio: float = mathematics("Learning rate of the last step, as a part of the peak.", 0.1, ge=0, le=1)

    def between(self, part: float) -> float:
        """From the peak (`part` 1) to the end (0)."""
        return self.min_ratio + (1 - self.min_ratio) * part
