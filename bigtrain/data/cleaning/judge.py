"""One way through all training documents of a stage, in order: each stays or is dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.clean import Boilerplate
from bigtrain.config.schema import CleanConfig, SourceConfig
from bigtrain.data.cleaning.boilerplate import NOTHING_SHARED, SharedLines, draw, shared_lines
from bigtrain.data.cleaning.drops import Advice, Drop
from bigtrain.data.cleaning.duplicates import ExactIndex, LeakageIndex, NearIndex
from bigtrain.data.cleaning.ngrams import Hashes, shingles
from bigtrain.data.cleaning.repetition import too_repetitive
from bigtrain.data.cleaning.report import Report
from bigtrain.data.cleaning.texts import Change, TextSteps, row_text, words
from bigtrain.data.sources import Columns, Row, documents, is_held_out
from bigtrain.masking import masked_values

HELD_OUT = "held out"  # the reason of documents that are no training documents


@dataclass(frozen=True)
class Documents:
    """What of a source is read: all of its documents, or one side of the split by the hash of their keys."""

    source: SourceConfig
    fraction: float = 0.0
    held_out: bool = False

    def rows(self, columns: Columns) -> Iterator[tuple[Row, bool]]:
        """Every row of the source, and whether it is on this side."""
        for row in documents(self.source, columns):
            yield row, is_held_out(row["key"], self.fraction) == self.held_out


class Judge:
    """Decides about each training document.

    shared: of each source the lines that many of its documents have. report: counts and examples of what was decided.
    advice: what would have to be changed for most of the dropped documents to stay.
    """

    def __init__(
        self,
        clean: CleanConfig,
        columns: Columns,
        train: list[Documents],
        held_out: list[Documents],
        every_drop: TextIO,
    ):
        """every_drop: gets a line of JSON for each dropped document."""
        self.report = Report(clean)
        self.advice = Advice()
        self.codes = {HELD_OUT: 1}  # reason -> its number in dropped.bin
        self._clean, self._columns, self._train, self._every_drop = clean, columns, train, every_drop
        self._where: list[str] = []  # the documents stand, as far as later ones may be like them
        self._exact = ExactIndex() if clean.exact_duplicates else None
        self._near = NearIndex(clean.near_duplicates) if clean.near_duplicates else None
        samples = self._samples()
        self.shared = [self._shared_lines(texts) for texts in samples]
        self._steps = [TextSteps(clean, self._cut(shared), self.report.kinds) for shared in self.shared]
        self._leaked_names: list[str] = []
        self._leakage = self._index(held_out, samples) if clean.leakage else None
        for part, shared in zip(train, self.shared, strict=True):
            self.report.boilerplate(part.source.source, shared)

    def over(self) -> tuple[NDArray[np.uint8], list[int]]:
        """(0 or 1 + reason of each document, number of documents of each source)."""
        codes, counts = bytearray(), []
        for part, steps in zip(self._train, self._steps, strict=True):
            begin = len(codes)
            told = {"source": part.source.source, "characters": 0, "characters_kept": 0}
            for row, is_ours in part.rows(self._columns):
                if self._exact or self._near:
                    self._where.append(row["where"])
                codes.append(self._code(len(codes), row, steps, told) if is_ours else self.codes[HELD_OUT])
            counts.append(len(codes) - begin)
            held_out, kept = codes.count(self.codes[HELD_OUT], begin), codes.count(0, begin)
            dropped = counts[-1] - held_out - kept
            told |= {"documents": counts[-1], "held_out": held_out, "dropped": dropped, "kept": kept}
            self.report.sources.append(told)
        return np.frombuffer(codes, dtype=np.uint8), counts

    def _code(self, number: int, row: Row, steps: TextSteps, told: dict[str, Any]) -> int:
        changes: list[Change] = []
        before = row_text(row)
        text = row_text(steps(row, changes.append))
        told["characters"] += len(before)
        if changes:
            self.report.change(row["where"], changes)
        reasons = self._reasons(number, before, text)
        drop = next(reasons, None)
        if drop is None:
            told["characters_kept"] += len(text)
            return 0
        if self.advice.collects:
            self.advice.add([drop, *reasons])
        self.report.drop(drop, row["where"], text, self._runs_shared(drop))
        metadata = {
            "document": row["where"],
            **{name: value for name, value in asdict(drop).items() if value is not None},
        }
        self._every_drop.write(json.dumps(masked_values(metadata), ensure_ascii=False) + "\n")
        return self.codes.setdefault(drop.reason, len(self.codes) + 1)

    def _reasons(self, number: int, before: str, text: str) -> Iterator[Drop]:
        """Why a document is dropped, the cheap steps first, each looked for when it is asked for. One that something
        else drops is not compared with others for likeness."""
        stays = True
        of_text: list[str] = []
        for drop in self._lengths(before, text):
            stays = False
            yield drop
        first = self._exact.first(number, text) if self._exact else None
        if first is not None:
            stays = False
            yield Drop("exact duplicate", "exact_duplicates", of=self._where[first])
        if self._clean.repetition or self._leakage or self._near:
            of_text = words(text)
        if self._clean.repetition:
            for drop in too_repetitive(text, of_text, self._clean.repetition):
                stays = False
                yield drop
        if self._clean.leakage and self._leakage:
            leak = self._leakage.leaked(shingles(of_text, text, self._clean.leakage.words))
            if leak is not None:
                stays = False
                of = self._leaked_names[leak[0]]
                yield Drop("leaked", "leakage", round(leak[1], 4), self._clean.leakage.overlap, of)
        if stays and self._clean.near_duplicates and self._near:
            settings = self._clean.near_duplicates
            near = self._near.nearest(number, shingles(of_text, text, settings.words))
            if near is not None:
                of = self._where[near[0]]
                yield Drop("near duplicate", "near_duplicates", round(near[1], 4), settings.threshold, of)

    def _lengths(self, before: str, text: str) -> Iterator[Drop]:
        clean = self._clean
        if clean.boilerplate and before.strip() and not text.strip():
            yield Drop("nothing but boilerplate", "boilerplate")
        if clean.min_characters is not None and len(text) < clean.min_characters:
            yield Drop("too short", "min_characters", len(text), clean.min_characters)
        if clean.max_characters is not None and len(text) > clean.max_characters:
            yield Drop("too long", "max_characters", len(text), clean.max_characters)

    def _samples(self) -> list[list[str]]:
        """Texts of each source, as they are when boilerplate is cut; none where nothing asks what documents share."""
        if not (self._clean.boilerplate or self._clean.repetition or self._clean.leakage):
            return [[] for _ in self._train]
        steps = TextSteps(self._clean.model_copy(update={"redact": []}))
        drawn = (
            draw((row_text(row) for row, is_ours in part.rows(self._columns) if is_ours), len(self._train))
            for part in self._train
        )
        return [[row_text(steps({"text": text})) for text in texts] for texts in drawn]

    def _shared_lines(self, texts: list[str]) -> SharedLines:
        """Of plain documents; what conversations share is said by somebody."""
        if ("text",) not in self._columns:
            return NOTHING_SHARED
        return shared_lines(texts, self._clean.boilerplate or Boilerplate())

    def _cut(self, *shared: SharedLines) -> frozenset[int]:
        """The lines that are cut."""
        return frozenset().union(*(s.hashes for s in shared)) if self._clean.boilerplate else frozenset()

    def _index(self, held_out: list[Documents], samples: list[list[str]]) -> LeakageIndex:
        """Of texts that went the same way as those that they are compared with."""
        settings = self._clean.leakage
        assert settings is not None
        steps = TextSteps(self._clean, self._cut(*self.shared))

        def runs(row: Row) -> Hashes:
            text = row_text(steps(row))
            return shingles(words(text), text, settings.words)

        def held_out_runs() -> Iterator[Hashes]:
            for part in held_out:
                for row, is_ours in part.rows(self._columns):
                    if is_ours:
                        self._leaked_names.append(row["where"])
                        yield runs(row)

        index = LeakageIndex(settings, held_out_runs(), (runs({"text": text}) for texts in samples for text in texts))
        self.report.held_out = {"documents": len(self._leaked_names), "do_not_count": index.uncounted}
        return index

    def _runs_shared(self, drop: Drop) -> tuple[Hashes, int] | None:
        """The runs of words of the held-out document that a leaked one is like, and their length; for an example."""
        if not (self._leakage and self._clean.leakage and drop.key == "leakage" and self.report.wants(drop.reason)):
            return None
        return self._leakage.runs_of(self._leaked_names.index(str(drop.of))), self._clean.leakage.words
