"""Any engine on any number of ranks trains what a plain PyTorch loop on one process trains."""

import shutil
from functools import cache

import pytest
import torch

from bigtrain.models.weights import RandomWeights
from tests.parity import cases, plain

LAYOUTS = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
STEPS = 6


def first_model(tied=True):
    build_model = cases.model_builder(tied)
    model, reader = build_model(), RandomWeights(build_model(meta=True), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, "weight", (0,) * parameter.dim(), tuple(parameter.shape)))
    return model


@cache
def reference(tied=True, dtype=None):
    """Losses, norms and weights of the plain loop from the same first weights."""
    model = first_model(tied)
    batches = [tuple(cases.global_batch(step).values()) for step in range(STEPS)]
    losses, norms = plain.train(model, batches, [cases.learning_rate(s) for s in range(STEPS)], dtype=dtype)
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def relative(values, expected):
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("micro", "tied"), [(1, True), (2, False), (8, True)])
def test_fp32_equals_the_plain_loop(pools, layout, size, micro, tied):
    """Seven uneven, partly masked rows; micro-batches of 1 and 2 accumulate, 8 takes a rank's rows at once."""
    losses, norms, weights = reference(tied)
    answers = pools(size)(cases.trained, layout, STEPS, micro=micro, tied=tied)
    for got_losses, got_norms, state in answers:
        assert relative(got_losses, losses) < 1e-6
        assert relative(got_norms, norms) < 1e-6
        assert {name for name, slot in state if slot == "weight"} == set(weights)
        for name, weight in weights.items():
            assert (state[name, "weight"] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_casts_parameters_and_keeps_fp32_masters(pools, layout, size):
    losses, norms, _ = reference(dtype=torch.bfloat16)
    got_losses, got_norms, state = pools(size)(cases.trained, layout, STEPS, micro=1, precision="bf16")[0]
    assert relative(got_losses, losses) < 2e-3
    assert relative(got_norms, norms) < 1e-2  # ZeRO-3 scales by the world size, and bf16 rounds that
    assert relative(got_losses, reference()[0]) > 1e-5  # it really computed in bf16
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert any((t != t.bfloat16()).any() for (_, slot), t in state.items() if slot == "weight")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing_changes_nothing(pools, layout):
    losses, norms, _ = reference()
    got_losses, got_norms, _ = pools(2)(cases.trained, layout, STEPS, micro=2, checkpointing="full")[0]
    assert relative(got_losses, losses) < 1e-6
    assert relative(got_norms, norms) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_by_chunks_changes_nothing(pools, layout):
    losses, norms, weights = reference()
    (got_losses, got_norms, state), chunks = pools(2)(cases.by_chunks, cases.trained, layout, micro=2)[0]
    assert chunks == STEPS * 2 * 5 * 2  # micro-batches of 48 tokens, ten tokens at once, each forward done twice
    assert relative(got_losses, losses) < 1e-6
    assert relative(got_norms, norms) < 1e-6
    for name, weight in weights.items():
        assert (state[name, "weight"] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_by_chunks_changes_nothing(pools, layout):
    expected = pools(1)(cases.evaluated, "ddp")[0]
    for sums, chunks in pools(3)(cases.by_chunks, cases.evaluated, layout):
        assert chunks > 3
        assert (sums["targets"], sums["correct"]) == (expected["targets"], expected["correct"])
        assert sums["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero1", "zero2"])
def test_compiled_layers_train_the_same(pools, layout):
    """One graph for the layers, one for the loss, and none anew after the first step, not even for a smaller one."""
    batches = [tuple(cases.global_batch(step, 7 if step < 4 else 3).values()) for step in range(5)]
    expected_losses, expected_norms = plain.train(first_model(), batches, [cases.learning_rate(s) for s in range(5)])
    for losses, norms, graphs, breaks in pools(2)(cases.compiled, layout):
        assert relative(losses, expected_losses) < 1e-6
        assert relative(norms, expected_norms) < 1e-6
        assert graphs == [2] * 5
        assert breaks == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_without_rows_take_part(pools, layout):
    """Two rows on three ranks, one of them trained on nothing."""
    one, _, _ = pools(1)(cases.trained, "ddp", 3, rows=2)[0]
    for losses, _, _ in pools(3)(cases.trained, layout, 3, rows=2):
        assert relative(losses, one) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_the_same_sums(pools, layout):
    expected = pools(1)(cases.evaluated, "ddp")[0]
    for sums in pools(3)(cases.evaluated, layout):
        assert sums["targets"] == expected["targets"]
        assert sums["correct"] == expected["correct"]
        assert sums["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)


def test_replicas_of_shards(pools):
    """HSDP: two replicas, each sharded over two ranks."""
    losses, norms, weights = reference()
    got_losses, got_norms, state = pools(4)(cases.trained, "fsdp", STEPS, micro=1, replicate=2)[0]
    assert relative(got_losses, losses) < 1e-6
    assert relative(got_norms, norms) < 1e-6
    for name, weight in weights.items():
        assert (state[name, "weight"] - weight).norm() <= 1e-5 * weight.norm(), name
