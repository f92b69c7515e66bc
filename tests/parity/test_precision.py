"""bf16 and fp16 compute in low precision, and accumulate and reduce in fp32."""

import math
from functools import cache
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from bigtrain.data.batches import Batch
from bigtrain.data.types import IGNORE
from bigtrain.parallel import task_module
from tests.parity import cases, plain
from tests.parity.test_steps import LAYOUTS, first_model

OPTIMIZER = cases.OPTIMIZER.model_copy(update={"max_grad_norm": None, "ema": None})
SCALE = 256.0  # of fp16
ROWS = 42


def coherent_batch():
    """A row that trains on many tokens, then one small row again and again, and from the middle on another one: in low
    precision what each adds is rounded the same way each time. 64 targets, by which one divides without rounding."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, cases.VOCABULARY, (2, 3, cases.LENGTH), generator=generator)
    which = torch.tensor([0] + [1] * (ROWS // 2 - 1) + [2] * (ROWS // 2))
    input_ids, targets = rows[0, which], rows[1, which].clone()
    targets[1:, 1:] = IGNORE
    targets[0, 0] = IGNORE
    assert (targets != IGNORE).sum() == 64
    return {"input_ids": input_ids, "targets": targets, "position_ids": torch.arange(cases.LENGTH).expand(ROWS, -1)}


def gradient(layout, precision, batch, tokens_at_once=None, **kwargs):
    """(loss, norm, {name: gradient}) of one step without clipping, the gradient from the first moments after it.

    tokens_at_once: for how many tokens there are logits at once.
    """
    if layout.startswith("zero"):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # it asks for fp16 instructions; torch does without
    progress = {"updates": 0, "loss_scale": SCALE} if precision == "fp16" else None
    engine = cases.make(layout, precision=precision, optimizer=OPTIMIZER, progress=progress, **kwargs)
    rows = len(batch["targets"])
    mine = slice(*(rank * rows // dist.get_world_size() for rank in (dist.get_rank(), dist.get_rank() + 1)))
    at_once = task_module.LOGITS_AT_ONCE if tokens_at_once is None else tokens_at_once * cases.VOCABULARY
    with patch.object(task_module, "LOGITS_AT_ONCE", at_once):
        outcome = engine.step(Batch({key: tensor[mine] for key, tensor in batch.items()}, rows, 0), 1e-2)
    state = cases.collect(engine)
    engine.close()
    moments = {name: tensor for (name, slot), tensor in state.items() if slot == "exp_avg"}
    gradients = {name: tensor / (1 - OPTIMIZER.betas[0]) for name, tensor in moments.items()}
    return outcome.loss.item(), outcome.grad_norm.item(), gradients


def norm(gradients):
    """Of all of them together."""
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))


def error(got, expected):
    """Of a gradient, relative, over all of its parameters."""
    assert got.keys() == expected.keys()
    return norm({name: got[name] - gradient for name, gradient in expected.items()}) / norm(expected)


@cache
def expected(precision):
    """(loss, {name: gradient}) of the plain loop."""
    dtype, scale = (torch.bfloat16, 1.0) if precision == "bf16" else (torch.float16, SCALE)
    model = first_model()
    loss = plain.backward(model, tuple(coherent_batch().values()), dtype, scale)
    return loss, {name: parameter.grad / scale for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("layout", "size", "precision"),
    [
        ("ddp", 1, "bf16"),
        ("ddp", 1, "fp16"),
        *((layout, 2, "bf16") for layout in LAYOUTS),
        *((layout, 2, "fp16") for layout in ("fsdp", "zero2", "zero3")),
    ],
)
def test_gradients_accumulate_and_reduce_in_fp32(pools, layout, size, precision):
    """They are the plain loop's: 1e-5 off at most, 1.7e-3 where one sum is in bf16."""
    loss, gradients = expected(precision)
    for got_loss, got_norm, got in pools(size)(gradient, layout, precision, coherent_batch(), micro=1):
        assert got_loss == pytest.approx(loss, rel=1e-6)
        assert got_norm == pytest.approx(norm(gradients), rel=1e-5)
        assert error(got, gradients) < 1e-4


@cache
def expected_head(tied):
    """The gradient of the output head of the plain loop in fp32, by its name."""
    model = first_model(tied)
    plain.backward(model, tuple(cases.global_batch(0, 16).values()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    head = model.get_output_embeddings().weight
    return {names[head]: head.grad}


@pytest.mark.parametrize(
    ("layout", "size", "tied"),
    [("ddp", 1, True), ("ddp", 2, True), ("fsdp", 2, False), ("zero1", 2, True), ("zero2", 2, False)]
    + [("zero3", 2, tied) for tied in (True, False)],
)
def test_the_gradient_of_a_head_in_chunks_is_summed_in_fp32(pools, layout, size, tied):
    """192 chunks of a token each: as near to fp32 as with the logits of all tokens at once."""
    head = expected_head(tied)
    errors = []
    for tokens in (None, 1):
        *_, got = pools(size)(gradient, layout, "bf16", cases.global_batch(0, 16), tokens, micro=8, tied=tied)[0]
        errors.append(error({name: got[name] for name in head}, head))
    whole, chunked = errors
    assert chunked < 1.3 * whole
