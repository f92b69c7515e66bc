"""The token store: a folder of memory-mapped arrays, made once, that gives samples by number.

    tokens.bin     the ids of all documents, one after the other (uint16, or uint32 for a large vocabulary)
    documents.bin  where each document starts in it, and the end of the last (int64, one more than documents)
    trained.bin    one byte per token, 0 where nothing is to be learned; absent where everything is
    bins.bin       bins only: where each bin starts in documents.bin, and the end of the last (int64)
    manifest.json  what made the store, counts, and size and sha256 of each file; written last

`windows` (pretraining): sample i has the tokens [i*L, i*L + L] of the shuffled documents, whatever their
borders. `bins` (finetuning): whole documents, packed into samples of at most L targets; longer ones are cut
at the end.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from bigtrain.data.batches import IGNORE
from bigtrain.errors import DataError

FORMAT = 1

Sample = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def make_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Have `build` fill the folder, with `manifest.json` as its last file, unless that has been done.

    Of several processes the first one builds and the others wait for it; what a killed one left is removed.
    """
    if (folder / "manifest.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(folder.name + ".lock")):
        if (folder / "manifest.json").is_file():
            return folder
        partial = folder.with_name(folder.name + ".partial")
        for leftover in (partial, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        build(partial)
        partial.rename(folder)
    return folder


def open_store(folder: Path, sequence_length: int) -> Store:
    """Map a store. Raises DataError if it is not complete, of another format or without a sample."""
    manifest = _checked_manifest(folder)
    store = {"windows": Windows, "bins": Bins}[manifest["layout"]](folder, manifest, sequence_length)
    if store.samples == 0:
        raise DataError(
            f"{manifest['source']} ({manifest['documents_are']}): {manifest['tokens']} tokens are fewer than "
            f"one sequence of {sequence_length} and its next token. Add data or shorten sequence_length."
        )
    return store


class Store(ABC):
    """A memory-mapped token store: its folder, manifest, sequence_length and number of samples."""

    samples: int

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
        each document. Raises IndexError.
        """

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        return np.memmap(self.folder / name, dtype=dtype, mode="r").view(np.ndarray)  # slices of a memmap are slow


class Windows(Store):
    """Samples of a fixed length, cut from the documents regardless of their borders."""

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        super().__init__(folder, manifest, sequence_length)
        self.samples = (len(self._tokens) - 1) // sequence_length

    def sample(self, i: int) -> Sample:
        if not 0 <= i < self.samples:
            raise IndexError(f"sample {i} of {self.samples}")
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
        return tokens[:-1], targets, _positions(starts[starts < length], length)


class Bins(Store):
    """Samples made of whole documents; the tail that none fits is filled with the pad id."""

    def __init__(self, folder: Path, manifest: dict[str, Any], sequence_length: int):
        super().__init__(folder, manifest, sequence_length)
        if manifest["sequence_length"] != sequence_length:
            raise DataError(f"{folder}: packed for sequences of {manifest['sequence_length']}, not {sequence_length}.")
        self._bins = self._map("bins.bin", "int64")
        self.samples = len(self._bins) - 1

    def sample(self, i: int) -> Sample:
        if not 0 <= i < self.samples:
            raise IndexError(f"sample {i} of {self.samples}")
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
        starts = borders[1:] - first - np.arange(1, len(borders))  # of the second document on, and of the tail
        return input_ids, padded_targets, _positions(starts[starts < length], length)


def _positions(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """0, 1, 2, ..., beginning again at each of the starts (increasing, below length)."""
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    steps[starts] = 1 - np.diff(starts, prepend=0)
    return steps.cumsum()


def _checked_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no complete token store: it has no manifest.json.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Remove the folder; it will be made again.") from error
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{folder} has format {manifest.get('format')}, this bigtrain reads {FORMAT}. Remove the folder."
        )
    for name, facts in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise DataError(f"{folder / name} {found}. Remove the folder; it will be made again.")
    return manifest
