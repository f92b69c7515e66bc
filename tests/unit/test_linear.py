"""Linear layers by bigtrain's products against PyTorch's own."""

import copy

import pytest
import torch
from torch import nn

from bigtrain.models import linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def slow_in_all(monkeypatch):
    """As on a processor without instructions for any dtype."""
    dtypes = frozenset([torch.float32, torch.bfloat16, torch.float16])
    monkeypatch.setattr(linear, "SLOW_DTYPES", dtypes)


def both(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    own = nn.Linear(48, 80, bias=bias, dtype=dtype)
    other = copy.deepcopy(own)
    linear.make_fast(other)
    return own, other


def outcome(layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "x", [torch.randn(3, 5, 48), torch.randn(7, 48), torch.randn(48, 7).t()], ids=["3d", "2d", "t"]
)
def test_output_and_gradients_are_those_of_pytorch(bias, x):
    own, other = both(bias)
    for expected, got in zip(outcome(own, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_and_inputs_get_no_gradient():
    _, layer = both(bias=True)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 48)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is None and layer.bias.grad is not None


def test_one_graph_when_compiled():
    own, other = both(bias=True)
    compiled = copy.deepcopy(other)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, dynamic=False)
    x = torch.randn(4, 48)
    for expected, got in zip(outcome(own, x), outcome(compiled, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_fp32_and_rounds_once(dtype):
    own, other = both(bias=True, dtype=dtype)
    x = torch.randn(4, 300, 48, dtype=dtype)
    got = outcome(other, x)
    wide = outcome(copy.deepcopy(own).float(), x.float())
    assert torch.equal(got[0], wide[0].to(dtype))
    assert all(tensor.dtype == dtype for tensor in got)
    ones = torch.full((4096, 48), 1.0, dtype=dtype)
    layer = nn.Linear(48, 80, bias=False, dtype=dtype)
    linear.make_fast(layer)
    layer(ones).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 4096.0))  # a sum in bf16 stops at 256


def test_dtypes_that_are_fast_stay_with_pytorch(monkeypatch):
    own, other = both(bias=False, dtype=torch.bfloat16)
    monkeypatch.setattr(linear, "SLOW_DTYPES", frozenset())
    x = torch.randn(4, 48, dtype=torch.bfloat16)
    assert torch.equal(own(x), other(x))


def test_names_and_tied_weights_stay():
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(80, 48), nn.Linear(48, 80, bias=False)
    model.head.weight = model.embedding.weight
    names = list(model.state_dict())
    linear.make_fast(model)
    assert list(model.state_dict()) == names and model.head.weight is model.embedding.weight
    assert isinstance(model.head, nn.Linear)
