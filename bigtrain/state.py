"""The logical state of a run: named tensors, each held by the ranks as n-dimensional boxes.

For every parameter name there is one tensor per *slot*: `weight`, and the optimizer's own slots under the
names that torch gives them (`exp_avg`, `exp_avg_sq`). An engine yields the boxes that its rank holds and
takes boxes from a `StateReader`; nothing here knows about ranks, files or engines.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

WEIGHT = "weight"
BUFFER = "buffer"

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A rectangular part of one tensor of the logical state.

    `shape` is that of the whole tensor; the part begins at `offsets` and is as long as `tensor.shape`.
    """

    name: str
    slot: str
    shape: Shape
    offsets: Shape
    tensor: torch.Tensor


class StateReader(Protocol):
    """Where an engine takes its share of the state from: random weights, a pretrained model, a checkpoint."""

    def slots_of(self, name: str) -> Sequence[str]:
        """The slots that can be read of a parameter or a buffer."""
        ...

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> torch.Tensor:
        """The part of a tensor that begins at `offsets`, as a CPU tensor of shape `lengths`.

        Raises CheckpointError when the tensor is missing or the part lies outside of it.
        """
        ...


class Overlay:
    """A StateReader that takes the weights of some names from another reader than the rest."""

    def __init__(self, base: StateReader, over: StateReader, names: Collection[str]):
        self.base = base
        self._over, self._names = over, frozenset(names)

    def slots_of(self, name: str) -> Sequence[str]:
        return self._reader(name).slots_of(name)

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> torch.Tensor:
        return self._reader(name).read(name, slot, offsets, lengths)

    def _reader(self, name: str) -> StateReader:
        return self._over if name in self._names else self.base


def lies_inside(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether a tensor of `shape` has the box of `lengths` at `offsets`."""
    return len(offsets) == len(shape) and all(o + n <= size for o, n, size in zip(offsets, lengths, shape, strict=True))


class FlatSpan(NamedTuple):
    """The elements [first, stop) of a flattened tensor from a box's first to its last, and the tensor's strides."""

    first: int
    stop: int
    strides: Shape


def flat_span(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> FlatSpan:
    """Where the box of `lengths` at `offsets` lies in a row-major tensor that has it."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    first = sum(o * stride for o, stride in zip(offsets, strides, strict=True))
    if 0 in lengths:
        return FlatSpan(first, first, strides)
    return FlatSpan(first, first + 1 + sum((n - 1) * s for n, s in zip(lengths, strides, strict=True)), strides)


class FlatBox(NamedTuple):
    """A box of a tensor that is one run of elements in its flattened form."""

    offsets: Shape
    lengths: Shape
    start: int  # of its first element, counted from the beginning of the flat range it was cut from


def flat_range_boxes(shape: Shape, start: int, stop: int) -> Iterator[FlatBox]:
    """Cut the flat range [start, stop) of a row-major tensor into boxes, in order.

    A range that begins and ends inside rows becomes a head, full rows, and a tail, in each dimension;
    at most 2 * len(shape) - 1 boxes, all of them contiguous in memory.
    """
    assert 0 <= start <= stop <= math.prod(shape), (shape, start, stop)
    for offsets, lengths, at in _cut(shape, start, stop):
        yield FlatBox(offsets, lengths, at - start)


def _cut(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    if start == stop:
        return
    if not shape:
        yield (), (), start
        return
    rest = shape[1:]
    stride = math.prod(rest)
    first, last = -(-start // stride), stop // stride  # the rows that lie wholly inside are [first, last)
    if first > last:  # the range begins and ends inside one row
        row = last
        yield from _inside(row, rest, start, stop, stride)
        return
    if start < first * stride:
        yield from _inside(first - 1, rest, start, first * stride, stride)
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest), first * stride
    if last * stride < stop:
        yield from _inside(last, rest, last * stride, stop, stride)


def _inside(row: int, rest: Shape, start: int, stop: int, stride: int) -> Iterator[tuple[Shape, Shape, int]]:
    for offsets, lengths, at in _cut(rest, start - row * stride, stop - row * stride):
        yield (row, *offsets), (1, *lengths), at + row * stride
