"""Which documents of a stage stay: decided once over all its sources, kept in a folder, the same for every reader.

dropped.bin    one byte per document of each source in turn: 0 it stays, else 1 + the number of its reason (uint8)
report.json    counts and examples, to be read
manifest.json  what it was made from, the reasons, how many documents each source has; written last
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.schema import Clean, Source, Stage
from bigtrain.data.cleaning.duplicates import ExactIndex, LeakageIndex, NearIndex
from bigtrain.data.cleaning.ngrams import Hashes, shingles
from bigtrain.data.cleaning.repetition import too_repetitive
from bigtrain.data.cleaning.report import Report
from bigtrain.data.cleaning.texts import Change, TextSteps, row_text, words
from bigtrain.data.sources import Columns, Row, documents, fingerprint, is_held_out
from bigtrain.data.store import MADE_AGAIN, map_file
from bigtrain.disk import make_once
from bigtrain.errors import DataError

VERSION = 1  # of what the steps do; a new one decides anew
HELD_OUT = "held out"  # the reason of documents that are no training documents
LIBRARIES = {"repair": "ftfy", "near_duplicates": "datasketch", "redact": "phonenumberslite"}  # field -> distribution


@dataclass(frozen=True)
class Documents:
    """What of a source is read: all of its documents, or one side of the split by the hash of their keys."""

    source: Source
    fraction: float = 0.0
    held_out: bool = False

    def rows(self, columns: Columns) -> Iterator[tuple[Row, bool]]:
        """Every row of the source, and whether it is on this side."""
        for row in documents(self.source, columns):
            yield row, is_held_out(row["key"], self.fraction) == self.held_out


@dataclass(frozen=True)
class Decisions:
    """Where a stage's decisions lie. settings: its `clean`, whose text steps `steps` are."""

    folder: Path
    settings: Clean
    fingerprint: str

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    @cached_property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))

    @cached_property
    def steps(self) -> TextSteps:
        return TextSteps(self.settings)

    @property
    def facts(self) -> dict[str, Any]:
        """What a token store of the cleaned documents depends on."""
        return {"clean": self.settings.model_dump(), "decisions": self.fingerprint}

    def dropped(self, source: int) -> NDArray[np.uint8]:
        """0 for each document of the stage's source of this number that stays. Raises DataError if they are damaged."""
        counts, file = self.manifest["documents"], self.folder / "dropped.bin"
        begin, size = sum(counts[:source]), file.stat().st_size if file.is_file() else 0
        if size != sum(counts):
            raise DataError(f"{file} has {size} bytes instead of {sum(counts)}. {MADE_AGAIN}")
        return map_file(file, "uint8")[begin : begin + counts[source]]

    def summary(self) -> dict[str, Any]:
        """The report without examples and sources, for an event."""
        report = self.report
        changed = {step: told["documents"] for step, told in report["changed"].items()}
        dropped = {reason: told["documents"] for reason, told in report["dropped_for"].items()}
        kinds = report["changed"].get("redact", {}).get("kinds", {})
        names = ("documents", "held_out", "kept", "characters", "characters_kept")
        totals = {name: report[name] for name in names}
        return {"folder": str(self.folder), **totals, "changed": changed, "redacted": kinds, "dropped": dropped}


def decide(output: str, stage: Stage, columns: Columns, make: bool = True) -> Decisions | None:
    """The decisions about a stage's training documents; None for a stage without `clean`.

    They are made if nobody has; without `make` they may be missing, and only `facts` and `steps` can be asked for.
    Of documents that are alike the first one stays, in the order of the sources. Held-out documents are compared
    with, and stay as they are. One process reads and decides, others wait. Memory holds O(1) per document.
    Raises DataError for sources that cannot be read or of which nothing is left.
    """
    if stage.clean is None:
        return None
    train = [Documents(source, stage.held_out) for source in stage.data]
    held_out = _held_out(stage) if stage.clean.leakage else []
    facts = {
        "version": VERSION,
        "clean": stage.clean.model_dump(),
        "libraries": {
            name: importlib.metadata.version(name)
            for field, name in LIBRARIES.items()
            if getattr(stage.clean, field) not in (None, False, [])
        },
        "train": [_facts(part, columns) for part in train],
        "held_out": [_facts(part, columns) for part in held_out],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    settings = stage.clean
    folder = Path(output) / "stores" / f"clean-{digest[:16]}"

    def build(folder: Path) -> None:
        decisions = _Pass(settings, columns, held_out)
        codes, counts = decisions.over(train)
        if not (codes == 0).any():
            reasons = ", ".join(f"{tally.documents} {name}" for name, tally in decisions.report.dropped.items())
            raise DataError(f"stages.{stage.name}.clean: no training document is left: {reasons}. Make it less strict.")
        codes.tofile(folder / "dropped.bin")
        _write(folder / "report.json", decisions.report.written())
        made = {"reasons": list(decisions.codes), "documents": counts}
        _write(folder / "manifest.json", {"fingerprint": digest, **facts, **made})

    return Decisions(make_once(folder, build) if make else folder, settings, digest)


def kept(rows: Iterable[Row], decisions: Decisions, source: int) -> Iterator[Row]:
    """The training documents of a source that stay; their texts are cleaned by `decisions.steps`.

    rows: all documents of the stage's source of this number, held-out ones too, in their order.
    Raises DataError if they are not those that were decided about.
    """
    missing: Any = object()
    for row, code in itertools.zip_longest(rows, decisions.dropped(source), fillvalue=missing):
        if row is missing or code is missing:
            name = decisions.manifest["train"][source]["source"]
            raise DataError(f"{name}: has changed while it was being read. Start again, once it stays as it is.")
        if code == 0:
            yield row


class _Pass:
    """One way through all documents of a stage, in order, deciding about each."""

    def __init__(self, clean: Clean, columns: Columns, held_out: list[Documents]):
        self.report = Report(clean)
        self.codes = {HELD_OUT: 1}  # reason -> its number in dropped.bin
        self._clean = clean
        self._columns = columns
        self._steps = TextSteps(clean, self.report.kinds)
        self._names: list[tuple[int, str]] = []  # (number of its first document, source)
        self._exact = ExactIndex() if clean.exact_duplicates else None
        self._near = NearIndex(clean.near_duplicates) if clean.near_duplicates else None
        self._leaked_names: list[str] = []
        self._leakage = LeakageIndex(clean.leakage, self._held_out(held_out)) if clean.leakage else None

    def over(self, train: list[Documents]) -> tuple[NDArray[np.uint8], list[int]]:
        """(0 or 1 + reason of each document, number of documents of each source)."""
        codes, counts = bytearray(), []
        for part in train:
            begin = len(codes)
            self._names.append((begin, part.source.source))
            told = {"source": part.source.source, "characters": 0, "characters_kept": 0}
            for row, is_ours in part.rows(self._columns):
                codes.append(self._code(len(codes), row, told) if is_ours else self.codes[HELD_OUT])
            counts.append(len(codes) - begin)
            held_out, kept = codes.count(self.codes[HELD_OUT], begin), codes.count(0, begin)
            dropped = counts[-1] - held_out - kept
            told |= {"documents": counts[-1], "held_out": held_out, "dropped": dropped, "kept": kept}
            self.report.sources.append(told)
        return np.frombuffer(codes, dtype=np.uint8), counts

    def _code(self, number: int, row: Row, told: dict[str, Any]) -> int:
        changes: list[Change] = []
        before = len(row_text(row))
        text = row_text(self._steps(row, changes.append))
        told["characters"] += before
        if changes:
            self.report.change(self._name(number), changes)
        reason, facts = self._reason(number, text)
        if reason is None:
            told["characters_kept"] += len(text)
            return 0
        self.report.drop(reason, self._name(number), text, **facts)
        return self.codes.setdefault(reason, len(self.codes) + 1)

    def _reason(self, number: int, text: str) -> tuple[str | None, dict[str, Any]]:
        """Why a document is dropped, and what is to be told of it; the cheap steps first."""
        clean = self._clean
        if clean.min_characters is not None and len(text) < clean.min_characters:
            return "too short", {}
        if clean.max_characters is not None and len(text) > clean.max_characters:
            return "too long", {}
        first = self._exact.first(number, text) if self._exact else None
        if first is not None:
            return "exact duplicate", {"of": self._name(first)}
        if not (clean.repetition or self._leakage or self._near):
            return None, {}
        of_text = words(text)
        if clean.repetition and (filtered := too_repetitive(text, of_text, clean.repetition)):
            return filtered, {}
        if (
            clean.leakage
            and self._leakage
            and (leak := self._leakage.leaked(shingles(of_text, text, clean.leakage.words)))
        ):
            return "leaked", {"of": self._leaked_names[leak[0]], "overlap": round(leak[1], 4)}
        if clean.near_duplicates and self._near:
            near = self._near.nearest(number, shingles(of_text, text, clean.near_duplicates.words))
            if near is not None:
                return "near duplicate", {"of": self._name(near[0]), "similarity": round(near[1], 4)}
        return None, {}

    def _held_out(self, parts: list[Documents]) -> Iterator[Hashes]:
        """Their n-grams, of texts that went the same way as those that they are compared with."""
        assert self._clean.leakage is not None
        steps = TextSteps(self._clean)
        for part in parts:
            for number, (row, is_ours) in enumerate(part.rows(self._columns)):
                if is_ours:
                    text = row_text(steps(row))
                    self._leaked_names.append(f"{part.source.source}, held-out document {number}")
                    yield shingles(words(text), text, self._clean.leakage.words)

    def _name(self, number: int) -> str:
        """Of a document, for people: its key may be somebody's address."""
        begin, source = next(named for named in reversed(self._names) if named[0] <= number)
        return f"{source}, document {number - begin}"


def _held_out(stage: Stage) -> list[Documents]:
    if stage.evaluate is not None and stage.evaluate.data is not None:
        return [Documents(source) for source in stage.evaluate.data]
    return [Documents(source, stage.held_out, held_out=True) for source in stage.data]


def _facts(part: Documents, columns: Columns) -> dict[str, Any]:
    return {
        **part.source.model_dump(exclude={"weight"}),
        "source_fingerprint": fingerprint(part.source),
        "read_columns": columns,
        "fraction": part.fraction,
        "held_out": part.held_out,
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
