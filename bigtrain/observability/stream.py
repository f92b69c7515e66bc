"""The stream of events: the loop emits, readers listen. The loop does not know them, and no failure of one ends it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from bigtrain.disk import append_lines
from bigtrain.errors import one_line
from bigtrain.observability.events import Event, Metric, ReportingFailed
from bigtrain.terminal import say

Reader = Callable[[Event], None]
Row = dict[str, Any]  # of metrics.jsonl or events.jsonl


class Stream:
    """What happens in a run, in order. Ranks other than 0 have no readers.

    A reader that raises is dropped, with a sentence on standard error and an event `reporting_failed` for the others.
    """

    def __init__(self, readers: Iterable[Reader] = ()):
        self._readers = list(readers)
        self._lock = threading.Lock()  # a checkpoint is reported by the thread that writes it

    def emit(self, event: Event) -> None:
        """Tell every reader, with secrets masked."""
        with self._lock:
            self._emit(event)

    def lost(self, what: str, error: BaseException) -> None:
        """Tell of something that only reports, and has failed."""
        with self._lock:
            self._lost(what, error)

    def close(self) -> None:
        """Let the readers that hold something open finish it, last to first: the others hear of a failure."""
        with self._lock:
            while self._readers:
                self._ask(self._readers.pop(), "close")

    def _emit(self, event: Event) -> None:
        event = event.masked()
        for reader in tuple(self._readers):
            self._ask(reader, "__call__", event)

    def _ask(self, reader: Reader, method: str, *arguments: Any) -> None:
        asked = getattr(reader, method, None)
        if asked is None:
            return
        try:
            asked(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tracker's library raises
            if reader in self._readers:
                self._readers.remove(reader)
            self._lost(getattr(reader, "name", type(reader).__name__), error)

    def _lost(self, what: str, error: BaseException) -> None:
        reason = one_line(error)
        say(f"{what}: {reason}. The run goes on without it.", error=True)
        self._emit(ReportingFailed(what=what, reason=reason))


class Files:
    """The reader that writes metrics.jsonl and events.jsonl: a line for each event, with its time (seconds since 1970)
    and the number of the attempt."""

    name = "metrics.jsonl and events.jsonl"

    def __init__(self, folder: Path, attempt: int):
        self._folder = folder
        self._attempt = attempt
        self._files: dict[str, TextIO] = {}

    def __call__(self, event: Event) -> None:
        name = "metrics.jsonl" if isinstance(event, Metric) else "events.jsonl"
        if name not in self._files:
            self._files[name] = append_lines(self._folder / name)
        row = {"time": time.time(), "attempt": self._attempt} | event.row()
        self._files[name].write(json.dumps(row) + "\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def read_metrics(folder: Path) -> list[Row]:
    """The rows of metrics.jsonl that count: of each (stage, step, kind) the last one written, in order of steps,
    and of a restarted stage only those since.

    A half-written line, left by a killed run, is passed over.
    """
    rows: dict[tuple[str, int, str], Row] = {}
    file = folder / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["kind"] == "restarted":
            rows = {key: other for key, other in rows.items() if key[0] != row["stage"]}
            continue
        key = (row["stage"], row["step"], row["kind"])
        rows.pop(key, None)
        rows[key] = row
    stages = list(dict.fromkeys(stage for stage, _, _ in rows))
    return sorted(rows.values(), key=lambda row: (stages.index(row["stage"]), row["step"]))
