"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from bigtrain.config.core import Broken, mathematics
from bigtrain.config.files import literal
from bigtrain.optim import Optimizer
from bigtrain.state import Shape

if TYPE_CHECKING:
    import torch

    from bigtrain.config.schema import RunConfig, StageConfig


class AdamW(Optimizer):
    """Two moments of the gradient for each element."""

    name: Literal["adamw"] = mathematics("Adam with decoupled weight decay.", "adamw")
    betas: list[float] = mathematics("Decay of the two moments.", [0.9, 0.95], min_length=2, max_length=2)
    eps: float = mathematics("Added to the root of the second moment.", 1e-8, gt=0)
    weight_decay: float = mathematics("Decoupled decay of weights; norms and biases are spared.", 0.1, ge=0)

    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)

    def moments(self, name: str, shape: Shape) -> tuple[str, ...]:  # noqa: ARG002
        return ("exp_avg", "exp_avg_sq")

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:
        yield from super().check(run, stage)
        if any(not 0 <= beta < 1 for beta in self.betas):
            yield ("betas",), f"each must be at least 0 and below 1, got {literal(self.betas)}."

    def unusual(self, run: RunConfig, stage: StageConfig) -> Iterator[str]:
        first, second = self.betas
        if first > second:
            yield f"betas: [{first:g}, {second:g}] look swapped; the usual are [0.9, 0.95] to [0.9, 0.999]."
        yield from super().unusual(run, stage)
        yield from self.outside(("eps", 0.0, 1e-2, "1e-10 to 1e-6"))
