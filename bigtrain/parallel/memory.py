"""Building and loading an engine with little more host memory than what it keeps."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator

from torch import Tensor

from bigtrain.state import Shape, StateReader

PIECE = 2**22  # elements that are read at once


def fill(tensor: Tensor, reader: StateReader, name: str, slot: str, offsets: Shape) -> None:
    """Fill a tensor with the box of `name` that begins at `offsets`. Raises CheckpointError as the reader does.

    It is read a piece at a time: what is read exists twice.
    """
    for begin, lengths in _pieces(tuple(tensor.shape)):
        there = tensor[tuple(slice(b, b + n) for b, n in zip(begin, lengths, strict=True))]
        there.copy_(reader.read(name, slot, tuple(o + b for o, b in zip(offsets, begin, strict=True)), lengths))


def _pieces(shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """(where it begins, its shape) of boxes that make up one of `shape`, each one run of at most PIECE elements."""
    if math.prod(shape) <= PIECE:
        yield (0,) * len(shape), shape
        return
    rest = shape[1:]
    rows = PIECE // math.prod(rest)
    if rows:
        for row in range(0, shape[0], rows):
            yield (row, *(0 for _ in rest)), (min(rows, shape[0] - row), *rest)
        return
    for row in range(shape[0]):
        for begin, lengths in _pieces(rest):
            yield (row, *begin), (1, *lengths)


def trim_memory() -> None:
    """Let the system have the host memory that was freed: the C library keeps tensors below 32 MiB for new ones."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
