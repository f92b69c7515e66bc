"""What looks at a run between its steps, such as the profiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bigtrain.observability.stream import Stream


class StepHook(Protocol):
    """Called before a stage's first step and after each one, on the ranks that have it; it calls no collective."""

    name: str

    def __call__(self, done: int) -> None:
        """`done` steps of the stage are finished, and the next one has not begun."""
        ...


class StepHooks:
    """The hooks of a stage. One that raises is dropped, and the stream is told: the run goes on without it."""

    def __init__(self, hooks: Iterable[StepHook], stream: Stream):
        self._hooks = list(hooks)
        self._stream = stream

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def __call__(self, done: int) -> None:
        for hook in tuple(self._hooks):
            try:
                hook(done)
            except Exception as error:  # noqa: BLE001 - it only reports, and has libraries of its own
                self._hooks.remove(hook)
                self._stream.lost(hook.name, error)
