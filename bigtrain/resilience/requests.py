"""What a run is asked for from outside while it trains: to stop, by a signal or its time limit; to save, by a file."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from bigtrain.errors import CheckpointError
from bigtrain.observability.events import CheckpointSaved, CheckpointsPlanned, Evaluation, Event, Step
from bigtrain.observability.stream import Reader

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.5
LOST_POLLS = 10  # between two looks at whether the run's folder is still there


class TimeLimit:
    """A reader of the stream that knows when it is time to save and leave.

    It leaves room for what may lie between two questions, and for the last save: twice the longest step, evaluation and
    save of this attempt so far. A save that nobody has seen yet is reckoned with its size at SLOW_DISK.
    """

    SLOW_DISK = 50e6  # bytes per second
    MARGIN = 5.0  # seconds, for all that is not measured

    def __init__(self, seconds: float, begun: float):
        """begun: as `time.monotonic` gives it."""
        self._until = begun + seconds
        self._step = self._evaluation = self._save = 0.0  # the longest so far, in seconds
        self._save_expected = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Step():
                self._step = max(self._step, event.step_seconds)
            case Evaluation():
                self._evaluation = max(self._evaluation, event.seconds)
            case CheckpointSaved():
                self._save = max(self._save, event.seconds)
            case CheckpointsPlanned():
                self._save_expected = event.bytes / self.SLOW_DISK

    @property
    def reached(self) -> bool:
        reserve = 2 * (self._step + self._evaluation + (self._save or self._save_expected)) + self.MARGIN
        return time.monotonic() >= self._until - reserve


def heard(save_file: Path) -> Path:
    """What the file that asks for a save is called once the run knows of it. Its time is renewed while the run lives;
    the checkpoint's folder is written into it once that is complete, and it vanishes if the run ends before."""
    return save_file.with_name(save_file.name + ".heard")


class Requests:
    """A context in which the first SIGTERM or SIGUSR1 only asks to stop; the second one acts as it did before.

    Outside the main thread, where Python takes no signals, signals change nothing. Also a reader of the stream.
    """

    name = "the answers to `bigtrain save`"

    def __init__(
        self,
        save_file: Path | None = None,
        limit: TimeLimit | None = None,
        check_there: Callable[[], None] = lambda: None,
    ) -> None:
        """save_file: once it is there a save is asked for; see `heard`. check_there: raises CheckpointError where the
        run's folder is lost; looked at now and then, and raised by the next `stop`."""
        self.save = False
        self._asked = False
        self._limit = limit
        self._save_file = save_file
        self._answers: int | None = None  # the step whose checkpoint was asked for
        self._check_there = check_there
        self._lost: CheckpointError | None = None
        self._left = threading.Event()
        self._before: dict[int, Any] = {}

    def readers(self) -> list[Reader]:
        """Itself and its limit, as readers of the stream: an answer that cannot be written does not stop the clock."""
        return [self] if self._limit is None else [self._limit, self]

    def __call__(self, event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == self._answers and self._save_file is not None:
            self._answers = None
            heard(self._save_file).write_text(event.folder, encoding="utf-8")

    @property
    def stop(self) -> bool:
        if self._lost is not None:
            raise self._lost
        return self._asked or (self._limit is not None and self._limit.reached)

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        if self._save_file is not None:
            threading.Thread(target=self._watch, args=(self._save_file,), name="requests", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()
        self._restore()
        if self._save_file is not None and (self.save or self._answers is not None):
            heard(self._save_file).unlink(missing_ok=True)

    def saving(self, step: int) -> None:
        """A save of the state after `step` steps is about to begin."""
        if self.save:
            self._answers = step
        self.save = False

    def _watch(self, file: Path) -> None:
        polls = 0
        while not self._left.wait(POLL_SECONDS):
            polls += 1
            if polls % LOST_POLLS == 0:
                self._look()
            with suppress(OSError):  # who asked has taken it away, or the disk does not answer; it is tried again
                if file.exists():
                    file.replace(heard(file))
                    self.save = True
                elif heard(file).exists():
                    os.utime(heard(file))

    def _look(self) -> None:
        """Notice a folder that is lost, also where no save is due for long."""
        try:
            self._check_there()
        except CheckpointError as error:
            self._lost = error

    def _ask(self, *_: int | FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
