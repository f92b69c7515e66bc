"""Which parameters decay, and the moving average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the parameters that train: what decays, and norms and biases, which do not.

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


def average(optimizer: torch.optim.Optimizer, slot: str, decay: float) -> None:
    """Keep a moving average of each weight in its state under `slot`.

    slot = decay * slot + (1 - decay) * weight after each step; it begins as the weight after the first one.
    """
    import torch

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        averages, weights = [], []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = optimizer.state[parameter]
                if slot in state:
                    averages.append(state[slot])
                    weights.append(parameter)
                else:
                    state[slot] = parameter.detach().clone()
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - decay)

    optimizer.register_step_post_hook(update)
