"""Writes a token store: documents in the order they come, then shuffled, packed and counted."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.order import make_key, permute
from bigtrain.data.store import FORMAT
from bigtrain.errors import DataError

Document = tuple[Sequence[int], Sequence[bool] | None]  # ids; which of them are trained, None for all
Indices = NDArray[np.int64]


@dataclass
class Layout:
    """windows: nothing else matters. bins: of at most `sequence_length` targets, filled up with `pad_id`."""

    name: str
    sequence_length: int | None = None
    pad_id: int | None = None


def write_store(
    folder: Path,
    documents: Iterable[Document],
    layout: Layout,
    *,
    vocabulary_size: int,
    seed: int,
    facts: dict[str, Any],
) -> None:
    """Fill an empty folder with a token store. Memory holds O(1) per document; tokens pass through the disk.

    facts: what shaped the documents, for the manifest; `source` and `documents_are` name them in messages.
    Raises DataError if no document is left.
    """
    dtype = np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)
    arrived = _Arrived(folder, dtype, layout)
    for ids, trained in documents:
        arrived.add(ids, trained)
    arrived.close()
    if not arrived.lengths:
        dropped = ", ".join(f"{count} {reason}" for reason, count in arrived.dropped.items()) or "there were none"
        hint = " Raise held_out, or give more documents." if facts["documents_are"] == "held-out side" else ""
        raise DataError(f"{facts['source']} ({facts['documents_are']}): no document is left: {dropped}.{hint}")

    lengths = np.asarray(arrived.lengths, dtype=np.int64)
    order = permute(np.arange(len(lengths)), len(lengths), make_key(seed, "documents"))
    counts: dict[str, Any] = {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "targets": arrived.targets,
        "dropped": dict(arrived.dropped),
        "cut": arrived.cut,
    }
    if layout.sequence_length is not None:
        order, bins = _packed(order, lengths, layout.sequence_length, seed)
        bins.tofile(folder / "bins.bin")
        samples = len(bins) - 1
        counts |= {"samples": samples, "fill": int((lengths - 1).sum()) / (samples * layout.sequence_length)}
    arrived.write_ordered(order, lengths)
    files = {file.name: _file_facts(file) for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "layout": layout.name, "sequence_length": layout.sequence_length} | facts
    manifest |= {"pad_id": layout.pad_id, "dtype": dtype.name} | counts | {"files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@dataclass
class _Arrived:
    """Documents on the disk in the order in which they came."""

    folder: Path
    dtype: np.dtype[Any]
    layout: Layout
    lengths: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    targets: int = 0
    untrained: int = 0

    def __post_init__(self) -> None:
        self._ids_path, self._trained_path = self.folder / "ids.arrived", self.folder / "trained.arrived"
        self._ids, self._trained = self._ids_path.open("wb"), self._trained_path.open("wb")

    def add(self, ids: Sequence[int], trained: Sequence[bool] | None) -> None:
        limit = self.layout.sequence_length
        if len(ids) < (1 if limit is None else 2):
            self.dropped["empty"] += 1
            return
        kept = len(ids) if limit is None else min(len(ids), limit + 1)
        tokens = np.asarray(ids[:kept], dtype=self.dtype)
        mask = np.ones(kept, dtype=bool) if trained is None else np.asarray(trained[:kept], dtype=bool)
        targets = int(mask[1:].sum())
        if limit is not None and targets == 0:
            self.dropped["without a trained target within sequence_length"] += 1
            return
        self._ids.write(tokens.data)
        self._trained.write(mask.data)
        self.lengths.append(kept)
        self.cut += kept < len(ids)
        self.targets += targets
        self.untrained += kept - int(mask.sum())

    def close(self) -> None:
        self._ids.close()
        self._trained.close()

    def write_ordered(self, order: Indices, lengths: Indices) -> None:
        """tokens.bin, documents.bin and, unless everything is trained, trained.bin."""
        ends = lengths.cumsum()
        np.concatenate(([0], lengths[order].cumsum())).tofile(self.folder / "documents.bin")
        parts = [(self._ids_path, "tokens.bin", self.dtype)]
        if self.untrained:
            parts.append((self._trained_path, "trained.bin", np.dtype(bool)))
        for arrived, name, dtype in parts:
            source = np.memmap(arrived, dtype=dtype, mode="r").view(np.ndarray)
            with (self.folder / name).open("wb") as file:
                for i in order:
                    file.write(source[ends[i] - lengths[i] : ends[i]].data)
        self._ids_path.unlink()
        self._trained_path.unlink()


def _packed(order: Indices, lengths: Indices, sequence_length: int, seed: int) -> tuple[Indices, Indices]:
    """(documents in the order of their bins, where each bin starts in that order and the end of the last).

    Best fit decreasing: the longest document first, each into the fullest bin that still takes it.
    """
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> bins
    rooms: list[int] = []  # the rooms that occur, sorted
    for document in longest_first.tolist():
        pairs = int(lengths[document]) - 1
        at = bisect.bisect_left(rooms, pairs)
        if at == len(rooms):
            room, chosen = sequence_length, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[chosen].append(document)
        left = room - pairs
        if left and left not in with_room:
            bisect.insort(rooms, left)
        if left:
            with_room.setdefault(left, []).append(chosen)
    shuffled = [bins[i] for i in permute(np.arange(len(bins)), len(bins), make_key(seed, "bins"))]
    documents = np.asarray([document for members in shuffled for document in members], dtype=np.int64)
    return documents, np.cumsum([0, *map(len, shuffled)], dtype=np.int64)


def _file_facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
