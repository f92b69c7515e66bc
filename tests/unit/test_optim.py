"""Which parameters decay."""

import pytest
import torch
from torch import nn

from bigtrain.config.schema import OptimizerConfig
from bigtrain.optim import build_optimizer, parameter_groups


class Scaled(nn.Module):
    """Parameters of its own whose names say what they are."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))
        self.in_proj_bias = nn.Parameter(torch.ones(2, 3))
        self.bias_table = nn.Parameter(torch.ones(2, 3))
        self.frozen = nn.Parameter(torch.ones(2, 3), requires_grad=False)


class GroupedRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 3))
        self.inner = nn.Linear(3, 3)


def model():
    parts = {
        "embedding": nn.Embedding(5, 3),
        "linear": nn.Linear(3, 3),
        "planes": nn.LayerNorm((2, 3)),
        "grouped": GroupedRMSNorm(),
        "scaled": Scaled(),
    }
    return nn.ModuleDict(parts)


DECAY = {"embedding.weight", "linear.weight", "grouped.inner.weight", "scaled.bias_table"}
SPARED = {
    "linear.bias",
    "planes.weight",  # two dimensions: of a norm by its class
    "planes.bias",
    "grouped.scale",
    "grouped.inner.bias",
    "scaled.gate",  # a vector
    "scaled.in_proj_bias",  # two dimensions: a bias by its name
}


def names(module, groups):
    called = {parameter: name for name, parameter in module.named_parameters()}
    return [{called[parameter] for parameter in group["params"]} for group in groups]


def test_norms_by_class_biases_by_name_and_vectors_do_not_decay():
    module = model()
    groups = parameter_groups(module, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert names(module, groups) == [DECAY, SPARED]


def test_partitioned_parameters_decay_like_whole_ones():
    """ZeRO-3 leaves an empty tensor in the place of each, and its shape beside it."""
    module = model()
    for parameter in module.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert names(module, parameter_groups(module, 0.3)) == [DECAY, SPARED]


def test_a_step_without_gradient_shows_what_decays():
    """By lr * weight_decay, and nothing else; the betas and eps are the file's."""
    module = model()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(module, OptimizerConfig(lr=0.5, weight_decay=0.2, betas=[0.8, 0.7], eps=1e-3))
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.allclose(before[name] * (0.9 if name in DECAY else 1.0)), name


def test_a_model_without_norms_and_biases_has_one_group():
    assert len(parameter_groups(nn.Embedding(5, 3), 0.3)) == 1


@pytest.mark.parametrize("ema", [0.5, 0.9])
def test_the_average_follows_the_weights_after_each_step(ema):
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(module, OptimizerConfig(lr=0.1, ema=ema))
    expected = None
    for _ in range(3):
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        now = module.weight.detach().clone()
        expected = now if expected is None else ema * expected + (1 - ema) * now
        assert optimizer.state[module.weight]["ema"].allclose(expected)
