"""What cleaning did to the documents of a stage: counts, and a few examples without personal data.

What an example does not show is HIDDEN, a mark of the report's own: `<EMAIL>` and its like stand only where the
training text has them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigtrain.config.schema import CleanConfig
from bigtrain.data.cleaning.boilerplate import SharedLines
from bigtrain.data.cleaning.drops import Drop
from bigtrain.data.cleaning.ngrams import Hashes, hash_words, ngrams
from bigtrain.data.cleaning.redaction import Redaction
from bigtrain.data.cleaning.texts import words

EXAMPLES = 3  # of each step
LINES = 20  # of a source's boilerplate
SHOWN = 160  # characters of an example
HIDDEN, LEFT_OUT = "[hidden]", "[...]"
NOTE = f"{HIDDEN} and {LEFT_OUT} stand for what is not shown here; the texts themselves have it."
# In examples any long number is hidden: it may be somebody's, of a form that is unknown or of another country.
NUMBER = re.compile(r"\d(?:[ ().-]{0,2}\d){6,}")
ALWAYS_TOLD = {
    "too short": "min_characters",
    "too long": "max_characters",
    "exact duplicate": "exact_duplicates",
    "near duplicate": "near_duplicates",
    "leaked": "leakage",
    "nothing but boilerplate": "boilerplate",
}  # reason -> the field that turns it on


@dataclass
class Tally:
    """Documents, their characters, and examples of them. least, most: of what was measured; limit: the lowest."""

    documents: int = 0
    characters: int = 0
    key: str = ""
    least: float | None = None
    most: float | None = None
    limit: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, value: float, limit: float) -> None:
        self.least = value if self.least is None else min(self.least, value)
        self.most = value if self.most is None else max(self.most, value)
        self.limit = limit if self.limit is None else min(self.limit, limit)

    @property
    def range(self) -> str:
        """In words; empty where nothing was measured."""
        if self.least is None or self.most is None:
            return ""
        measured = f"{self.least:g}" if self.least == self.most else f"{self.least:g} to {self.most:g}"
        return f" (measured {measured}, limit {self.limit:g})"


class Report:
    """Counts as documents pass. Examples hide personal data of all kinds, whatever `redact` says.

    held_out: how many documents `leakage` compares with, and how many of them do not count.
    """

    def __init__(self, clean: CleanConfig):
        on = {name for name, value in clean if value not in (None, False, [])}
        steps = ("repair", "normalize", "boilerplate", "redact")
        self.changed: dict[str, Tally] = {name: Tally() for name in steps if name in on}
        self.dropped = {reason: Tally(key=name) for reason, name in ALWAYS_TOLD.items() if name in on}
        self.kinds: Counter[str] = Counter(dict.fromkeys(clean.redact, 0))
        self.sources: list[dict[str, Any]] = []
        self.held_out: dict[str, int] = {}
        self._boilerplate: list[dict[str, Any]] = []
        self._cuts = clean.boilerplate is not None
        self._redaction = Redaction(region=clean.phone_region, placeholder=HIDDEN)

    def change(self, document: str, changes: list[tuple[str, str, str]]) -> None:
        """(step, text before, text after) of all that was changed in a document."""
        for step in dict.fromkeys(step for step, _, _ in changes):
            mine = [(before, after) for name, before, after in changes if name == step]
            tally = self.changed[step]
            tally.documents += 1
            tally.characters += sum(len(before) - len(after) for before, after in mine)
            if len(tally.examples) < EXAMPLES:
                tally.examples.append({"document": document, **self._difference(step, *mine[0])})

    def wants(self, reason: str) -> bool:
        """Whether the next document that is dropped for it is shown."""
        return reason not in self.dropped or len(self.dropped[reason].examples) < EXAMPLES

    def drop(self, drop: Drop, document: str, text: str, shared: tuple[Hashes, int] | None = None) -> None:
        """A document that was dropped. shared: runs of words that another one has, and their length in words."""
        tally = self.dropped.setdefault(drop.reason, Tally(key=drop.key))
        tally.documents += 1
        tally.characters += len(text)
        if drop.value is not None and drop.limit is not None:
            tally.measure(drop.value, drop.limit)
        if len(tally.examples) == EXAMPLES:
            return
        hidden = self._hidden(text)
        metadata = {"document": document, "of": drop.of, "value": drop.value, "limit": drop.limit}
        metadata["shared"] = _longest(hidden, *shared) if shared else None
        known = {name: value for name, value in metadata.items() if value is not None}
        tally.examples.append({**known, "text": _shortened(hidden)})

    def boilerplate(self, source: str, shared: SharedLines) -> None:
        """The lines that many documents of a source share."""
        examples = [{"line": _shortened(self._hidden(line)), "documents": n} for line, n in shared.named[:LINES]]
        told = {"sampled": shared.sampled, "lines": len(shared.named), "cut": self._cuts, "examples": examples}
        self._boilerplate.append({"source": source, **told})

    def total(self, name: str) -> int:
        """Over all sources."""
        return sum(source[name] for source in self.sources)

    def written(self) -> dict[str, Any]:
        """The report as JSON holds it; the same documents give the same report."""
        names = ("documents", "held_out", "dropped", "kept", "characters", "characters_kept")
        changed = {
            step: {
                "documents": tally.documents,
                "characters_removed": tally.characters,
                **({"kinds": dict(self.kinds)} if step == "redact" else {}),
                "examples": tally.examples,
            }
            for step, tally in self.changed.items()
        }
        dropped = {
            reason: {name: value for name, value in vars(tally).items() if value is not None}
            for reason, tally in self.dropped.items()
        }
        return {
            "note": NOTE,
            **{name: self.total(name) for name in names},
            "sources": self.sources,
            "changed": changed,
            "dropped_for": dropped,
            "compared_with_held_out": self.held_out,
            "boilerplate": self._boilerplate,
        }

    def _hidden(self, text: str) -> str:
        return NUMBER.sub(HIDDEN, self._redaction(text))

    def _difference(self, step: str, before: str, after: str) -> dict[str, str]:
        """Where two texts part. The one before is left out where either holds anything to hide, however spelt."""
        hidden = self._hidden(after)
        pairs = zip(before, hidden, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(hidden)))
        start = max(0, same - SHOWN // 4)
        shown = {"after": _shortened(hidden, start)}
        if step == "redact" or hidden != after or self._hidden(before) != before:
            return shown
        return {"before": _shortened(before, start), **shown}


def _longest(text: str, runs: Hashes, n: int) -> str | None:
    """The longest piece of a text, in words as they are compared, all of whose runs of n words are among `runs`."""
    of_text = words(text)
    there = np.isin(ngrams(hash_words(of_text), min(n, len(of_text))), runs)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], there, [0]))))
    begins, ends = edges[::2], edges[1::2]
    if len(begins) == 0:
        return None
    longest = int((ends - begins).argmax())
    return _shortened(" ".join(of_text[begins[longest] : ends[longest] + n - 1]))


def _shortened(text: str, start: int = 0) -> str:
    end = LEFT_OUT if len(text) > start + SHOWN else ""
    return f"{LEFT_OUT if start else ''}{text[start : start + SHOWN]}{end}"
