"""Optimizers and their parameter groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from bigtrain.config.schema import Optimizer


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


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that the run's file names, over the parameters of `model` that train, in torch's fused kernel."""
    groups = parameter_groups(model, settings.weight_decay)
    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
