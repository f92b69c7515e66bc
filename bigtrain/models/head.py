"""An output head that makes its logits some tokens at a time, the gradient of its parameters summed in fp32.

Autograd sums the gradients of several uses of a parameter in the parameter's dtype; in bf16 the error grows with their
number. In fp32 its sum is right as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 2**20  # elements added at once: a CPU first copies them to fp32, which shall fit its cache


def use_in_chunks(head: nn.Module) -> None:
    """Let a linear layer `head(hidden, then)` give `then(hidden, *its parameters)`.

    `head(hidden)` and names stay as they are. The call goes through the head because engines that shard make its
    parameters whole for it.
    """
    head.__class__ = type(type(head).__name__, (_InChunks, type(head)), {})


class _InChunks:
    def forward(self: Any, hidden: Tensor, then: Callable[..., Any] | None = None) -> Any:
        return super().forward(hidden) if then is None else then(hidden, *self.parameters())  # type: ignore[misc]


class GradientSum:
    """The gradient of one parameter over `uses` uses in one forward. It takes one fp32 buffer in the backward pass."""

    def __init__(self, uses: int):
        self._missing = uses
        self._sum: Tensor | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The parameter for one of its uses."""
        use: Tensor = _Use.apply(parameter, self)
        return use

    def add(self, gradient: Tensor) -> Tensor | None:
        """Count one use's gradient; the whole sum, in the gradient's dtype, with the last of them, None before."""
        if self._sum is None:
            self._sum = gradient.float()
        else:
            for total, part in zip(self._sum.view(-1).split(BLOCK), gradient.reshape(-1).split(BLOCK), strict=True):
                total += part
        self._missing -= 1
        if self._missing:
            return None
        whole, self._sum = self._sum.to(gradient.dtype), None
        return whole


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, total: GradientSum) -> Tensor:
        ctx.total = total
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return ctx.total.add(gradients[0]), None
