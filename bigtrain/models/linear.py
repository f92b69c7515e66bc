"""Matrix products of linear layers on processors where PyTorch's own are slow.

In fp32 PyTorch calls MKL, which uses AVX-512 on Intel's processors only; oneDNN, which PyTorch carries too, uses it
on all. Measured on an AMD EPYC with AVX-512: 350 to 415 GFLOP/s against 170 to 190.

Where a processor cannot multiply bf16 or fp16 itself, PyTorch's loops take 8 times as long as fp32 (an AMD EPYC
with AVX2). There the operands are converted to fp32 and the result is rounded once. All products sum in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def mkl_is_slow() -> bool:
    """Whether this machine's processor has AVX-512 and MKL does not use it."""
    cpuinfo = Path("/proc/cpuinfo")
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and cpuinfo.exists()):
        return False
    first = cpuinfo.read_text().partition("\n\n")[0]
    return "AuthenticAMD" in first and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _slow_dtypes() -> frozenset[torch.dtype]:
    slow = set()
    if mkl_is_slow():
        slow.add(torch.float32)
    if torch.backends.mkldnn.is_available():  # private operators: PyTorch's compiler asks them too
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            slow.add(torch.bfloat16)
        if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            slow.add(torch.float16)
    return frozenset(slow)


SLOW_DTYPES = _slow_dtypes()  # in which PyTorch's own products do not use what this machine's processor can do


def make_fast(model: nn.Module) -> None:
    """Let the linear layers of `model` compute by `linear`. Names stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, of shape (..., out), for x (..., in), W (out, in) and b (out) of one dtype."""
    if x.device.type == "cpu" and x.dtype in SLOW_DTYPES:
        product: Tensor = _Product.apply(x, weight, bias)
        return product
    return functional.linear(x, weight, bias)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """`linear` and its gradients with the op that PyTorch's compiler uses for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        return (
            _product(gradient, weight.t()) if to_x else None,
            _product(rows.t(), inputs.t()) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


@torch.library.custom_op("bigtrain::product", mutates_args=(), device_types="cpu")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    wide = [tensor if tensor is None else tensor.float() for tensor in (x, weight, bias)]
    return torch.ops.mkldnn._linear_pointwise(*wide, "none", [], "").to(x.dtype)


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
