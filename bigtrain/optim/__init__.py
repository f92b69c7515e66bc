"""Optimizers, one file each: the keys of the run's file, what is built from them, and what it keeps of a parameter."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bigtrain.config.core import Component, mathematics
from bigtrain.optim.groups import average, parameter_groups
from bigtrain.state import Shape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bigtrain.config.schema import RunConfig, StageConfig

EMA = "ema"  # the slot of the moving average of a weight


class Optimizer(Component):
    """How weights are updated. A subclass says which torch optimizer it is, and what that keeps of a parameter."""

    lr: float = mathematics("Peak learning rate.", gt=0)
    weight_decay: float = mathematics("Decay of the weights; norms and biases are spared.", 0.1, ge=0)
    max_grad_norm: float | None = mathematics(
        "The gradient is scaled down to this global 2-norm; null: never.", 1.0, gt=0
    )
    ema: float | None = mathematics(
        "Decay of an exponential moving average of the weights, kept beside the optimizer's state; "
        "`bigtrain export --ema` writes it. null: none.",
        None,
        gt=0,
        lt=1,
    )

    @abstractmethod
    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over torch's parameter groups, each with its `params` and `weight_decay`.

        It updates each element by itself: engines give it parts of parameters, ZeRO as flat vectors.
        """

    @abstractmethod
    def moments(self, name: str, shape: Shape) -> tuple[str, ...]:
        """What it keeps of a parameter for each of its elements, in fp32, by the names that torch has in its state."""

    def slots(self, name: str, shape: Shape) -> tuple[str, ...]:
        """All that is kept of a parameter beside its weight."""
        return (*self.moments(name, shape), *((EMA,) if self.ema is not None else ()))

    def elements(self, shapes: Mapping[str, Shape]) -> int:
        """Elements of the state of these parameters: their weights and all slots."""
        return sum(math.prod(shape) * (1 + len(self.slots(name, shape))) for name, shape in shapes.items())

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the parameters of `model` that train."""
        optimizer = self.torch_optimizer(parameter_groups(model, self.weight_decay))
        if self.ema is not None:
            average(optimizer, EMA, self.ema)
        return optimizer

    def unusual(self, run: RunConfig, stage: StageConfig) -> Iterator[str]:  # noqa: ARG002
        yield from self.outside(
            ("lr", 1e-8, 0.1, "1e-5 to 1e-2"),
            ("weight_decay", 0.0, 1.0, "0 to 0.3"),
            ("max_grad_norm", 1e-3, 1e3, "0.3 to 5"),
            ("ema", 0.9, 1.0, "0.99 to 0.9999"),
        )

    def outside(self, *ranges: tuple[str, float, float, str]) -> Iterator[str]:
        """What is said of each value outside of (its key, the least, the most, the usual range)."""
        for name, least, most, usual in ranges:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                yield f"{name}: {value:g} is unusual; the usual range is {usual}."
