"""What cleaning did to the documents of a stage: counts, and a few examples without personal data."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bigtrain.config.schema import Clean
from bigtrain.data.cleaning.redaction import Redaction

EXAMPLES = 3  # of each step
SHOWN = 160  # characters of an example
# In examples any long number is hidden: it may be somebody's, of a form that is unknown or of another country.
NUMBER = re.compile(r"\d(?:[ ().-]{0,2}\d){6,}")
ALWAYS_TOLD = {
    "too short": "min_characters",
    "too long": "max_characters",
    "exact duplicate": "exact_duplicates",
    "near duplicate": "near_duplicates",
    "leaked": "leakage",
}  # reason -> the field that turns it on


@dataclass
class Tally:
    """Documents, their characters, and examples of them."""

    documents: int = 0
    characters: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


class Report:
    """Counts as documents pass. Examples are shown with everything redacted, whatever `redact` says; documents are
    counted from 0."""

    def __init__(self, clean: Clean):
        on = {name for name, value in clean if value not in (None, False, [])}
        self.changed: dict[str, Tally] = {name: Tally() for name in ("repair", "normalize", "redact") if name in on}
        self.dropped = {reason: Tally() for reason, name in ALWAYS_TOLD.items() if name in on}
        self.kinds: Counter[str] = Counter(dict.fromkeys(clean.redact, 0))
        self.sources: list[dict[str, Any]] = []
        self._redaction = Redaction(region=clean.phone_region)

    def change(self, document: str, changes: list[tuple[str, str, str]]) -> None:
        """(step, text before, text after) of all that was changed in a document."""
        for step in dict.fromkeys(step for step, _, _ in changes):
            mine = [(before, after) for name, before, after in changes if name == step]
            tally = self.changed[step]
            tally.documents += 1
            tally.characters += sum(len(before) - len(after) for before, after in mine)
            if len(tally.examples) < EXAMPLES:
                tally.examples.append({"document": document, **self._difference(step, *mine[0])})

    def drop(self, reason: str, document: str, text: str, **facts: Any) -> None:
        """A document that was dropped, with what else is known about it."""
        tally = self.dropped.setdefault(reason, Tally())
        tally.documents += 1
        tally.characters += len(text)
        if len(tally.examples) < EXAMPLES:
            tally.examples.append({"document": document, **facts, "text": _shortened(self._redacted(text))})

    def written(self) -> dict[str, Any]:
        """The report as JSON holds it; the same documents give the same report."""
        total = {
            key: sum(source[key] for source in self.sources)
            for key in ("documents", "held_out", "dropped", "kept", "characters", "characters_kept")
        }
        changed = {
            step: {
                "documents": tally.documents,
                "characters_removed": tally.characters,
                **({"kinds": dict(self.kinds)} if step == "redact" else {}),
                "examples": tally.examples,
            }
            for step, tally in self.changed.items()
        }
        dropped = {reason: vars(tally) for reason, tally in self.dropped.items()}
        return {**total, "sources": self.sources, "changed": changed, "dropped_for": dropped}

    def _redacted(self, text: str) -> str:
        return NUMBER.sub("<NUMBER>", self._redaction(text))

    def _difference(self, step: str, before: str, after: str) -> dict[str, str]:
        """Where two texts part. The one before is left out where either holds anything to redact, however spelt."""
        redacted = self._redacted(after)
        pairs = zip(before, redacted, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(redacted)))
        start = max(0, same - SHOWN // 4)
        shown = {"after": _shortened(redacted[start:])}
        if step == "redact" or redacted != after or self._redacted(before) != before:
            return shown
        return {"before": _shortened(before[start:]), **shown}


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
