"""What a model sees in one step, as plain values that a terminal and a page can show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from bigtrain.config.schema import StageConfig
from bigtrain.data.prepare import StageData, counts
from bigtrain.data.store import Sequences, Store
from bigtrain.data.types import IGNORE
from bigtrain.errors import ConfigError
from bigtrain.parallel.dims import ParallelDims
from bigtrain.pipeline.build import training_batches
from bigtrain.preview.spelling import spell, spell_together

LOOKED_AT = 1_000_000  # documents of a store whose lengths are counted, at most


@dataclass(frozen=True)
class Token:
    """id; text: as `spell` gives it; trained: whether the model learns to say it here."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class Piece:
    """What of one document stands in a sequence: its tokens, and last the one that only is a target, if it is trained.

    number: of the document in its store. whole: whether it begins here.
    """

    number: int
    whole: bool
    tokens: list[Token]
    runs: list[tuple[str, bool]]  # text, decoded as long as the mark of its tokens stays the same; that mark

    @property
    def trained(self) -> int:
        return sum(token.trained for token in self.tokens)


@dataclass(frozen=True)
class Sequence:
    """One row of the batch. sample: its number in the store of `source`. padding: unused positions at its end."""

    source: str
    sample: int
    pieces: list[Piece]
    padding: int


@dataclass(frozen=True)
class SourceView:
    """A training store. metadata: of its manifest. share: of the stage's sequences; epochs: how often the stage reads
    it; in_batch: sequences of this batch."""

    metadata: dict[str, Any]
    share: float
    epochs: float
    in_batch: int


@dataclass(frozen=True)
class Lengths:
    """Documents by their length in tokens. ranges: first, last, documents in between; documents: all looked at."""

    ranges: list[tuple[int, int, int]]
    documents: int
    median: float
    longest: int


@dataclass(frozen=True)
class View:
    """Batch `step` of a stage of `steps`. rows: sequences in it; supervised: targets; filled: positions that are no
    padding; positions: all of them. cleaned: the summary of what `clean` did."""

    stage: StageConfig
    step: int
    steps: int
    rows: int
    supervised: int
    filled: int
    positions: int
    sources: list[SourceView]
    lengths: Lengths
    sequences: list[Sequence]
    cleaned: dict[str, Any] | None


def view(stage: StageConfig, data: StageData, tokenizer: Any, seed: int, step: int, rows: int) -> View:
    """Batch `step` of a stage, with the tokens of its first `rows` sequences.

    Raises ConfigError for a step that the stage lacks.
    """
    total = data.samples(stage)
    batches = training_batches(stage, data, seed, ParallelDims(rank=0, replicate=1))
    if not 0 <= step < batches.steps:
        raise ConfigError(f"--step {step}: stage {stage.name} has steps 0 to {batches.steps - 1}.")
    ids = batches.ids(step)
    ends = [data.train[store].documents_in(sample).cu_seqlens[-1] for store, sample in ids]
    return View(
        stage=stage,
        step=step,
        steps=batches.steps,
        rows=len(ids),
        supervised=int((batches(step).tensors["targets"] != IGNORE).sum()),
        filled=int(sum(ends)),
        positions=len(ids) * stage.sequence_length,
        sources=[
            SourceView(counts(store), share, share * total / store.samples, sum(which == number for which, _ in ids))
            for number, (store, share) in enumerate(zip(data.train, batches.shares, strict=True))
        ],
        lengths=_lengths(data.train),
        sequences=[_sequence(data.train[store], sample, tokenizer) for store, sample in ids[:rows]],
        cleaned=data.cleaning.summary() if data.cleaning else None,
    )


def _sequence(store: Store, sample: int, tokenizer: Any) -> Sequence:
    if isinstance(store, Sequences):
        inputs, targets, _ = store.sample(sample)
    else:
        inputs = store.document(sample)
        targets = np.full_like(inputs, IGNORE)
    documents = store.documents_in(sample)
    pieces = []
    for number, (begin, end) in enumerate(pairwise(documents.cu_seqlens.tolist())):
        ids, trained = inputs[begin:end].tolist(), [False, *(targets[begin : end - 1] != IGNORE).tolist()]
        if targets[end - 1] != IGNORE:
            ids, trained = [*ids, int(targets[end - 1])], [*trained, True]
        whole = number > 0 or documents.whole
        tokens = [Token(*token) for token in zip(ids, spell(tokenizer, ids), trained, strict=True)]
        pieces.append(Piece(documents.first + number, whole, tokens, list(_runs(tokens, tokenizer))))
    return Sequence(store.manifest["source"], sample, pieces, store.sequence_length - int(documents.cu_seqlens[-1]))


def _runs(tokens: list[Token], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    for trained, group in groupby(tokens, key=lambda token: token.trained):
        run = list(group)
        yield spell_together(tokenizer, [token.id for token in run], [token.text for token in run]), trained


def _lengths(stores: list[Store]) -> Lengths:
    """In ranges from one power of two to the next."""
    lengths = np.concatenate([store.document_lengths(LOOKED_AT) for store in stores])
    powers = np.log2(lengths).astype(int)
    found = np.bincount(powers)
    lowest = int(powers.min())
    return Lengths(
        [(2**power, 2 ** (power + 1) - 1, int(found[power])) for power in range(lowest, len(found))],
        len(lengths),
        float(np.median(lengths)),
        int(lengths.max()),
    )
