"""On a GPU the numbers of a step come to the host one step late. Here a stand-in for the device's stream does what is
put on it only when the host waits: what is read too early is rubbish."""

import math

import pytest
import torch

from bigtrain.config.schema import StageConfig
from bigtrain.observability.stream import Stream
from bigtrain.parallel.engine import Outcome
from bigtrain.training import reports as training
from bigtrain.training.reports import Heard, Reports, _HostCopy
from bigtrain.training.run import StageRun
from tests.support import Rows

WORK = []  # what is on the stream and not done yet
WAITS = []  # how much of it was left each time that the host has waited


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU; a copy to the host that does not block is put on the stream."""

    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            target, source = args
            WORK.append(lambda: target.copy_(source.as_subclass(torch.Tensor)))
            return target
        return super().__torch_function__(function, types, args, kwargs or {})


class Event:
    """Of torch.cuda: waits for what was on the stream when it was recorded."""

    def record(self):
        self.work = list(WORK)

    def synchronize(self):
        for action in self.work:
            if action in WORK:
                WORK.remove(action)
                action()
        WAITS.append(len(WORK))


@pytest.fixture(autouse=True)
def device(monkeypatch):
    WORK.clear()
    WAITS.clear()
    empty = torch.empty

    def unpinned(*size, pin_memory, **options):
        assert pin_memory  # else the copy would block
        return empty(*size, **options).fill_(math.nan)

    monkeypatch.setattr(training.torch, "empty", unpinned)
    monkeypatch.setattr(training.torch.cuda, "Event", Event)


def outcome(step, stop=0.0, save=0.0, busy=1.0):
    """Of a step: every number tells it."""
    values = (1.0 + step, 100.0 * step, 0.5 + step, [stop, save, busy])
    return Outcome(*(torch.tensor(value).as_subclass(OnDevice) for value in values))


def stage(steps=5, every=None):
    return StageConfig.model_validate(
        {
            "name": "s",
            "task": "pretrain",
            "data": [{"source": "stdlib"}],
            "sequence_length": 8,
            "global_batch_size": 4,
            "steps": steps,
            "optimizer": {"lr": 1.0},
            "schedule": {"name": "linear", "min_ratio": 0.0},
            "checkpoint": {"every": every},
        }
    )


def trained(kind=Reports, every=None, stop_in=None, save_in=None, idle_in=None):
    """What a stage of 5 steps has reported once each step was completed, and what was due then. The last batch has 2
    sequences; flags are said in the steps that are named."""
    events = Rows()
    reports = kind("s", Stream([events]))
    run = StageRun.of(stage(every=every), 18, 0, reports)
    reports.start_clock()
    reported, due = [], []
    for step in range(1, 6):
        said = outcome(step, float(step == stop_in), float(step == save_in), float(step != idle_in))
        due.append(run.completed(said))
        reported.append([event["step"] for event in events])
        if due[-1].stop:
            break
    return events, reported, due


def check_rows(kind=Reports):
    events, reported, _ = trained(kind)
    assert reported == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    for step, row in enumerate(events, 1):
        assert (row["step"], row["loss"], row["targets"], row["grad_norm"]) == (
            step,
            1.0 + step,
            100 * step,
            0.5 + step,
        )
        assert row["lr"] == pytest.approx(1 - step / 5)
        assert row["tokens"] == (32 if step < 5 else 16)


def check_flags(kind=Reports):
    """Heard in the step after the one that they were said in; obeyed once."""
    _, reported, due = trained(kind, stop_in=2)
    assert [(one.stop, one.save) for one in due] == [(False, False), (False, False), (True, True)]
    assert reported[-1] == [1, 2, 3]  # the last one before leaving too
    _, _, due = trained(kind, save_in=2)
    assert [one.save for one in due] == [False, False, True, False, True]
    _, _, due = trained(kind, idle_in=3)
    assert [one.publish for one in due] == [False, False, False, True, False]


def check_save(kind=Reports):
    """What is saved was reported, so was seen to be finite."""
    _, reported, due = trained(kind, every=2)
    assert [one.save for one in due] == [False, True, False, True, True]
    assert reported == [[], [1, 2], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]]


CHECKS = (check_rows, check_flags, check_save)


@pytest.mark.parametrize("check", CHECKS)
def test_late_reports(check):
    check()


def test_the_host_waits_for_the_step_before_and_not_for_the_newest():
    run = StageRun.of(stage(), 20, 0, Reports("s", Stream()))
    run.reports.start_clock()
    for step in range(1, 5):
        run.completed(outcome(step))
        assert len(WORK) == 1  # the newest copy
    assert WAITS == [0, 0, 0]  # each was asked for before the next one was on its way


def test_a_step_that_is_not_finite_is_named_though_it_is_heard_late():
    run = StageRun.of(stage(), 20, 0, Reports("s", Stream()))
    run.reports.start_clock()
    run.completed(Outcome(*(torch.tensor(v).as_subclass(OnDevice) for v in (math.inf, 1.0, 1.0, [0.0, 0.0, 0.0]))))
    with pytest.raises(training.NotFiniteError, match="step 1: the loss is inf"):
        run.completed(outcome(2))


class WrongStep(Reports):
    def flush(self):
        if self._pending is not None:
            self._pending = self._pending._replace(step=self._pending.step + 1)
        super().flush()


class LastOneLost(Reports):
    def stepped(self, step, steps, *others):
        super().stepped(step, steps, *others)
        if step == steps - 1:
            self._pending = None


class LastOneKept(Reports):
    """Reports nothing before a save."""

    def flush(self):
        if self._pending is None or self._pending.step < self._pending.steps:
            super().flush()


class FlagsLater(Reports):
    before = Heard()

    def flush(self):
        pending = self._pending
        super().flush()
        if pending is not None:
            self.heard, self.before = self.before, self.heard


class NotWaiting(_HostCopy):
    def read(self):
        return self._values.tolist()


class RecordedTooEarly(_HostCopy):
    def __init__(self, outcome):
        super().__init__(outcome)
        self._copied.work = self._copied.work[:-1]


@pytest.mark.parametrize("kind", [WrongStep, LastOneLost, LastOneKept, FlagsLater])
def test_the_faults_of_a_late_report_are_caught(kind):
    assert any(caught(check, kind) for check in CHECKS)


@pytest.mark.parametrize("kind", [NotWaiting, RecordedTooEarly])
def test_the_faults_of_a_late_copy_are_caught(kind, monkeypatch):
    monkeypatch.setattr(training, "_HostCopy", kind)
    assert caught(check_rows, Reports)


def caught(check, kind):
    try:
        check(kind)
    except (AssertionError, training.NotFiniteError, ValueError):  # ValueError: a NaN that was read as a whole number
        return True
    return False
