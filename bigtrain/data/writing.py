"""Writes a token store: documents become shards, all shards together are then shuffled, packed and counted."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.columns import Writer, map_file
from bigtrain.data.files import Unusable
from bigtrain.data.order import make_key, permute
from bigtrain.data.store import DOCUMENTS, FORMAT, LENGTHS, LOSS_MASK, PACKED, SEAL, TOKENS
from bigtrain.data.tally import Tally
from bigtrain.data.types import Answered, Document, Documents, Indices, Layout, LeftOut
from bigtrain.disk import check_free
from bigtrain.errors import DataError
from bigtrain.masking import masked_values

ASSEMBLY_BYTES = 2**28  # of shuffled tokens that memory holds at once

COUNTS = ("documents", "tokens", "targets", "split", "cut", "cut_tokens", "answers", "cut_answers")
CUT = "cut to sequence_length"  # of documents that are longer


@dataclass(frozen=True)
class Encoded:
    """Documents in the order they came, cut to what a sample takes; those with nothing to learn are left out.

    tokens: all ids, one document after the other. loss_mask: bool of the same shape, None if all are trained.
    lengths: tokens of each document. values: of each of the layout's columns, one for each document. counts: COUNTS.
    tally: of the rows; `rows` is 0, as whoever reads them counts them.
    """

    tokens: NDArray[Any]
    loss_mask: NDArray[np.bool_] | None
    lengths: Indices
    values: dict[str, NDArray[Any]]
    counts: dict[str, int]
    tally: Tally

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By the names of their files."""
        mask = {} if self.loss_mask is None else {LOSS_MASK: self.loss_mask}
        values = {f"{name}.bin": array for name, array in self.values.items()}
        return {TOKENS: self.tokens, LENGTHS: self.lengths} | mask | values


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The smallest that holds every id."""
    return np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)


def gather(rows: Iterable[Answered], layout: Layout, dtype: np.dtype[Any]) -> Encoded:
    """The documents of rows as arrays, for one shard."""
    kept: list[Document] = []
    tally, counts = Tally(), dict.fromkeys(COUNTS, 0)
    for where, answer in rows:
        if isinstance(answer, Unusable | LeftOut):
            tally.drop(answer.reason, where)
            continue
        if isinstance(answer, Documents):
            tally.unread.update(answer.unread)
            counts["split"] += answer.is_split
        before, lost = len(kept), list[str]()
        for each in answer:
            document, reason = _taken(Document(*each), layout, counts)
            if document is None:
                lost.append(reason)
                continue
            kept.append(document)
            if document.cut:
                tally.example(CUT, where)
        if len(kept) == before:
            tally.drop(lost[0] if lost else "empty", where)
        else:
            tally.used += 1
            tally.parts.update(lost)
            for reason in lost:
                tally.example(reason, where)
    lengths = np.fromiter((len(document.ids) for document in kept), dtype=np.int64, count=len(kept))
    tokens = np.empty(int(lengths.sum()), dtype=dtype)
    loss_mask = np.ones(len(tokens), dtype=bool)
    for end, document in zip(lengths.cumsum().tolist(), kept, strict=True):
        tokens[end - len(document.ids) : end] = document.ids
        if document.loss_mask is not None:
            loss_mask[end - len(document.ids) : end] = document.loss_mask
    values = {
        name: np.array([document.values[name] for document in kept], dtype=kind)
        for name, kind in layout.columns.items()
    }
    counts |= {"documents": len(lengths), "tokens": len(tokens)}
    return Encoded(tokens, None if loss_mask.all() else loss_mask, lengths, values, counts, tally)


def _taken(document: Document, layout: Layout, counts: dict[str, int]) -> tuple[Document | None, str]:
    """A document as a sample can hold it, counted in `counts`; or None, and why it is left out."""
    ids, mask, longest = document.ids, document.loss_mask, layout.longest
    size = len(ids) if longest is None else min(len(ids), longest)
    if mask is not None:
        counts["answers"] += count_answers(mask)
        counts["cut_answers"] += count_answers(mask, size)
    if len(ids) < (2 if layout.name == "packed" else 1):
        return None, "empty"
    learned = 1 if layout.name == "rows" else size - 1 if mask is None else int(sum(mask[1:size]))
    if layout.name == "packed" and learned == 0:
        return None, "without a trained target within sequence_length"
    counts["targets"] += learned
    cut = document.cut + len(ids) - size
    if cut:
        counts["cut"] += 1
        counts["cut_tokens"] += cut
    if size < len(ids):
        ids, mask = ids[:size], None if mask is None else mask[:size]
    return Document(ids, mask, document.values, cut), ""


def count_answers(mask: Sequence[bool], first: int = 0) -> int:
    """Runs of learned tokens of which the last one is token `first` or a later one."""
    learned = np.asarray([*mask, False], dtype=bool)
    return int((learned[:-1] & ~learned[1:])[first:].sum())


def write_shard(folder: Path, encoded: Encoded, metadata: dict[str, Any]) -> None:
    """Fill an empty folder with the arrays of `encoded` and manifest.json."""
    for name, array in encoded.arrays().items():
        (folder / name).write_bytes(array.data)
    manifest = metadata | encoded.counts | {"tally": encoded.tally.metadata()}
    (folder / "manifest.json").write_text(json.dumps(masked_values(manifest), indent=2) + "\n")


def write_store(
    folder: Path,
    documents: Iterable[Document],
    layout: Layout,
    *,
    vocabulary_size: int,
    seed: int,
    metadata: dict[str, Any],
) -> None:
    """Fill an empty folder with the store of documents that memory can hold; see `assemble`."""
    dtype = token_dtype(vocabulary_size)
    shard = folder.with_name(folder.name + ".shard")
    shard.mkdir()
    write_shard(shard, gather(((f"document {i}", [one]) for i, one in enumerate(documents)), layout, dtype), {})
    assemble(folder, [shard], layout, dtype=dtype, seed=seed, metadata=metadata)
    for path in shard.iterdir():
        path.unlink()
    shard.rmdir()


def assemble(
    folder: Path,
    shards: Sequence[Path],
    layout: Layout,
    *,
    dtype: np.dtype[Any],
    seed: int,
    metadata: dict[str, Any],
    unencoded: Tally | None = None,
) -> None:
    """Fill an empty folder with the store of all shards' documents, shuffled. How the documents are spread over shards
    makes no difference. Memory holds O(1) per document and ASSEMBLY_BYTES of tokens.

    metadata: what shaped the documents, for the manifest; `source` and `documents_are` name them in messages.
    unencoded: of the rows that never came into a shard, and how many rows there are; None: all are in the shards.
    Raises DataError if no document is left, or no room on the disk.
    """
    manifests = [json.loads((shard / "manifest.json").read_text()) for shard in shards]
    tally = Tally.total([unencoded or Tally(), *(Tally.of(manifest["tally"]) for manifest in manifests)])
    if unencoded is None:
        tally.rows = tally.counted
    assert tally.rows == tally.counted, f"{tally.rows} rows were read, and {tally.counted} are counted: {tally}"
    counts: dict[str, Any] = {name: sum(manifest[name] for manifest in manifests) for name in COUNTS} | tally.metadata()
    whose = f"{metadata['source']} ({metadata['documents_are']})"
    if not counts["documents"]:
        told = (f"{count} {reason} (like {tally.examples[reason]})" for reason, count in tally.dropped.items())
        reasons = ", ".join(told) or "there were none"
        hint = " Raise held_out, or give more documents." if metadata["documents_are"] == "held-out side" else ""
        raise DataError(f"{whose}: no document is left: {reasons}.{hint}")
    everything = not any((shard / LOSS_MASK).exists() for shard in shards)
    per_token = dtype.itemsize + (0 if everything else 1)
    check_free(folder, counts["tokens"] * per_token + 16 * counts["documents"], f"{whose}, as a store,")

    lengths = np.concatenate([map_file(shard / LENGTHS, "int64") for shard in shards])
    order = permute(np.arange(len(lengths)), len(lengths), make_key(seed, "documents"))
    writer = Writer(folder)
    if layout.name == "packed":
        assert layout.sequence_length is not None
        order, packed = _packed(order, lengths, layout.sequence_length, seed)
        writer.write(PACKED, [packed])
        samples = len(packed) - 1
        counts |= {"samples": samples, "fill": int((lengths - 1).sum()) / (samples * layout.sequence_length)}
    offsets = np.concatenate(([0], lengths[order].cumsum()))
    writer.write(DOCUMENTS, [offsets])
    shuffled = _Shuffled(shards, [manifest["documents"] for manifest in manifests], lengths, order, offsets)
    writer.write(TOKENS, shuffled.pieces(TOKENS, dtype))
    if not everything:
        writer.write(LOSS_MASK, shuffled.pieces(LOSS_MASK, np.dtype(bool)))
    for name, kind in layout.columns.items():
        values = [map_file(shard / f"{name}.bin", kind) for shard in shards]
        writer.write(f"{name}.bin", [np.concatenate(values)[order]])
    manifest = {"format": FORMAT, "layout": layout.name, "sequence_length": layout.sequence_length} | metadata
    manifest |= (
        {"long_conversations": layout.long_conversations, "pad_id": layout.pad_id, "dtype": dtype.name}
        | {"store_columns": dict(layout.columns)}
        | counts
        | writer.close()
    )
    (folder / "manifest.json").write_text(SEAL.text(masked_values(manifest)))


@dataclass
class _Shuffled:
    """The documents of all shards in another order. `order[i]` is the document that takes `offsets[i:i + 2]`."""

    shards: Sequence[Path]
    documents: Sequence[int]  # of each shard
    lengths: Indices
    order: Indices
    offsets: Indices

    def pieces(self, name: str, dtype: np.dtype[Any]) -> Iterable[NDArray[Any]]:
        """The arrays `name` of the shards, ones where a shard has none, as consecutive pieces of the shuffled array.

        Each piece visits the shards in turn, so that reading goes forward through the disk.
        """
        ends = self.lengths.cumsum()
        shard_ends = np.cumsum(self.documents)
        first = 0
        while first < len(self.order):
            limit = self.offsets[first] + ASSEMBLY_BYTES // dtype.itemsize
            last = max(first + 1, int(np.searchsorted(self.offsets, limit, "right")) - 1)
            base = self.offsets[first]
            piece = np.ones(self.offsets[last] - base, dtype=dtype)
            chosen = self.order[first:last]
            forward = np.argsort(chosen)
            documents, to = chosen[forward], self.offsets[first:last][forward] - base
            shares = np.searchsorted(documents, shard_ends, "left")  # where each shard's documents end
            for shard, begin, end in zip(range(len(self.shards)), (0, *shares[:-1]), shares, strict=True):
                if begin < end and (self.shards[shard] / name).exists():
                    start = ends[shard_ends[shard - 1] - 1] if shard and shard_ends[shard - 1] else 0
                    source = map_file(self.shards[shard] / name, dtype.name)
                    sizes = self.lengths[documents[begin:end]]
                    stops = ends[documents[begin:end]] - start
                    spans = zip(stops.tolist(), sizes.tolist(), to[begin:end].tolist(), strict=True)
                    for stop, size, place in spans:
                        piece[place : place + size] = source[stop - size : stop]
            yield piece
            first = last


def _packed(order: Indices, lengths: Indices, sequence_length: int, seed: int) -> tuple[Indices, Indices]:
    """(documents in the order of their samples, where each sample starts in that order and the end of the last).

    Best fit decreasing: the longest document first, each into the fullest sample that still takes it.
    """
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    packed: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> samples
    rooms: list[int] = []  # the rooms that occur, sorted
    for document in longest_first.tolist():
        pairs = int(lengths[document]) - 1
        at = bisect.bisect_left(rooms, pairs)
        if at == len(rooms):
            room, chosen = sequence_length, len(packed)
            packed.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        packed[chosen].append(document)
        left = room - pairs
        if left and left not in with_room:
            bisect.insort(rooms, left)
        if left:
            with_room.setdefault(left, []).append(chosen)
    shuffled = [packed[i] for i in permute(np.arange(len(packed)), len(packed), make_key(seed, "bins"))]
    documents = np.asarray([document for members in shuffled for document in members], dtype=np.int64)
    return documents, np.cumsum([0, *map(len, shuffled)], dtype=np.int64)
