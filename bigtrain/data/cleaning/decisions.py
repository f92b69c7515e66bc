"""Which documents of a stage stay: decided once over all its sources, kept in a folder, the same for every reader.

dropped.bin       one byte per document of each source in turn: 0 it stays, else 1 + the number of its reason (uint8)
boilerplate.json  the hashes of the lines that are cut from each source
report.json       counts and examples, to be read
dropped.jsonl     every dropped document: where it stands, why, the measured value and its limit
manifest.json     what it was made from, the reasons, how many documents each source has; written last

Decisions that leave nothing are refused; report.json and dropped.jsonl of them stay in `clean-*.refused` until
other decisions about the same documents leave some.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.schema import CleanConfig, StageConfig
from bigtrain.data.cleaning.drops import MUCH, overrides
from bigtrain.data.cleaning.judge import Documents, Judge
from bigtrain.data.cleaning.texts import TextSteps
from bigtrain.data.columns import MADE_AGAIN, map_file
from bigtrain.data.fingerprints import fingerprint
from bigtrain.data.sources import Columns, Row
from bigtrain.disk import make_once, remove
from bigtrain.errors import DataError
from bigtrain.masking import masked_values

VERSION = 2  # of what the steps do; a new one decides anew
LIBRARIES = {"repair": "ftfy", "near_duplicates": "datasketch", "redact": "phonenumberslite"}  # field -> distribution


@dataclass(frozen=True)
class Decisions:
    """Where a stage's decisions lie. settings: its `clean`, whose text steps `steps` are."""

    folder: Path
    settings: CleanConfig
    fingerprint: str

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    @cached_property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))

    @cached_property
    def _boilerplate(self) -> list[frozenset[int]]:
        lines = json.loads((self.folder / "boilerplate.json").read_text(encoding="utf-8"))
        return [frozenset(hashes) for hashes in lines]

    @cached_property
    def _steps(self) -> dict[int, TextSteps]:
        return {}

    def steps(self, source: int) -> TextSteps:
        """What is done to the texts of the stage's source of this number."""
        if source not in self._steps:
            lines = self._boilerplate[source] if self.settings.boilerplate else frozenset()
            self._steps[source] = TextSteps(self.settings, lines)
        return self._steps[source]

    @property
    def metadata(self) -> dict[str, Any]:
        """What a token store of the cleaned documents depends on."""
        return {"clean": self.settings.model_dump(), "decisions": self.fingerprint}

    def dropped(self, source: int) -> NDArray[np.uint8]:
        """0 for each document of the stage's source of this number that stays. Raises DataError if they are damaged."""
        counts, file = self.manifest["documents"], self.folder / "dropped.bin"
        begin, size = sum(counts[:source]), file.stat().st_size if file.is_file() else 0
        if size != sum(counts):
            raise DataError(f"{file} has {size} bytes instead of {sum(counts)}. {MADE_AGAIN}")
        return map_file(file, "uint8")[begin : begin + counts[source]]

    def dropped_for(self, source: int) -> dict[str, int]:
        """How many documents of the stage's source of this number do not stay, by reason; held-out ones are one."""
        numbers = np.bincount(self.dropped(source), minlength=len(self.manifest["reasons"]) + 1)[1:]
        return {reason: int(n) for reason, n in zip(self.manifest["reasons"], numbers, strict=True) if n}

    def summary(self) -> dict[str, Any]:
        """The report without examples and sources, for an event."""
        report = self.report
        changed = {step: told["documents"] for step, told in report["changed"].items()}
        dropped = {reason: told["documents"] for reason, told in report["dropped_for"].items()}
        kinds = report["changed"].get("redact", {}).get("kinds", {})
        names = ("documents", "held_out", "kept", "characters", "characters_kept")
        totals = {name: report[name] for name in names} | {"warning": report["warning"]}
        return {"folder": str(self.folder), **totals, "changed": changed, "redacted": kinds, "dropped": dropped}


def decide(stores: Path, stage: StageConfig, columns: Columns, make: bool = True) -> Decisions | None:
    """The decisions about a stage's training documents; None for a stage without `clean`.

    They are made if nobody has; without `make` they may be missing, and only `metadata` can be asked for.
    Of documents that are alike the first one stays, in the order of the sources. Held-out documents are compared
    with, and stay as they are. One process reads and decides, others wait. Memory: O(1) per document, and a sample.
    Raises DataError for sources that cannot be read or of which nothing is left.
    """
    if stage.clean is None:
        return None
    train = [Documents(source, stage.held_out) for source in stage.data]
    held_out = _held_out(stage) if stage.clean.leakage else []
    metadata = {
        "version": VERSION,
        "clean": stage.clean.model_dump(),
        "libraries": {
            name: importlib.metadata.version(name)
            for field, name in LIBRARIES.items()
            if getattr(stage.clean, field) not in (None, False, [])
        },
        "train": [_facts(part, columns, stores) for part in train],
        "held_out": [_facts(part, columns, stores) for part in held_out],
    }
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    settings = stage.clean
    folder = stores / f"clean-{digest[:16]}"
    data = hashlib.sha256(json.dumps(metadata["train"], sort_keys=True).encode()).hexdigest()
    refused = stores / f"clean-{data[:16]}.refused"  # of these documents, whatever is done to them

    def build(empty: Path) -> None:
        with (empty / "dropped.jsonl").open("w", encoding="utf-8") as every_drop:
            judge = Judge(settings, columns, train, held_out, every_drop)
            codes, counts = judge.over()
        warning = _warning(stage, judge)
        _write(empty / "report.json", judge.report.written() | {"warning": warning})
        if not (codes == 0).any():
            raise DataError(f"{warning}\n{_kept_for_reading(empty, refused)}")
        remove(refused)
        codes.tofile(empty / "dropped.bin")
        _write(empty / "boilerplate.json", [sorted(shared.hashes) for shared in judge.shared])
        names = [part.source.source for part in train]
        made = {"reasons": list(judge.codes), "documents": counts, "sources": names}
        _write(empty / "manifest.json", {"fingerprint": digest, **metadata, **made})

    return Decisions(make_once(folder, build) if make else folder, settings, digest)


def _warning(stage: StageConfig, judge: Judge) -> str | None:
    """What to do if too much was dropped, in words; None if it was not."""
    report = judge.report
    documents, dropped = report.total("documents") - report.total("held_out"), report.total("dropped")
    if dropped <= MUCH * documents or stage.clean is None:
        return None
    left = "no training document is left" if dropped == documents else f"{dropped / documents:.0%} were dropped"
    most = sorted(report.dropped.items(), key=lambda item: -item[1].documents)
    reasons = ", ".join(f"{tally.documents:,} {name}{tally.range}" for name, tally in most if tally.documents)
    changes = overrides(stage.name, judge.advice.changes(stage.clean))
    told = f"stages.{stage.name}.clean: {left} of {documents:,}: {reasons}. Most of them stay with `{changes}`."
    lines = sum(len(shared.named) for shared in judge.shared)
    if lines and stage.clean.boilerplate is None:
        told += (
            f" {lines} lines stand in many documents of a source (report.json, `boilerplate`): they may be why. "
            f"`stages.{stage.name}.clean.boilerplate={{}}` cuts them."
        )
    return told


def _kept_for_reading(made: Path, refused: Path) -> str:
    """Put the report of refused decisions where it stays; returns a sentence that says where."""
    shutil.rmtree(refused, ignore_errors=True)
    refused.mkdir()
    for name in ("report.json", "dropped.jsonl"):
        (made / name).rename(refused / name)
    return (
        f"Every dropped document, with what was measured and its limit, is in {refused}/dropped.jsonl; examples with "
        f"the words that they share are in {refused}/report.json."
    )


def kept(rows: Iterable[Row], decisions: Decisions, source: int) -> Iterator[Row]:
    """The training documents of a source that stay; their texts are cleaned by `decisions.steps(source)`.

    rows: all documents of the stage's source of this number, held-out ones too, in their order.
    Raises DataError if they are not those that were decided about.
    """
    missing: Any = object()
    for row, code in itertools.zip_longest(rows, decisions.dropped(source), fillvalue=missing):
        if row is missing or code is missing:
            name = decisions.manifest["sources"][source]
            raise DataError(f"{name}: has changed while it was being read. Start again, once it stays as it is.")
        if code == 0:
            yield row


def _held_out(stage: StageConfig) -> list[Documents]:
    if stage.evaluate is not None and stage.evaluate.data is not None:
        return [Documents(source) for source in stage.evaluate.data]
    return [Documents(source, stage.held_out, held_out=True) for source in stage.data]


def _facts(part: Documents, columns: Columns, stores: Path) -> dict[str, Any]:
    """What decides which documents these are; `source_fingerprint` stands for the source, but for its columns."""
    return {
        "columns": part.source.columns,
        "source_fingerprint": fingerprint(part.source, stores),
        "read_columns": columns,
        "fraction": part.fraction,
        "held_out": part.held_out,
    }


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(masked_values(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
