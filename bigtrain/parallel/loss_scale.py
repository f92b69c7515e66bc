"""Dynamic loss scaling for fp16: Micikevicius et al., Mixed Precision Training (2018), section 3.2."""

from __future__ import annotations

from bigtrain.errors import NotFiniteError


class LossScale:
    """Halved when a gradient overflows, doubled after `patience` steps without an overflow."""

    def __init__(self, initial: float = 2.0**16, patience: int = 1000):
        self.value = initial
        self._patience = patience
        self._good_steps = 0

    def accepts(self, finite: bool) -> bool:
        """Adapt the scale to a gradient that is finite or not; returns `finite`.

        Raises NotFiniteError when the scale has fallen below 1: the gradients themselves are not finite.
        """
        if finite:
            self._good_steps += 1
            if self._good_steps == self._patience:
                self.value *= 2
                self._good_steps = 0
            return True
        self.value /= 2
        self._good_steps = 0
        if self.value < 1:
            raise NotFiniteError("fp16: the gradients overflow even with a loss scale of 1.")
        return False

    def progress(self) -> dict[str, float]:
        return {"loss_scale": self.value, "loss_scale_good_steps": self._good_steps}

    def load(self, progress: dict[str, float]) -> None:
        self.value = progress.get("loss_scale", self.value)
        self._good_steps = int(progress.get("loss_scale_good_steps", 0))
