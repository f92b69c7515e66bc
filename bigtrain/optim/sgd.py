"""Stochastic gradient descent with momentum, as torch.optim.SGD defines it (Sutskever et al. 2013)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from bigtrain.config.core import Broken, mathematics
from bigtrain.optim import Optimizer
from bigtrain.state import Shape

if TYPE_CHECKING:
    import torch

    from bigtrain.config.schema import RunConfig, StageConfig


class SGD(Optimizer):
    """g = gradient + weight_decay * weight; buffer = momentum * buffer + g; weight -= lr * buffer.

    nesterov: weight -= lr * (g + momentum * buffer).
    """

    name: Literal["sgd"] = mathematics("Stochastic gradient descent with momentum.", "sgd")
    momentum: float = mathematics("Part of the buffer that stays at each step; 0: no buffer.", 0.9, ge=0, lt=1)
    nesterov: bool = mathematics("Step along the gradient after the buffer's next move.", False)
    weight_decay: float = mathematics(
        "Of the weight, added to its gradient before the momentum; norms and biases are spared.", 0.0, ge=0
    )

    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, foreach=True)

    def moments(self, name: str, shape: Shape) -> tuple[str, ...]:  # noqa: ARG002
        return ("momentum_buffer",) if self.momentum else ()

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:
        yield from super().check(run, stage)
        if self.nesterov and not self.momentum:
            yield ("nesterov",), "has no effect with `momentum: 0`; remove it, or give a momentum, like 0.9."
