"""The learning rate is a function of the step."""

import itertools

import pytest

from bigtrain.config.schema import ScheduleConfig
from bigtrain.training.schedules import learning_rate


def rates(schedule, steps=100, peak=2.0):
    return [learning_rate(step, steps, peak, schedule) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warms_up_to_the_peak_and_never_rises_again(name):
    values = rates(ScheduleConfig(name=name, warmup_steps=10))
    assert values[0] == pytest.approx(0.2)
    assert values[9] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))


def test_ends_at_the_floor():
    assert rates(ScheduleConfig(name="cosine", min_ratio=0.1))[-1] == pytest.approx(0.2)
    assert rates(ScheduleConfig(name="linear", min_ratio=0.0))[-1] == pytest.approx(0.0)
    assert rates(ScheduleConfig(name="constant", min_ratio=0.5))[-1] == 2.0


def test_cosine_is_half_way_down_in_the_middle():
    values = rates(ScheduleConfig(name="cosine", min_ratio=0.0, warmup_ratio=0.2))
    assert values[19] == 2.0
    assert values[59] == pytest.approx(1.0)


def test_a_single_step_trains_at_the_end_of_its_schedule():
    assert rates(ScheduleConfig(name="constant"), steps=1) == [2.0]
