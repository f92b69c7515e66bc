"""Tokenizing a source together with others: blocks of its documents become shards, each made by one process.

Every process reads the whole source, which is cheap against tokenizing it, and cuts it into the same blocks. It takes
the blocks that nobody has made or is making, each under a file lock, which is free again when its holder dies. There
is nothing else between the processes: they may be ranks of one run, several runs, or on nodes that share a disk.

    FOLDER/00007/       a finished shard: its arrays, and manifest.json (which documents, counts, who made it)
    FOLDER/00007.lock   held by the process that makes it
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import xxhash

from bigtrain.data.files import ABOUT, Row
from bigtrain.data.tally import Tally
from bigtrain.data.writing import Encoded, write_shard
from bigtrain.disk import check_free, publish
from bigtrain.errors import DataError
from bigtrain.observability.events import Tokenizing
from bigtrain.observability.stream import Stream

BLOCKS = 64  # that a source is cut into, so that processes which share them end at the same time; but a block has
BLOCK_BYTES = (500_000, 8_000_000)  # of text, at least and at most; where it ends depends on the documents alone
POLL_SECONDS = 0.05  # between looks at what the others have finished
TELL_SECONDS = 2.0  # between two words on how far it is

Metadata = dict[str, Any]


@dataclass
class Shards:
    """One process's part in making the shards of a store.

    folder: where they lie. metadata: what of the store's manifest names the documents, for messages.
    read: all rows once more; its argument counts those that the source leaves out. encode: rows as arrays.
    is_over: whether the store has been made of the shards meanwhile.
    expected_bytes: of text, as far as it is known.
    """

    folder: Path
    metadata: Metadata
    read: Callable[[Tally], Iterator[Row]]
    encode: Callable[[list[Row]], Encoded]
    is_over: Callable[[], bool]
    expected_bytes: int | None
    stream: Stream
    _done: dict[int, Metadata] = field(default_factory=dict)  # the manifests of finished shards
    _held: dict[int, filelock.BaseFileLock] = field(default_factory=dict)
    _has_room: bool = False

    def make(self) -> tuple[list[Path], Tally] | None:
        """Return when all shards are made, by whomever: (their folders in order, the rows that are in none).

        None once the store is made of them. Raises DataError for a disk without room for them, and for a source that
        gives other documents each time it is read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the store may be made of them at this moment
            for path in list(self.folder.iterdir()):
                if path.name.isdecimal():
                    self._is_done(int(path.name))
        self._begun = self._told = time.monotonic()
        self._before = self._totals()
        while True:
            tally = Tally()
            blocks = self._read_through(tally)
            if blocks is None or not self._wait(blocks):
                return None
            if all(number in self._done for number in range(blocks)):
                return [self._shard(number) for number in range(blocks)], tally

    def _read_through(self, tally: Tally) -> int | None:
        """Make what nobody else makes; returns the number of blocks, or None if the store is there."""
        first = number = 0
        for block in batched(self.read(tally), self._block_bytes()):
            metadata = {"first": first, "rows": len(block), **_measured(block)}
            if not self._is_done(number) and (lock := self._claim(number)):
                try:
                    if self.is_over():
                        return None
                    if not self._is_done(number):
                        self._make(number, block, metadata)
                finally:
                    lock.release()
                    self._held.pop(number, None)
            if number in self._done:
                self._check_same(number, metadata)
            first += len(block)
            number += 1
        return number

    def _block_bytes(self) -> int:
        least, most = BLOCK_BYTES
        return most if self.expected_bytes is None else min(most, max(least, self.expected_bytes // BLOCKS))

    def _make(self, number: int, block: list[Row], metadata: Metadata) -> None:
        encoded = self.encode(block)
        self._check_room(encoded.bytes / metadata["text_bytes"] if metadata["text_bytes"] else 0.0)
        maker = {"pid": os.getpid(), "host": platform.node()}
        publish(self._shard(number), lambda folder: write_shard(folder, encoded, metadata | maker))
        self._is_done(number)
        self._tell()

    def _wait(self, blocks: int) -> bool:
        """Until the others have finished (True), the store is there (False), or one of their locks is free: then it
        is held, to be used by reading once more."""
        missing = set(range(blocks))
        while missing := {number for number in missing if not self._is_done(number)}:
            if self.is_over():
                return False
            for number in sorted(missing):
                lock = self._claim(number)
                if lock and not self._is_done(number):
                    self._held[number] = lock
                    return True
                if lock:
                    lock.release()
            self._tell()
            time.sleep(POLL_SECONDS)
        return True

    def _claim(self, number: int) -> filelock.BaseFileLock | None:
        """The lock of a block, acquired; None if another process has it, or all shards are gone."""
        if number in self._held:
            return self._held[number]
        lock = filelock.FileLock(self.folder / f"{number:05d}.lock", is_singleton=False)
        try:
            lock.acquire(blocking=False)
        except (filelock.Timeout, FileNotFoundError):
            return None
        return lock

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _is_done(self, number: int) -> bool:
        if number not in self._done:
            try:
                self._done[number] = json.loads((self._shard(number) / "manifest.json").read_text())
            except FileNotFoundError:
                return False
        return True

    def _check_same(self, number: int, metadata: Metadata) -> None:
        if not metadata.items() <= self._done[number].items():
            raise DataError(
                f"{self.metadata['source']}: gives other documents than when it was read before; a source must give "
                f"the same rows in the same order every time. Once it does, remove {self.folder} and start again."
            )

    def _check_room(self, ratio: float) -> None:
        """Once, with `ratio` bytes of tokens per byte of text: is there room for the other shards, and beside them all
        for the store? Where the size of the files says no, the text in them is counted."""
        if self._has_room or self.expected_bytes is None:
            return
        self._has_room = True
        made = ratio * self._totals()["text_bytes"]
        which = f"{self.metadata['source']} ({self.metadata['documents_are']})"
        what = f"{which}, as tokens and twice while they are shuffled,"
        try:
            check_free(self.folder, 2 * ratio * self.expected_bytes - made, what)
        except DataError:
            text = sum(text_bytes(row) for row in self.read(Tally()))
            check_free(self.folder, 2 * ratio * text - made, what)

    def _totals(self) -> Counter[str]:
        totals: Counter[str] = Counter(text_bytes=0, documents=0, tokens=0)
        for metadata in self._done.values():
            totals.update({name: metadata[name] for name in totals})
        return totals

    def _tell(self) -> None:
        """How far all processes are together; the rates are those since this one began."""
        now = time.monotonic()
        if now - self._told < TELL_SECONDS:
            return
        self._told = now
        totals, seconds = self._totals(), now - self._begun
        rates = {name: (total - self._before[name]) / seconds for name, total in totals.items()}
        left = None
        if self.expected_bytes is not None and rates["text_bytes"] > 0:
            left = max(0.0, self.expected_bytes - totals["text_bytes"]) / rates["text_bytes"]
        self.stream.emit(
            Tokenizing(
                source=self.metadata["source"],
                documents_are=self.metadata["documents_are"],
                **totals,
                text_bytes_per_second=rates["text_bytes"],
                documents_per_second=rates["documents"],
                tokens_per_second=rates["tokens"],
                expected_bytes=self.expected_bytes,
                seconds_left=left,
            )
        )


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows with at least `size` bytes of text together; the last ones with what is left."""
    batch: list[Row] = []
    gathered = 0
    for row in rows:
        batch.append(row)
        gathered += text_bytes(row)
        if gathered >= size:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch


def text_of(row: Row) -> str:
    """All that a row says."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return "".join(value for name, value in row.items() if name not in ABOUT)


def _measured(block: list[Row]) -> Metadata:
    """Bytes of text of some rows, and a hash that tells rows from others."""
    size, digest = 0, xxhash.xxh3_64()
    for row in block:
        text = text_of(row).encode()
        size += len(text)
        digest.update(text)
        digest.update(row.get("label", "").encode())
    return {"text_bytes": size, "content": digest.hexdigest()}


def text_bytes(row: Row) -> int:
    """Bytes of what a row says, in UTF-8."""
    text = text_of(row)
    return len(text) if text.isascii() else len(text.encode())
