"""Optimizers and their parameter groups."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from bigtrain.config.schema import OptimizerConfig


EMA = "ema"  # the slot of the moving average of a weight


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: what decays, and norms and biases, which do not.

    A norm is recognised by its class name, a bias by its name; other vectors (gates, scales) do not decay either.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    decays: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor behind
        bias = name.rsplit(".", 1)[-1].endswith("bias")
        (spared if bias or dimensions < 2 or id(parameter) in exempt else decays).append(parameter)
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the run's file names, over the parameters of `model` that train, in torch's fused kernel."""
    groups = parameter_groups(model, settings.weight_decay)
    betas = (settings.betas[0], settings.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    if settings.ema is not None:
        optimizer.register_step_post_hook(partial(_average, settings.ema))
    return optimizer


def slots(settings: OptimizerConfig) -> tuple[str, ...]:
    """What the optimizer keeps of each element that it trains, in fp32."""
    return ("exp_avg", "exp_avg_sq") + ((EMA,) if settings.ema is not None else ())


@torch.no_grad()
def _average(decay: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """ema = decay * ema + (1 - decay) * weight after each step; it begins as the weights after the first one."""
    averages, weights = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                continue  # it had no gradient yet
            if EMA in state:
                averages.append(state[EMA])
                weights.append(parameter)
            else:
                state[EMA] = parameter.detach().clone()
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)
