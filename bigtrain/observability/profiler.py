"""Traces some steps of a stage with torch's profiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bigtrain.config.schema import ProfileConfig
from bigtrain.observability.events import Profiled
from bigtrain.observability.stream import Stream


class Profiler:
    """A step hook that writes FOLDER/profile/rank-N.trace.json (chrome://tracing, Perfetto) of the steps first to last,
    counted from 1; on a GPU also rank-N.memory.pickle, for pytorch.org/memory_viz."""

    name = "the profiler"

    def __init__(self, settings: ProfileConfig, stage: str, steps: int, folder: Path, rank: int, stream: Stream):
        """steps: of the whole stage. folder: the stage's. stream: is told of the trace."""
        self._first, self._last = settings.steps[0], min(settings.steps[1], steps)
        self._stage = stage
        self._folder = folder / "profile"
        self._rank = rank
        self._stream = stream
        self._profile: Any = None

    def __call__(self, done: int) -> None:
        if self._profile is not None and done >= self._last:
            trace = self._stop()
            self._stream.emit(Profiled(stage=self._stage, step=done, file=str(trace)))
        elif self._profile is None and self._first - 1 <= done < self._last:
            self._start()

    def _start(self) -> None:
        self._profile = quiet_profile(record_shapes=True, with_stack=False)
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile.start()

    def _stop(self) -> Path:
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"rank-{self._rank}.trace.json"
        self._profile.export_chrome_trace(str(trace))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(trace.with_name(f"rank-{self._rank}.memory.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
        return trace


def quiet_profile(**options: Any) -> torch.profiler.profile:
    """torch's profiler, whose library prints when it starts and stops unless it is told not to."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first start
    return torch.profiler.profile(**options)
