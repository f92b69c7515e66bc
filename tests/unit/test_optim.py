"""Which parameters decay."""

import pytest
import torch
from torch import nn

from bigtrain.optim.adamw import AdamW
from bigtrain.optim.groups import parameter_groups
from bigtrain.optim.sgd import SGD


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
    optimizer = AdamW(lr=0.5, weight_decay=0.2, betas=[0.8, 0.7], eps=1e-3).build(module)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.allclose(before[name] * (0.9 if name in DECAY else 1.0)), name


def test_a_model_without_norms_and_biases_has_one_group():
    assert len(parameter_groups(nn.Embedding(5, 3), 0.3)) == 1


@pytest.mark.parametrize("kind", [AdamW(lr=0.1, ema=0.5), SGD(lr=0.1, ema=0.9), SGD(lr=0.1, momentum=0.0, ema=0.9)])
def test_the_average_follows_the_weights_after_each_step(kind):
    module = nn.Linear(2, 2)
    optimizer = kind.build(module)
    expected = None
    for _ in range(3):
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        now = module.weight.detach().clone()
        expected = now if expected is None else kind.ema * expected + (1 - kind.ema) * now
        assert optimizer.state[module.weight]["ema"].allclose(expected)


@pytest.mark.parametrize("kind", [AdamW(lr=0.1), AdamW(lr=0.1, ema=0.9), SGD(lr=0.1), SGD(lr=0.1, momentum=0.0)])
def test_the_slots_of_a_parameter_are_what_torch_keeps_of_it(kind):
    module = nn.Linear(2, 2)
    optimizer = kind.build(module)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    kept = 0
    for name, parameter in module.named_parameters():
        state = {slot: value for slot, value in optimizer.state[parameter].items() if value.shape == parameter.shape}
        assert set(kind.slots(name, shapes[name])) == set(state)
        kept += parameter.numel() * (1 + len(state))
    assert kind.elements(shapes) == kept


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_what_its_formula_says(nesterov):
    module = nn.Linear(3, 1, bias=False)
    weight, buffer = module.weight.detach().clone(), torch.zeros(1, 3)
    kind = SGD(lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.3)
    optimizer = kind.build(module)
    for step in range(4):
        gradient = torch.full((1, 3), 1.0 + step)
        module.weight.grad = gradient.clone()
        optimizer.step()
        gradient += 0.3 * weight
        buffer = 0.8 * buffer + gradient
        weight = weight - 0.1 * (gradient + 0.8 * buffer if nesterov else buffer)
        assert module.weight.allclose(weight)
