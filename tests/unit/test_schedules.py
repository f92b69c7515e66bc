"""The learning rate is a function of the step."""

import itertools
import math

import pytest

from bigtrain.training.schedules.constant import Constant
from bigtrain.training.schedules.cosine import Cosine
from bigtrain.training.schedules.linear import Linear
from bigtrain.training.schedules.warmup_stable_decay import WarmupStableDecay


def rates(schedule, steps=100, peak=2.0):
    return [schedule.rate(step, steps, peak) for step in range(steps)]


@pytest.mark.parametrize("kind", [Cosine, Linear, Constant, WarmupStableDecay])
def test_warms_up_to_the_peak_and_never_rises_again(kind):
    values = rates(kind(warmup_steps=10))
    assert values[0] == pytest.approx(0.2)
    assert values[9] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))


def test_ends_at_the_floor():
    assert rates(Cosine(min_ratio=0.1))[-1] == pytest.approx(0.2)
    assert rates(Linear(min_ratio=0.0))[-1] == pytest.approx(0.0)
    assert rates(Constant())[-1] == 2.0


def test_cosine_is_half_way_down_in_the_middle():
    values = rates(Cosine(min_ratio=0.0, warmup_ratio=0.2))
    assert values[19] == 2.0
    assert values[59] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [Constant, Cosine, Linear, WarmupStableDecay])
def test_a_single_step_trains_at_the_end_of_its_schedule(kind):
    floor = 1.0 if kind is Constant else kind.model_fields["min_ratio"].default
    end = 2.0 if kind is WarmupStableDecay else 2.0 * floor  # a tenth of one step is no step of decay
    assert rates(kind(), steps=1) == [pytest.approx(end)]


@pytest.mark.parametrize(
    ("decay", "f"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: 0.5 + 0.5 * math.cos(math.pi * x)),
        ("1-sqrt", lambda x: 1 - x**0.5),
    ],
)
@pytest.mark.parametrize("length", [{"decay_ratio": 0.2}, {"decay_steps": 20}])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_warmup_stable_decay_follows_its_formula(decay, f, length, floor):
    values = rates(WarmupStableDecay(warmup_steps=10, decay=decay, min_ratio=floor, **length))
    assert values[10:80] == [2.0] * 70
    assert values[80:] == [pytest.approx(2.0 * (floor + (1 - floor) * f(n / 20))) for n in range(1, 21)]
    assert values[-1] == pytest.approx(2.0 * floor)


def test_warmup_and_decay_may_fill_a_stage_and_no_more():
    schedule = WarmupStableDecay(warmup_steps=4, decay_steps=6)
    assert list(schedule.too_long(10)) == []
    assert rates(schedule, steps=10)[3] == 2.0
    [(key, told)] = schedule.too_long(9)
    assert key == ("decay_steps",)
    assert told == "6 steps of decay and 4 of warm-up are more than the whole stage (9 steps)."
    [(key, _)] = WarmupStableDecay(warmup_ratio=0.6, decay_ratio=0.6).too_long(10)
    assert key == ("decay_ratio",)
    [(key, _)] = WarmupStableDecay(warmup_steps=11).too_long(10)
    assert key == ("warmup_steps",)
