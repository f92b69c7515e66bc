"""Sources -> tokenizer and token stores, each made once and found again by a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bigtrain.config.schema import Run, Source, Stage, TrainTokenizer
from bigtrain.data.sources import COLUMNS, Columns, Row, documents, fingerprint, is_held_out
from bigtrain.data.store import FORMAT, Store, make_once, open_store
from bigtrain.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from bigtrain.data.writing import Document, Layout, write_store
from bigtrain.errors import ConfigError, DataError

BATCH_CHARACTERS = 2_000_000  # of text, given to the tokenizer's threads at once


class Encoder(Protocol):
    """What a task says about its documents."""

    layout: str  # of the store: `windows` or `bins`
    encoding: str  # name and version of what `encode` does; a new version makes new stores
    columns: Columns  # the sets of columns that it can read

    def encode(self, rows: list[Row], tokenizer: Any) -> list[Document]:
        """(ids, which of them are trained or None for all) of each row; empty if there is nothing to learn.
        Raises DataError if the tokenizer lacks a special token that the encoding needs."""
        ...


@dataclass(frozen=True)
class StageData:
    """The stores of a stage, one per source, in the order of the run's file.

    weights: one per training store, or None if they are taken as one.
    held_out: empty without `evaluate`.
    """

    train: list[Store]
    weights: list[float] | None
    held_out: list[Store]


@dataclass(frozen=True)
class Part:
    """Some of the documents of a source: one side of a split by the hash of their keys."""

    source: Source
    fraction: float = 0.0
    held_out: bool = False

    def documents(self, columns: Columns) -> Iterator[Row]:
        rows = documents(self.source, columns)
        return (row for row in rows if is_held_out(row["key"], self.fraction) == self.held_out)

    def facts(self, columns: Columns) -> dict[str, Any]:
        """What decides which documents these are, in words; `source_fingerprint` stands for their content."""
        side = "held-out side" if self.held_out else "training side" if self.fraction else "all"
        return {
            "source": self.source.source,
            "source_fingerprint": fingerprint(self.source.source),
            "columns": {ours: self.source.columns.get(ours, ours) for ours in (*itertools.chain(*columns), "key")},
            "held_out": self.fraction,
            "documents_are": side,
        }


def prepare_tokenizer(run: Run) -> str:
    """The folder or Hub id of the run's tokenizer; trains it first if the run says so and nobody has.

    It learns from the training documents of the first stage; the sources take turns, document by document.
    """
    if run.tokenizer is None or run.tokenizer.train is None:
        given = run.model.from_pretrained if run.tokenizer is None else run.tokenizer.from_pretrained
        if given is None:
            raise ConfigError("tokenizer: give either train or from_pretrained.")
        return given
    train: TrainTokenizer = run.tokenizer.train
    stage = run.stages[0]
    columns = COLUMNS[stage.task]
    parts = [Part(source, stage.held_out) for source in stage.data]
    facts = {
        "format": FORMAT,
        "kind": "byte-level BPE",
        "vocab_size": train.vocab_size,
        "sample_bytes": train.sample_bytes,
        "documents": [part.facts(columns) for part in parts],
    }

    def build(folder: Path) -> None:
        turns = itertools.zip_longest(*(part.documents(columns) for part in parts))
        rows = (row for turn in turns for row in turn if row is not None)
        texts = (_text(row) for row in rows)
        train_tokenizer(texts, train.vocab_size, train.sample_bytes, folder)
        (folder / "manifest.json").write_text(json.dumps(facts, indent=2) + "\n")

    return str(make_once(_folder(run, "tokenizer", facts), build))


def open_tokenizer(run: Run) -> Any:
    """The run's tokenizer, with the tokens that it adds; trained first where that is due."""
    return load_tokenizer(prepare_tokenizer(run), run.tokenizer.add_tokens if run.tokenizer else ())


def prepare_stage(run: Run, stage: Stage, task: Encoder, tokenizer: Any) -> StageData:
    """Open the token stores of a stage; those that no run with the same ingredients has left are made first.

    Raises DataError for sources that cannot be read or hold too little.
    """
    train = [Part(source, stage.held_out) for source in stage.data]
    evaluation: list[Part] = []
    if stage.evaluate is not None and stage.evaluate.data is not None:
        evaluation = [Part(source) for source in stage.evaluate.data]
    elif stage.evaluate is not None:
        evaluation = [Part(source, stage.held_out, held_out=True) for source in stage.data]
    weights = [source.weight for source in stage.data if source.weight is not None]
    return StageData(
        train=[_store(run, stage, part, task, tokenizer) for part in train],
        weights=weights or None,
        held_out=[_store(run, stage, part, task, tokenizer) for part in evaluation],
    )


def _store(run: Run, stage: Stage, part: Part, task: Encoder, tokenizer: Any) -> Store:
    layout = Layout(task.layout)
    if task.layout == "bins":
        layout = Layout("bins", stage.sequence_length, _pad_id(tokenizer))
    facts = part.facts(task.columns) | {
        "encoding": task.encoding,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "seed": run.seed,
    }
    ingredients = facts | {"format": FORMAT, "layout": layout.name, "sequence_length": layout.sequence_length}

    def build(folder: Path) -> None:
        batches = _batched(part.documents(task.columns))
        write_store(
            folder,
            itertools.chain.from_iterable(task.encode(rows, tokenizer) for rows in batches),
            layout,
            vocabulary_size=len(tokenizer),
            seed=run.seed,
            facts=facts | {"fingerprint": _hash(ingredients)},
        )

    return open_store(make_once(_folder(run, layout.name, ingredients), build), stage.sequence_length)


def _pad_id(tokenizer: Any) -> int:
    """Of the unused tail of a bin, which no target looks at: any id of the vocabulary will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError("the tokenizer has neither a pad nor an end token, which finetuning needs.")


def _text(row: Row) -> str:
    """All that a row says, for training a tokenizer."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return "".join(value for name, value in row.items() if name != "key")


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(_text(row))
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _folder(run: Run, kind: str, ingredients: dict[str, Any]) -> Path:
    return Path(run.output) / "stores" / f"{kind}-{_hash(ingredients)[:16]}"


def _hash(ingredients: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
