"""What becomes of the rows of a source: each is used, left to the other side of a split, or dropped for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

COUNTERS = ("dropped", "parts", "unread")


@dataclass
class Tally:
    """Numbers of rows, but where it says documents.

    rows: that were read. other_side: of the training side where this is the held-out one, and the reverse.
    used: with a document in the store. dropped: the others, by reason. parts: documents that were dropped of rows of
    which others are used, by reason. unread: rows with a value of which nothing is used, by its name.
    hidden: files and folders of a folder that are not read for their names. examples: where the first one stands, by
    reason.
    """

    rows: int = 0
    other_side: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is not used."""
        self.dropped[reason] += 1
        self.example(reason, where)

    def example(self, reason: str, where: str) -> None:
        """Remember where the first row stands that something happens to."""
        self.examples.setdefault(reason, where)

    def add(self, later: Tally) -> None:
        """Count what became of rows that come later."""
        self.rows += later.rows
        self.other_side += later.other_side
        self.used += later.used
        self.hidden += later.hidden
        self.dropped += later.dropped
        self.parts += later.parts
        self.unread += later.unread
        for reason, where in later.examples.items():
            self.example(reason, where)

    def metadata(self) -> dict[str, Any]:
        """For a manifest."""
        return vars(self) | {name: dict(getattr(self, name)) for name in COUNTERS}

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Tally:
        """What `metadata` gave."""
        return cls(**metadata | {name: Counter(metadata[name]) for name in COUNTERS})

    @classmethod
    def total(cls, tallies: Iterable[Tally]) -> Tally:
        """Of consecutive rows."""
        whole = cls()
        for tally in tallies:
            whole.add(tally)
        return whole

    @property
    def counted(self) -> int:
        """As many as `rows`, once all of them are counted."""
        return self.other_side + self.used + self.dropped.total()
