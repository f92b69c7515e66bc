"""The token store: a folder of memory-mapped arrays, made once, that gives samples by number.

    tokens.bin     the ids of all documents, one after the other (uint16, or uint32 for a large vocabulary)
    documents.bin  where each document starts in it, and the end of the last (int64, one more than documents)
    loss_mask.bin  one byte per token, 0 where nothing is to be learned; absent where everything is
    packed.bin     packed only: where each sample starts in documents.bin, and the end of the last (int64)
    NAME.bin       one value for each document, of each of the manifest's `store_columns`
    checksums.bin  XXH3 of each 64 KiB of the files above, in the order of their names (uint64)
    manifest.json  what made the store, counts, size and sha256 of each file, and its own sha256; written last

`windows` (pretraining): sample i has the tokens [i*L, i*L + L] of the shuffled documents, wherever they end. `packed`
(finetuning): whole documents, packed into samples of at most L targets; longer ones are cut at the end. `rows`: each
document is a sample.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.columns import CHECKSUMS, MADE_AGAIN, Column, columns
from bigtrain.data.types import IGNORE
from bigtrain.disk import Seal, check_sizes
from bigtrain.errors import DataError, reason

FORMAT = 4
TOKENS, DOCUMENTS, LOSS_MASK, PACKED = "tokens.bin", "documents.bin", "loss_mask.bin", "packed.bin"
LENGTHS = "lengths.bin"  # of the documents of a shard
FORMAT_3 = {LOSS_MASK: "trained.bin", PACKED: "bins.bin"}  # what their files were called

Sample = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
Arrays = dict[str, NDArray[np.int64]]
ROUND = 8  # rows are padded to a multiple of this


def open_store(folder: Path, sequence_length: int, document_mask: bool = True) -> Store:
    """Map a store: its manifest and the sizes of its files are checked, what is in the files when it is read.
    Without `document_mask` the documents of a sample share one run of positions.

    Raises DataError if it is not complete, of another format or without a sample.
    """
    manifest = _checked_manifest(folder)
    layouts: dict[str, type[Store]] = {"windows": Windows, "packed": Packed, "rows": Rows}
    store = layouts[manifest["layout"]](folder, manifest, sequence_length)
    store.document_mask = document_mask
    if store.samples == 0:
        raise DataError(
            f"{manifest['source']} ({manifest['documents_are']}): {manifest['tokens']} tokens are fewer than "
            f"one sequence of {sequence_length} and its next token. Add data or shorten sequence_length."
        )
    return store


def verify_store(folder: Path) -> int:
    """Read a store's files to the end; returns their bytes. Raises DataError that names a file with a changed byte."""
    manifest = _checked_manifest(folder)
    for column in columns(folder, manifest, _dtypes(manifest)).values():
        column.check()
    return sum(metadata["bytes"] for metadata in _files(manifest).values())


def content_of(manifest: dict[str, Any]) -> str:
    """A hash of the arrays of a store, from its manifest; the same for a store that was written in format 3."""
    arrays = {FORMAT_3.get(name, name): metadata["sha256"] for name, metadata in manifest["files"].items()}
    return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SEAL = Seal("sha256", _sha256, indent=2)


class SampleDocuments(NamedTuple):
    """The documents of a sample.

    first: number of the one it begins with, in the store. whole: whether that one begins here, or in an earlier sample.
    cu_seqlens: where each begins in the sample, and where the last one ends, int64 in 0..sequence_length.
    """

    first: int
    whole: bool
    cu_seqlens: NDArray[np.int64]


class Store(ABC):
    """A memory-mapped token store: its folder, manifest, sequence_length and number of samples."""

    samples: int
    is_ragged = False  # whether a row is as long as the longest of its batch, instead of sequence_length
    document_mask = True  # whether positions begin anew with each document

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        self.folder = folder
        self.manifest = manifest
        self.sequence_length = sequence_length
        self._columns = columns(folder, manifest, _dtypes(manifest))
        self._tokens = self._columns[TOKENS]
        self._documents = self._columns[DOCUMENTS]
        self._loss_mask: Column | None = self._columns.get(LOSS_MASK)

    @abstractmethod
    def arrays(self, rows: int, length: int) -> Arrays:
        """The arrays of a batch of so many rows of so many tokens, to be filled by `fill`."""

    @abstractmethod
    def fill(self, arrays: Arrays, row: int, i: int) -> None:
        """Put sample i into a row of `arrays`. Raises IndexError."""

    def longest(self, samples: NDArray[np.int64]) -> int:
        """Tokens that a row needs for the longest of these samples (`is_ragged`)."""
        raise NotImplementedError

    @abstractmethod
    def documents_in(self, i: int) -> SampleDocuments:
        """Which documents stand where in sample i. Raises IndexError."""

    @property
    def content(self) -> str:
        """A hash of the tokens, masks and their order, whatever the store was made from."""
        return content_of(self.manifest)

    @property
    @abstractmethod
    def left_over(self) -> int:
        """Tokens that no sample takes."""

    def document(self, number: int) -> NDArray[np.int64]:
        """The tokens of a document."""
        begin, end = self._documents[number : number + 2]
        return self._tokens[begin:end].astype(np.int64)

    def document_lengths(self, limit: int) -> NDArray[np.int64]:
        """Tokens of the first `limit` documents."""
        return np.diff(self._documents[: limit + 1])

    def _check(self, i: int) -> None:
        if not 0 <= i < self.samples:
            raise IndexError(f"sample {i} of {self.samples}")


class Sequences(Store):
    """Samples of `sequence_length` positions, of one or more documents."""

    @abstractmethod
    def sample(self, i: int) -> Sample:
        """(input_ids, targets, position_ids) of sample i, int64 of shape (sequence_length,).

        Targets are shifted already and IGNORE where nothing is to be learned; positions restart at 0 with
        each document (`document_mask`). Raises IndexError.
        """

    def arrays(self, rows: int, length: int) -> Arrays:
        input_ids, targets, position_ids = np.empty((3, rows, length), dtype=np.int64)
        return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids}

    def fill(self, arrays: Arrays, row: int, i: int) -> None:
        arrays["input_ids"][row], arrays["targets"][row], arrays["position_ids"][row] = self.sample(i)

    def _positions(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        return _positions(starts[starts < length] if self.document_mask else starts[:0], length)


class Windows(Sequences):
    """Samples of a fixed length, cut from the documents whatever documents they hold."""

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        super().__init__(folder, manifest, sequence_length)
        self.samples = (len(self._tokens) - 1) // sequence_length

    @property
    def left_over(self) -> int:
        return len(self._tokens) - 1 - self.samples * self.sequence_length

    def sample(self, i: int) -> Sample:
        self._check(i)
        length = self.sequence_length
        first = i * length
        tokens = self._tokens[first : first + length + 1].astype(np.int64)
        targets = tokens[1:].copy()
        if self._loss_mask is not None:
            targets[~self._loss_mask[first + 1 : first + length + 1]] = IGNORE
        _, offsets = self._documents.between(first, first + length)
        starts = offsets - first  # of documents that begin inside, in 1..length
        targets[starts - 1] = IGNORE  # the first token of a document does not follow from the one before
        return tokens[:-1], targets, self._positions(starts, length)

    def documents_in(self, i: int) -> SampleDocuments:
        self._check(i)
        first, length = i * self.sequence_length, self.sequence_length
        begins, offsets = self._documents.between(first, first + length)
        inside = offsets - first
        at = np.concatenate(([0], inside[inside < length], [length]))
        return SampleDocuments(begins - 1, bool(self._documents[begins - 1 : begins][0] == first), at)


class Packed(Sequences):
    """Samples made of whole documents; the tail that none fits is filled with the pad id."""

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        super().__init__(folder, manifest, sequence_length)
        if manifest["sequence_length"] != sequence_length:
            raise DataError(f"{folder}: packed for sequences of {manifest['sequence_length']}, not {sequence_length}.")
        self._packed = self._columns[PACKED]
        self.samples = len(self._packed) - 1

    @property
    def left_over(self) -> int:
        return 0

    def sample(self, i: int) -> Sample:
        self._check(i)
        length = self.sequence_length
        begin, end = self._packed[i : i + 2]
        offsets = self._documents[begin : end + 1]
        first, last = offsets[0], offsets[-1]
        tokens = self._tokens[first:last]
        targets = tokens.astype(np.int64)
        if self._loss_mask is not None:
            targets[~self._loss_mask[first:last]] = IGNORE
        is_input = np.ones(len(tokens), dtype=bool)  # all but the last token of each document
        is_input[offsets[1:] - first - 1] = False
        is_target = np.ones(len(tokens), dtype=bool)  # all but the first
        is_target[offsets[:-1] - first] = False
        used = len(tokens) - (len(offsets) - 1)
        input_ids = np.full(length, self.manifest["pad_id"], dtype=np.int64)
        padded_targets = np.full(length, IGNORE, dtype=np.int64)
        input_ids[:used] = tokens[is_input]
        padded_targets[:used] = targets[is_target]
        return input_ids, padded_targets, self._positions(_without_last(offsets)[1:], length)

    def documents_in(self, i: int) -> SampleDocuments:
        self._check(i)
        begin, end = self._packed[i : i + 2]
        return SampleDocuments(int(begin), True, _without_last(self._documents[begin : end + 1]))


class Rows(Store):
    """Each document is a sample, with values of its own."""

    is_ragged = True

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        super().__init__(folder, manifest, sequence_length)
        self.samples = len(self._documents) - 1

    @property
    def left_over(self) -> int:
        return 0

    def longest(self, samples: NDArray[np.int64]) -> int:
        """The length of the longest, rounded up to a multiple of ROUND: a function of the samples alone."""
        sizes = [int(np.diff(self._documents[i : i + 2])[0]) for i in samples.tolist()]
        return min(self.sequence_length, -(-max(sizes, default=1) // ROUND) * ROUND)

    def arrays(self, rows: int, length: int) -> Arrays:
        """`input_ids` filled up with the pad id, `attention_mask` (rows, length); each value by its name (rows,)."""
        ids = np.full((rows, length), self.manifest["pad_id"], dtype=np.int64)
        values = {name: np.empty(rows, dtype=dtype) for name, dtype in self.manifest["store_columns"].items()}
        return {"input_ids": ids, "attention_mask": np.zeros((rows, length), dtype=np.int64), **values}

    def fill(self, arrays: Arrays, row: int, i: int) -> None:
        self._check(i)
        ids = self.document(i)
        arrays["input_ids"][row, : len(ids)] = ids
        arrays["attention_mask"][row, : len(ids)] = 1
        for name in self.manifest["store_columns"]:
            arrays[name][row] = self._columns[f"{name}.bin"][i : i + 1][0]

    def documents_in(self, i: int) -> SampleDocuments:
        self._check(i)
        return SampleDocuments(i, True, np.array([0, *np.diff(self._documents[i : i + 2])]))


def _without_last(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets of documents, from 0 on, once each has lost its last token, which is no input."""
    return offsets - offsets[0] - np.arange(len(offsets))


def _positions(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """0, 1, 2, ..., beginning again at each of the starts (increasing, below length)."""
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    steps[starts] = 1 - np.diff(starts, prepend=0)
    return steps.cumsum()


def _dtypes(manifest: dict[str, Any]) -> dict[str, str]:
    values = {f"{name}.bin": dtype for name, dtype in manifest["store_columns"].items()}
    return {TOKENS: manifest["dtype"], DOCUMENTS: "int64", LOSS_MASK: "bool", PACKED: "int64"} | values


def _files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return manifest["files"] | {CHECKSUMS: manifest["checksums"]}


def _checked_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        manifest = json.loads(text.decode())
        written_in = manifest.get("format")
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no complete token store: it has no manifest.json.") from error
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}. {MADE_AGAIN}") from error
    if written_in != FORMAT:
        raise DataError(f"{path} has format {written_in}, this bigtrain reads {FORMAT}. {MADE_AGAIN}")
    if not SEAL.is_whole(text, manifest):
        raise DataError(f"{path} is not what was written: its checksum differs. {MADE_AGAIN}")
    try:
        stored = _files(manifest)
        wrong = check_sizes(folder, {name: metadata["bytes"] for name, metadata in stored.items()})
        if missing := [name for name, metadata in stored.items() if not isinstance(metadata["sha256"], str)]:
            raise ValueError(f"{missing[0]} has no checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} cannot be used: {reason(error)}. {MADE_AGAIN}") from error
    if wrong:
        raise DataError(f"{wrong[0]}. {MADE_AGAIN}")
    return manifest
