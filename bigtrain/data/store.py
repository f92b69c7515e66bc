"""The token store: a folder of memory-mapped arrays, made once, that gives samples by number.

    tokens.bin     the ids of all documents, one after the other (uint16, or uint32 for a large vocabulary)
    documents.bin  where each document starts in it, and the end of the last (int64, one more than documents)
    trained.bin    one byte per token, 0 where nothing is to be learned; absent where everything is
    bins.bin       bins only: where each bin starts in documents.bin, and the end of the last (int64)
    manifest.json  what made the store, counts, size and sha256 of each file, and its own sha256; written last

`windows` (pretraining): sample i has the tokens [i*L, i*L + L] of the shuffled documents, whatever their
borders. `bins` (finetuning): whole documents, packed into samples of at most L targets; longer ones are cut
at the end.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.batches import IGNORE
from bigtrain.disk import file_within
from bigtrain.errors import DataError

FORMAT = 2
MADE_AGAIN = "Remove the folder; it will be made again."

Sample = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def open_store(folder: Path, sequence_length: int, isolated: bool = True) -> Store:
    """Map a store: its manifest and the sizes of its files are checked, what is in the files by `verify_store`.
    Without `isolated` the documents of a sample share one run of positions.

    Raises DataError if it is not complete, of another format or without a sample.
    """
    manifest = _checked_manifest(folder)
    store = {"windows": Windows, "bins": Bins}[manifest["layout"]](folder, manifest, sequence_length)
    store.isolated = isolated
    if store.samples == 0:
        raise DataError(
            f"{manifest['source']} ({manifest['documents_are']}): {manifest['tokens']} tokens are fewer than "
            f"one sequence of {sequence_length} and its next token. Add data or shorten sequence_length."
        )
    return store


def verify_store(folder: Path) -> int:
    """Read a store's files to the end; returns their bytes. Raises DataError that names a file with a changed byte."""
    size = 0
    for name, facts in _checked_manifest(folder)["files"].items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                raise DataError(f"{folder / name} is not what was written: its checksum differs. {MADE_AGAIN}")
        size += facts["bytes"]
    return size


def seal(manifest: dict[str, Any]) -> str:
    """A store's manifest as text, with a checksum of itself."""
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": checksum}, indent=2) + "\n"


def map_file(path: Path, dtype: str, anywhere: bool = False) -> NDArray[Any]:
    """A file as an array that is read when it is looked at; `anywhere`: not from its begin to its end."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if anywhere:
        content.madvise(mmap.MADV_RANDOM)  # else each look at a cold place reads megabytes ahead
    return np.frombuffer(content, dtype=dtype)


class Borders(NamedTuple):
    """The documents of a sample.

    first: number of the one it begins with, in the store. whole: whether that one begins here, or in an earlier sample.
    at: where each begins in the sample, and where the last one ends, int64 in 0..sequence_length.
    """

    first: int
    whole: bool
    at: NDArray[np.int64]


class Store(ABC):
    """A memory-mapped token store: its folder, manifest, sequence_length and number of samples."""

    samples: int
    isolated = True  # whether positions begin anew with each document

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        self.folder = folder
        self.manifest = manifest
        self.sequence_length = sequence_length
        self._tokens = self._map("tokens.bin", manifest["dtype"])
        self._documents = self._map("documents.bin", "int64")
        self._trained = self._map("trained.bin", "bool") if "trained.bin" in manifest["files"] else None

    @abstractmethod
    def sample(self, i: int) -> Sample:
        """(input_ids, targets, position_ids) of sample i, int64 of shape (sequence_length,).

        Targets are shifted already and IGNORE where nothing is to be learned; positions restart at 0 with
        each document (`isolated`). Raises IndexError.
        """

    @abstractmethod
    def borders(self, i: int) -> Borders:
        """Which documents stand where in sample i. Raises IndexError."""

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

    def _positions(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        return _positions(starts[starts < length] if self.isolated else starts[:0], length)

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        return map_file(self.folder / name, dtype, anywhere=True)


class Windows(Store):
    """Samples of a fixed length, cut from the documents regardless of their borders."""

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        super().__init__(folder, manifest, sequence_length)
        self.samples = (len(self._tokens) - 1) // sequence_length

    def sample(self, i: int) -> Sample:
        self._check(i)
        length = self.sequence_length
        first = i * length
        tokens = self._tokens[first : first + length + 1].astype(np.int64)
        targets = tokens[1:].copy()
        if self._trained is not None:
            targets[~self._trained[first + 1 : first + length + 1]] = IGNORE
        borders = self._documents[
            np.searchsorted(self._documents, first, "right") : np.searchsorted(self._documents, first + length, "right")
        ]
        starts = borders - first  # of documents that begin inside, in 1..length
        targets[starts - 1] = IGNORE  # the first token of a document does not follow from the one before
        return tokens[:-1], targets, self._positions(starts, length)

    def borders(self, i: int) -> Borders:
        self._check(i)
        first, length = i * self.sequence_length, self.sequence_length
        begins, ends = np.searchsorted(self._documents, (first, first + length), "right")
        inside = self._documents[begins:ends] - first
        at = np.concatenate(([0], inside[inside < length], [length]))
        return Borders(int(begins) - 1, bool(self._documents[begins - 1] == first), at)


class Bins(Store):
    """Samples made of whole documents; the tail that none fits is filled with the pad id."""

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        super().__init__(folder, manifest, sequence_length)
        if manifest["sequence_length"] != sequence_length:
            raise DataError(f"{folder}: packed for sequences of {manifest['sequence_length']}, not {sequence_length}.")
        self._bins = self._map("bins.bin", "int64")
        self.samples = len(self._bins) - 1

    def sample(self, i: int) -> Sample:
        self._check(i)
        length = self.sequence_length
        borders = self._documents[self._bins[i] : self._bins[i + 1] + 1]
        first, last = borders[0], borders[-1]
        tokens = self._tokens[first:last]
        targets = tokens.astype(np.int64)
        if self._trained is not None:
            targets[~self._trained[first:last]] = IGNORE
        is_input = np.ones(len(tokens), dtype=bool)  # all but the last token of each document
        is_input[borders[1:] - first - 1] = False
        is_target = np.ones(len(tokens), dtype=bool)  # all but the first
        is_target[borders[:-1] - first] = False
        used = len(tokens) - (len(borders) - 1)
        input_ids = np.full(length, self.manifest["pad_id"], dtype=np.int64)
        padded_targets = np.full(length, IGNORE, dtype=np.int64)
        input_ids[:used] = tokens[is_input]
        padded_targets[:used] = targets[is_target]
        return input_ids, padded_targets, self._positions(_without_last(borders)[1:], length)

    def borders(self, i: int) -> Borders:
        self._check(i)
        documents = self._documents[self._bins[i] : self._bins[i + 1] + 1]
        return Borders(int(self._bins[i]), True, _without_last(documents))


def _without_last(borders: NDArray[np.int64]) -> NDArray[np.int64]:
    """Borders of documents, from 0 on, once each has lost its last token, which is no input."""
    return borders - borders[0] - np.arange(len(borders))


def _positions(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """0, 1, 2, ..., beginning again at each of the starts (increasing, below length)."""
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    steps[starts] = 1 - np.diff(starts, prepend=0)
    return steps.cumsum()


def _checked_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        written_in = manifest.get("format")
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no complete token store: it has no manifest.json.") from error
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}. {MADE_AGAIN}") from error
    if written_in != FORMAT:
        raise DataError(f"{path} has format {written_in}, this bigtrain reads {FORMAT}. {MADE_AGAIN}")
    if text != seal({name: value for name, value in manifest.items() if name != "sha256"}):
        raise DataError(f"{path} is not what was written: its checksum differs. {MADE_AGAIN}")
    try:
        files = {name: (file_within(folder, name), facts) for name, facts in manifest["files"].items()}
        if missing := [name for name, facts in manifest["files"].items() if not isinstance(facts["sha256"], str)]:
            raise ValueError(f"{missing[0]} has no checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} cannot be used: {reason}. {MADE_AGAIN}") from error
    for name, (file, facts) in files.items():
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise DataError(f"{folder / name} {found}. {MADE_AGAIN}")
    return manifest
