"""The one stream of events: the loop emits, readers listen; the loop does not know them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bigtrain.disk import append_lines

Event = dict[str, Any]
Reader = Callable[[Event], None]

METRICS = ("step", "evaluation")  # the kinds that are rows of metrics.jsonl; all others are events


class Stream:
    """What happens in a run, in order. Ranks other than 0 have no readers."""

    def __init__(self, readers: Iterable[Reader] = (), **common: Any):
        self._readers = list(readers)
        self._lock = threading.Lock()  # a checkpoint is told by the thread that writes it
        self._common = common

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell every reader; `fields` are plain numbers, strings, lists and dicts."""
        with self._lock:
            event = {"kind": kind, "time": time.time(), **self._common, **fields}
            for reader in self._readers:
                reader(event)

    def close(self) -> None:
        """Let the readers that hold something open finish it."""
        for reader in self._readers:
            if hasattr(reader, "close"):
                reader.close()


class Files:
    """The reader that writes metrics.jsonl and events.jsonl, a line an event, as it happens."""

    def __init__(self, folder: Path):
        self._metrics = append_lines(folder / "metrics.jsonl")
        self._events = append_lines(folder / "events.jsonl")

    def __call__(self, event: Event) -> None:
        file = self._metrics if event["kind"] in METRICS else self._events
        file.write(json.dumps(event) + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


def read_metrics(folder: Path) -> list[Event]:
    """The rows of metrics.jsonl that count: of each (stage, step, kind) the last one written, in order of steps,
    and of a restarted stage only those since.

    A half-written line, left by a killed run, is passed over.
    """
    rows: dict[tuple[str, int, str], Event] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
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
