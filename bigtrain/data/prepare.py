"""Sources -> tokenizer and token stores, each made once and found again by a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config.model import TrainTokenizerConfig
from bigtrain.config.schema import SourceConfig, StageConfig
from bigtrain.config.sources import kind_of
from bigtrain.data.cleaning import HELD_OUT, Decisions, decide, kept
from bigtrain.data.cut_answers import check_count, check_sample
from bigtrain.data.files import Row, Unusable, hidden
from bigtrain.data.fingerprints import CHANGED, fingerprint
from bigtrain.data.order import stage_samples
from bigtrain.data.shards import Shards, batched, text_of
from bigtrain.data.sources import Columns, documents, is_held_out, names_of, refused, size_of
from bigtrain.data.store import FORMAT, Store, open_store
from bigtrain.data.tally import Tally
from bigtrain.data.tokenizer import num_ids, tokenizer_fingerprint, train_tokenizer
from bigtrain.data.types import Answer, Answered, Layout
from bigtrain.data.writing import Encoded, assemble, gather, token_dtype
from bigtrain.disk import is_made, make_once, remove
from bigtrain.errors import DataError
from bigtrain.masking import masked
from bigtrain.observability.stream import Stream

if TYPE_CHECKING:
    from bigtrain.tasks import Task

BATCH_BYTES = 2_000_000  # of text, given to the tokenizer's threads at once


@dataclass(frozen=True)
class StageData:
    """The stores of a stage, one per source, in the order of the run's file.

    weights: one per training store, or None if they are taken as one.
    held_out: empty without `evaluate`. cleaning: what was decided about the training documents, with `clean`.
    """

    train: list[Store]
    weights: list[float] | None
    held_out: list[Store]
    cleaning: Decisions | None = None

    def samples(self, stage: StageConfig) -> int:
        """That the whole stage trains on."""
        return stage_samples(stage, [store.samples for store in self.train])


@dataclass(frozen=True)
class SourcePart:
    """Some of the documents of a source: one side of a split by the hash of their keys.

    stores: the folder of what is made of documents. cleaning: decides which of them stay; number: of the source among
    those that it is about.
    """

    source: SourceConfig
    stores: Path
    fraction: float = 0.0
    held_out: bool = False
    cleaning: Decisions | None = None
    number: int = 0

    def documents(self, columns: Columns, tally: Tally | None = None) -> Iterator[Row]:
        """Those that stay, as they stand in the source. tally: counts what becomes of the others."""
        tally = Tally() if tally is None else tally
        rows = documents(self.source, columns, tally)
        if self.cleaning is not None:
            rows = kept(rows, self.cleaning, self.number)
            self._count_cleaned(self.cleaning, tally)
        for row in rows:
            if is_held_out(row["key"], self.fraction) == self.held_out:
                yield row
            else:
                tally.other_side += 1

    def _count_cleaned(self, cleaning: Decisions, tally: Tally) -> None:
        for reason, number in cleaning.dropped_for(self.number).items():
            if reason == HELD_OUT:
                tally.other_side += number
            else:
                tally.dropped[f"{reason} (clean)"] += number
                tally.example(f"{reason} (clean)", str(cleaning.folder / "report.json"))

    def cleaned(self, row: Row) -> Row:
        """One of the documents as it is tokenized; apart from `documents`, so that processes share this work."""
        return row if self.cleaning is None else self.cleaning.steps(self.number)(row)

    def size(self) -> int | None:
        """Bytes of its text, about; None if the source's files do not say."""
        whole = size_of(self.source)
        share = self.fraction if self.held_out else 1 - self.fraction
        return None if whole is None else round(whole * share)

    def metadata(self, columns: Columns) -> dict[str, Any]:
        """What decides which documents these are; `source_fingerprint` stands for their content, wherever it lies."""
        side = "held-out side" if self.held_out else "training side" if self.fraction else "all"
        return {
            "source_fingerprint": fingerprint(self.source, self.stores),
            "columns": {ours: self.source.columns.get(ours, ours) for ours in names_of(columns)},
            "held_out": self.fraction,
            "documents_are": side,
            **({"clean": None} if self.cleaning is None else self.cleaning.metadata),
        }


@dataclass(frozen=True)
class Recipe:
    """How documents become the samples of a store. seed: of the order in which the store holds them."""

    task: Task
    tokenizer: Any
    layout: Layout
    seed: int


def training_parts(stage: StageConfig, columns: Columns, stores: Path, make: bool = True) -> list[SourcePart]:
    """The training documents of a stage. Without `make`, the decisions of its `clean` may be missing."""
    cleaning = decide(stores, stage, columns, make)
    return [
        SourcePart(source, stores, stage.held_out, False, cleaning, number) for number, source in enumerate(stage.data)
    ]


def held_out_parts(stage: StageConfig, stores: Path) -> list[SourcePart]:
    """The documents that a stage holds out for its evaluations."""
    if stage.evaluate is not None and stage.evaluate.data is not None:
        return [SourcePart(source, stores) for source in stage.evaluate.data]
    return [SourcePart(source, stores, stage.held_out, held_out=True) for source in stage.data]


def prepare_tokenizer(train: TrainTokenizerConfig, stage: StageConfig, stores: Path) -> Path:
    """The folder of a tokenizer that learns from the training documents of a stage; trained unless that has been done.

    The sources take turns, document by document.
    """
    columns = stage.task.columns
    parts = training_parts(stage, columns, stores)
    metadata = {
        "format": FORMAT,
        "kind": "byte-level BPE",
        "vocab_size": train.vocab_size,
        "sample_bytes": train.sample_bytes,
        "documents": [part.metadata(columns) for part in parts],
    }

    def build(folder: Path) -> None:
        turns = itertools.zip_longest(*(map(part.cleaned, part.documents(columns)) for part in parts))
        rows = (row for turn in turns for row in turn if row is not None)
        texts = (text_of(row) for row in rows)
        train_tokenizer(texts, train.vocab_size, train.sample_bytes, folder)
        (folder / "manifest.json").write_text(json.dumps(metadata, indent=2) + "\n")

    return make_once(_folder(stores, "tokenizer", metadata), build)


def prepare_stage(
    stage: StageConfig, task: Task, tokenizer: Any, *, stores: Path, seed: int, stream: Stream | None = None
) -> StageData:
    """Open the token stores of a stage; those that no run with the same ingredients has left are made first.

    stores: the folder that they lie in. Processes that call it at the same time share the work: ranks of a run, or
    several runs. Raises DataError for sources that cannot be read or hold too little, and for a disk without room.
    """
    stream = stream or Stream()
    parts = training_parts(stage, task.columns, stores)
    weights = [source.weight for source in stage.data if source.weight is not None]
    recipe = Recipe(task, tokenizer, _layout(task, tokenizer, stage.sequence_length), seed)
    train = [_store(part, recipe, stage, stream, is_trained_on=True) for part in parts]
    evaluates = stage.evaluate is not None
    held_out = prepare_held_out(stage, task, tokenizer, stores=stores, seed=seed, stream=stream) if evaluates else []
    return StageData(train, weights or None, held_out, parts[0].cleaning)


def prepare_held_out(
    stage: StageConfig, task: Task, tokenizer: Any, *, stores: Path, seed: int, stream: Stream | None = None
) -> list[Store]:
    """The stores of `held_out_parts`; as `prepare_stage`."""
    recipe = Recipe(task, tokenizer, _layout(task, tokenizer, stage.sequence_length), seed)
    parts = held_out_parts(stage, stores)
    return [_store(part, recipe, stage, stream or Stream(), is_trained_on=False) for part in parts]


def prepare_parts(parts: Sequence[SourcePart], task: Task, tokenizer: Any, sequence_length: int) -> list[Store]:
    """A store of each part; as `prepare_stage`."""
    recipe = Recipe(task, tokenizer, _layout(task, tokenizer, sequence_length), seed=0)
    return [open_store(_make(part, recipe, Stream()), sequence_length) for part in parts]


def counts(store: Store) -> dict[str, Any]:
    """What of a store's manifest is worth telling."""
    names = ("source", "documents_are", "documents", "tokens", "targets", "fill")
    about_rows = (
        "rows",
        "other_side",
        "used",
        "dropped",
        "parts",
        "unread",
        "hidden",
        "examples",
        "split",
        "cut",
        "cut_tokens",
    )
    metadata = {name: store.manifest[name] for name in (*names, *about_rows) if name in store.manifest}
    return {"sequences": store.samples} | metadata | {"left_over": store.left_over}


def _layout(task: Task, tokenizer: Any, sequence_length: int) -> Layout:
    if task.layout == "windows":
        return Layout(task.layout)
    way = None if task.long_documents is None else task.long_documents.way
    return Layout(task.layout, sequence_length, _pad_id(tokenizer), way, task.store_columns)


def _store(part: SourcePart, recipe: Recipe, stage: StageConfig, stream: Stream, is_trained_on: bool) -> Store:
    def encode(rows: list[Row]) -> list[Answer]:
        return [answer for _, answer in _answers(rows, part, recipe)]

    def check() -> None:
        if rule is not None and rule.max_cut_answers < 1:
            check_sample(part.documents(recipe.task.columns), part.size(), encode, stage, rule, part.source.source)

    rule = recipe.task.long_documents if is_trained_on else None
    rule = None if rule is None or rule.way == "drop" else rule
    folder = _make(part, recipe, stream, check)
    store = open_store(folder, stage.sequence_length, document_mask=not stage.cross_document_attention)
    store.manifest["source"] = masked(part.source.source)  # the same data may have been elsewhere when it was made
    if rule is not None:
        answers, cut = store.manifest["answers"], store.manifest["cut_answers"]
        rows = part.documents(recipe.task.columns)
        check_count(answers, cut, rows, encode, stage, rule, part.source.source)
    return store


def _make(part: SourcePart, recipe: Recipe, stream: Stream, check: Callable[[], None] = lambda: None) -> Path:
    """The folder of a store; unless it is there, `check` is called, and this process takes part in making it."""
    task, layout = recipe.task, recipe.layout
    what = part.metadata(task.columns) | {
        "encoding": task.encoding,
        "tokenizer": tokenizer_fingerprint(recipe.tokenizer),
        "seed": recipe.seed,
    }
    ingredients = what | {"format": FORMAT, "layout": layout.name, "sequence_length": layout.sequence_length}
    if layout.long_conversations is not None:
        ingredients |= {"long_conversations": layout.long_conversations}
    folder = _folder(part.stores, layout.name, ingredients)
    if not is_made(folder):
        check()
        metadata = {"source": masked(part.source.source)} | what | {"fingerprint": _hash(ingredients)}
        _take_part(folder, part, recipe, metadata, stream)
    if (shards := _shards_of(folder)).exists():
        remove(shards)
    return folder


def _take_part(folder: Path, part: SourcePart, recipe: Recipe, metadata: dict[str, Any], stream: Stream) -> None:
    """Take part in making a store; it is there afterwards."""
    layout, dtype = recipe.layout, token_dtype(num_ids(recipe.tokenizer))

    def encode(rows: list[Row]) -> Encoded:
        return gather(_answers(rows, part, recipe), layout, dtype)

    made = Shards(
        _shards_of(folder),
        metadata,
        partial(part.documents, recipe.task.columns),
        encode,
        lambda: is_made(folder),
        part.size(),
        stream,
    ).make()
    if made is not None:
        shards, tally = made
        tally.hidden = hidden(part.source.source) if kind_of(part.source) in ("files", "url") else 0

        def build(empty: Path) -> None:
            if fingerprint(part.source, part.stores) != metadata["source_fingerprint"]:
                remove(_shards_of(folder))  # they may hold what was there for a while
                raise DataError(f"{part.source.source}: {CHANGED}")
            assemble(empty, shards, layout, dtype=dtype, seed=recipe.seed, metadata=metadata, unencoded=tally)

        make_once(folder, build)


def _answers(rows: list[Row], part: SourcePart, recipe: Recipe) -> Iterator[Answered]:
    """Where each row stands, and what the encoder makes of it.

    Raises DataError for one that it refuses, with `on_error: error`.
    """
    for batch in batched(map(part.cleaned, rows), BATCH_BYTES):
        try:
            answers = recipe.task.encode(batch, recipe.tokenizer, recipe.layout)
        except DataError as error:
            raise DataError(f"{part.source.source}: {error}") from error
        for row, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Unusable) and part.source.on_error == "error":
                raise refused(answer) from answer
            yield row["where"], answer


def _shards_of(folder: Path) -> Path:
    """Where the shards of a store lie until it is made of them."""
    return folder.with_name(folder.name + ".shards")


def _pad_id(tokenizer: Any) -> int:
    """Fills up a sample where nothing is read or learned: any id of the vocabulary will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError("the tokenizer has neither a pad nor an end token, which finetuning needs.")


def _folder(stores: Path, kind: str, ingredients: dict[str, Any]) -> Path:
    return stores / f"{kind}-{_hash(ingredients)[:16]}"


def _hash(ingredients: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
