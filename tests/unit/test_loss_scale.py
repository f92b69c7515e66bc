"""Dynamic loss scaling: the scale's own rules, and a step that overflows changes nothing."""

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.parallel.loss_scale import LossScale
from bigtrain.testing import Ranks
from tests.parity import cases

FINE, OVERFLOW = torch.tensor(1.0), torch.tensor(float("inf"))


def test_halves_on_an_overflow_and_doubles_after_patience():
    scale = LossScale(initial=8.0, patience=3)
    assert [scale.accepts(norm) for norm in (OVERFLOW, FINE, FINE)] == [False, True, True]
    assert scale.value == 4.0
    assert scale.accepts(FINE)
    assert scale.value == 8.0
    assert not scale.accepts(torch.tensor(float("nan")))
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
    """Whether a step with an absurd loss scale left the state as it was; then the losses of ordinary fp16 steps."""
    engine = cases.make(layout, precision="fp16", progress={"updates": 0, "loss_scale": 2.0**40})
    before = cases.collect(engine)
    outcome = engine.step(cases.share(0), lr=1e-2)
    after = cases.collect(engine)
    kept = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    skipped = engine.progress()
    engine.load(cases.RandomWeights(cases.model_builder()(meta=True), 0), {"updates": 0, "loss_scale": 256.0})
    losses = [engine.step(cases.share(step), cases.learning_rate(step)).loss.item() for step in range(5)]
    updates = engine.progress()["updates"]
    engine.close()
    return kept, outcome.grad_norm.isfinite().item(), skipped, losses, updates


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_an_overflow_changes_nothing_and_fp16_trains_like_fp32(layout):
    with Ranks(2) as ranks:
        expected = ranks(cases.trained, layout, 5)[0][0]
        for kept, finite, skipped, losses, updates in ranks(overflowing, layout):
            assert kept
            assert not finite
            assert skipped == {"updates": 0, "loss_scale": 2.0**39, "loss_scale_good_steps": 0}
            assert losses == pytest.approx(expected, rel=5e-3)
            assert losses != expected
            assert updates == 5
