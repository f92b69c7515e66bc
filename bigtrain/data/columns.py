"""The arrays of a token store: files with a checksum for each block, which is compared when a block is first read."""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.errors import DataError

BLOCK = 1 << 16  # bytes: about what one read of a disk costs anyway, and some samples' worth
CHECKSUMS = "checksums.bin"
MADE_AGAIN = "Remove the folder; it will be made again."

Metadata = dict[str, Any]


def map_file(path: Path, dtype: str, anywhere: bool = False) -> NDArray[Any]:
    """A file as an array that is read when it is looked at; `anywhere`: not from its begin to its end."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if anywhere:
        content.madvise(mmap.MADV_RANDOM)  # else each look at a cold place reads megabytes ahead
    return np.frombuffer(content, dtype=dtype)


class Writer:
    """Writes the arrays of a store, and last their checksums."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Metadata] = {}
        self._sums: dict[str, array[int]] = {}

    def write(self, name: str, pieces: Iterable[NDArray[Any]]) -> None:
        """A file of arrays, one after the other."""
        digest, size, sums = hashlib.sha256(), 0, array("Q")
        block, room = xxhash.xxh3_64(), BLOCK
        with (self._folder / name).open("wb") as file:
            for piece in pieces:
                data = memoryview(np.ascontiguousarray(piece).view(np.uint8).reshape(-1).data)
                file.write(data)
                digest.update(data)
                size += len(data)
                while data:
                    block.update(data[:room])
                    data, room = data[room:], room - min(room, len(data))
                    if not room:
                        sums.append(block.intdigest())
                        block, room = xxhash.xxh3_64(), BLOCK
        if room < BLOCK:
            sums.append(block.intdigest())
        self._files[name], self._sums[name] = {"bytes": size, "sha256": digest.hexdigest()}, sums

    def close(self) -> Metadata:
        """Write the checksums; what the manifest says about all files: `files`, by name, and `checksums`."""
        files = dict(sorted(self._files.items()))
        data = np.concatenate([np.asarray(self._sums[name], dtype="<u8") for name in files]).tobytes()
        (self._folder / CHECKSUMS).write_bytes(data)
        return {"files": files, "checksums": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


class Column:
    """An array of a store as a file. What is read of it is what was written, or DataError names the block."""

    def __init__(self, path: Path, dtype: str, sums: NDArray[np.uint64]):
        """sums: XXH3 (64 bits) of each BLOCK of the file."""
        self._path = path
        self._array = map_file(path, dtype, anywhere=True)
        self._file = path.open("rb", buffering=0)
        self._sums = sums
        self._right = bytearray(len(sums))  # of the blocks that were read, 1
        self._unread = self._right.find(0)  # the first block that was not; -1: all were

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """Elements begin:end; their blocks are compared with their checksums at the first look of this process."""
        if self._unread >= 0:
            begin, end, _ = span.indices(len(self._array))
            size = self._array.itemsize
            last = (end * size - 1) // BLOCK + 1
            while begin < end and (wrong := self._right.find(0, begin * size // BLOCK, last)) >= 0:
                self._check(wrong)
        return self._array[span]

    def between(self, low: int, high: int) -> tuple[int, NDArray[Any]]:
        """Of an array that only grows: (how many elements are `low` or less, those above it that are `high` or less)"""
        begin, end = self._array.searchsorted((low, high), "right").tolist()
        if self._unread >= 0:
            before = max(begin - 1, 0)
            if self[before : end + 1].searchsorted((low, high), "right").tolist() != [begin - before, end - before]:
                self.check()  # the search has met a changed element
                raise AssertionError(f"{self._path} does not grow")
        return begin, self._array[begin:end]

    def check(self) -> None:
        """Compare all blocks."""
        for block in range(len(self._sums)):
            self._check(block)

    def _check(self, block: int) -> None:
        data = os.pread(self._file.fileno(), BLOCK, block * BLOCK)
        if xxhash.xxh3_64_intdigest(data) != self._sums[block]:
            place = f"block {block} (bytes {block * BLOCK:,} to {block * BLOCK + len(data):,})"
            raise DataError(
                f"{self._path}: {place} is not what was written: its checksum differs. Remove the folder "
                f"{self._path.parent}; the next start makes it again from its sources, and the run goes on."
            )
        self._right[block] = 1
        self._unread = self._right.find(0, self._unread)


def columns(folder: Path, manifest: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, Column]:
    """The arrays of a store that are there, by file name. Raises DataError for changed checksums."""
    data = (folder / CHECKSUMS).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["checksums"]["sha256"]:
        raise DataError(f"{folder / CHECKSUMS} is not what was written: its checksum differs. {MADE_AGAIN}")
    sums, at, found = np.frombuffer(data, dtype="<u8"), 0, {}
    for name, metadata in manifest["files"].items():
        blocks = -(-metadata["bytes"] // BLOCK)
        found[name] = Column(folder / name, dtypes[name], sums[at : at + blocks])
        at += blocks
    return found
