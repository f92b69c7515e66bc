"""Looks at some steps of a stage with torch's profiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bigtrain.config.schema import ProfileConfig


class Profiler:
    """Writes FOLDER/profile/rank-N.trace.json (chrome://tracing, Perfetto) of the steps first to last, counted from 1;
    on a GPU also rank-N.memory.pickle, for pytorch.org/memory_viz."""

    def __init__(self, first: int, last: int, folder: Path, rank: int):
        self._first, self._last = first, last
        self._folder = folder / "profile"
        self._rank = rank
        self._profile: Any = None

    @classmethod
    def of(cls, settings: ProfileConfig | None, folder: Path, rank: int) -> Profiler | None:
        return None if settings is None else cls(settings.steps[0], settings.steps[1], folder, rank)

    def between_steps(self, done: int, steps: int) -> Path | None:
        """To be called whenever `done` of `steps` are finished and no other has begun; the trace once it is written."""
        if self._profile is not None and done >= min(self._last, steps):
            return self._stop()
        if self._profile is None and self._first - 1 <= done < min(self._last, steps):
            self._start()
        return None

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
        self._first = self._last + 1  # once
        return trace


def quiet_profile(**options: Any) -> torch.profiler.profile:
    """torch's profiler, whose library prints when it starts and stops unless it is told not to."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first start
    return torch.profiler.profile(**options)
