"""Dynamic loss scaling: the scale's own rules, and a step that overflows changes nothing."""

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.parallel.loss_scale import LossScale
from bigtrain.testing import Ranks
from tests.parity import cases

FINE, OVERFLOW = True, False


def test_halves_on_an_overflow_and_doubles_after_patience():
    scale = LossScale(initial=8.0, patience=3)
    assert [scale.accepts(norm) for norm in (OVERFLOW, FINE, FINE)] == [False, True, True]
    assert scale.value == 4.0
    assert scale.accepts(FINE)
    assert scale.value == 8.0
    assert not scale.accepts(OVERFLOW)
    assert scale.value == 4.0


def test_gives_up_when_the_gradients_themselves_overflow():
    scale = LossScale(initial=2.0)
    assert not scale.accepts(OVERFLOW)
    with pytest.raises(BigtrainError, match="even with a loss scale of 1"):
        scale.accepts(OVERFLOW)


def test_is_restored():
    scale, other = LossScale(initial=8.0, patience=2), LossScale()
    scale.accepts(FINE)
    other.load(scale.progress())
    assert other.progress() == {"loss_scale": 8.0, "loss_scale_good_steps": 1}


def overflowing(layout):
    """Whether a step with an absurd loss scale left the state as it was; then ordinary fp16 steps, the second of which
    doubles the scale: the losses and norms of five, and the first moments after two."""
    if layout.startswith("zero"):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # it asks for fp16 instructions; torch does without
    engine = cases.make(layout, precision="fp16", progress={"updates": 0, "loss_scale": 2.0**40})
    before = cases.collect(engine)
    outcome = engine.step(cases.share(0), lr=1e-2)
    after = cases.collect(engine)
    kept = all(torch.equal(before[key], after[key]) for key in before)
    kept &= not any(after[key].any() for key in after.keys() - before.keys())  # ZeRO may have made its moments
    skipped = engine.progress()
    progress = {"updates": 0, "loss_scale": 256.0, "loss_scale_good_steps": 998}
    engine.load(cases.RandomWeights(cases.model_builder()(meta=True), 0), progress)
    outcomes = [engine.step(cases.share(step), cases.learning_rate(step)) for step in range(2)]
    moments = first_moments(cases.collect(engine))
    outcomes += [engine.step(cases.share(step), cases.learning_rate(step)) for step in range(2, 5)]
    numbers = [o.loss.item() for o in outcomes], [o.grad_norm.item() for o in outcomes], moments
    reached = engine.progress()
    engine.close()
    return kept, outcome.grad_norm.isfinite().item(), skipped, numbers, reached


def first_moments(state):
    """The norm of each."""
    return {name: tensor.norm().item() for (name, slot), tensor in state.items() if slot == "exp_avg"}


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero2", "zero3"])
def test_an_overflow_changes_nothing_and_fp16_trains_like_fp32(two, layout):
    expected, expected_norms, _ = two(cases.trained, layout, 5)[0]
    expected_moments = first_moments(two(cases.trained, layout, 2)[0][2])
    for kept, finite, skipped, (losses, norms, moments), reached in two(overflowing, layout):
        assert kept
        assert not finite
        assert skipped == {"updates": 0, "loss_scale": 2.0**39, "loss_scale_good_steps": 0}
        assert losses == pytest.approx(expected, rel=5e-3)
        assert losses != expected
        assert norms == pytest.approx(expected_norms, rel=2e-2)
        assert moments == pytest.approx(expected_moments, rel=5e-2)
        assert reached == {"updates": 5, "loss_scale": 512.0, "loss_scale_good_steps": 3}
