"""The one stream of events: the loop emits, readers listen. The loop does not know them, and none of them ends it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from bigtrain.disk import append_lines
from bigtrain.errors import one_line
from bigtrain.masking import masked_values
from bigtrain.terminal import say

Event = dict[str, Any]
Reader = Callable[[Event], None]

METRICS = ("step", "evaluation")  # the kinds that are rows of metrics.jsonl; all others are events


class Stream:
    """What happens in a run, in order. Ranks other than 0 have no readers.

    A reader that raises is dropped, with a sentence on standard error and an event `reporting_failed` for the others.
    """

    def __init__(self, readers: Iterable[Reader] = (), **common: Any):
        self._readers = list(readers)
        self._lock = threading.Lock()  # a checkpoint is told by the thread that writes it
        self._common = common

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell every reader; `fields` are plain numbers, strings, lists and dicts. Secrets are masked in events, which
        metrics cannot hold."""
        with self._lock:
            self._emit(kind, fields)

    def lost(self, what: str, error: BaseException) -> None:
        """Tell of something that only reports, and has failed."""
        with self._lock:
            self._lost(what, error)

    def close(self) -> None:
        """Let the readers that hold something open finish it, last to first: the others hear of a failure."""
        with self._lock:
            while self._readers:
                self._ask(self._readers.pop(), "close")

    def _emit(self, kind: str, fields: dict[str, Any]) -> None:
        event = {"kind": kind, "time": time.time(), **self._common, **fields}
        if kind not in METRICS:
            event = masked_values(event)
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
        self._emit("reporting_failed", {"what": what, "reason": reason})


class Files:
    """The reader that writes metrics.jsonl and events.jsonl, a line an event, as it happens."""

    name = "metrics.jsonl and events.jsonl"

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, TextIO] = {}

    def __call__(self, event: Event) -> None:
        name = "metrics.jsonl" if event["kind"] in METRICS else "events.jsonl"
        if name not in self._files:
            self._files[name] = append_lines(self._folder / name)
        self._files[name].write(json.dumps(event) + "\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def read_metrics(folder: Path) -> list[Event]:
    """The rows of metrics.jsonl that count: of each (stage, step, kind) the last one written, in order of steps,
    and of a restarted stage only those since.

    A half-written line, left by a killed run, is passed over.
    """
    rows: dict[tuple[str, int, str], Event] = {}
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
