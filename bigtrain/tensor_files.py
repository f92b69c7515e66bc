"""Reading safetensors files a part at a time, by pread: what is mapped instead counts as the process's memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bigtrain.errors import CheckpointError, reason
from bigtrain.pretrained import wrong_file
from bigtrain.state import Shape, flat_span, lies_inside

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class UnknownDtype(Exception):
    """A tensor is stored in a way that is not read here; the message says which and how."""


class Stored(NamedTuple):
    """A tensor in a file, and its first byte there."""

    path: Path
    dtype: torch.dtype
    shape: Shape
    begin: int

    def read(self, offsets: Shape, lengths: Shape) -> Tensor:
        """The box of it that begins at `offsets`, of shape `lengths`; all from its first to its last element is read.

        Raises CheckpointError where the box lies outside, OSError if the file cannot be read.
        """
        if not lies_inside(self.shape, offsets, lengths):
            raise CheckpointError(f"the box {offsets} + {lengths} does not fit a tensor of shape {self.shape}")
        first, stop, strides = flat_span(self.shape, offsets, lengths)
        data = torch.empty(stop - first, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            read_whole(file.fileno(), data.view(torch.uint8).numpy().data, self.begin + first * self.dtype.itemsize)
        return data.as_strided(lengths, strides)


def read_header(path: Path) -> Iterator[tuple[str, Stored]]:
    """(key, where it is) of each tensor of a safetensors file.

    Raises CheckpointError if it is none, or not whole; UnknownDtype if it holds a dtype that is not in DTYPES; OSError
    if it cannot be read.
    """
    if (wrong := wrong_file(path)) is not None:
        raise CheckpointError(wrong)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise UnknownDtype(f"{path}: {key} is stored as {entry['dtype']}")
                stored = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
                if end - begin != math.prod(stored.shape) * stored.dtype.itemsize:
                    raise ValueError(f"{key} has {end - begin} bytes")
                if not 0 <= begin <= end <= size - 8 - length:
                    raise ValueError(f"it ends within {key}, after {size} bytes")
                yield key, stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {reason(error)}; fetch it again.") from None


def read_whole(descriptor: int, data: memoryview, at: int) -> None:
    """Fill `data` from byte `at` of a file on. Raises OSError if it ends before."""
    done = 0
    while done < len(data):
        count = os.preadv(descriptor, [data[done:]], at + done)
        if count == 0:
            raise OSError(f"it ends {len(data) - done} bytes too early")
        done += count
