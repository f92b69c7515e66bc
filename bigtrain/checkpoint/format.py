"""The files of a checkpoint, and how each byte of them is checked.

step-00000100/
    weights-00000.safetensors ...    the boxes of weights and buffers of one rank
    optimizer-00000.safetensors ...  its boxes of the optimizer's slots
    progress.json                    the scalars that stand beside the weights
    manifest.json                    where each box lies, and all checksums, its own too; written last: without it the
                                     checkpoint does not exist

A box that is a whole tensor has the tensor's name as its key in the file, so safetensors alone reads the weights that
one process saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from bigtrain.disk import sync
from bigtrain.errors import DamagedError
from bigtrain.state import BUFFER, WEIGHT, Box, Shape

FORMAT = 2
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
BLOCK = 2**22  # bytes of a box that share a checksum: the least that is read to have any of them
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def step_folder(root: Path, step: int) -> Path:
    """Of the checkpoint after `step` steps."""
    return root / f"step-{step:08d}"


def complete(root: Path) -> list[Path]:
    """The checkpoints under `root` that are whole, oldest first; some may hold weights only."""
    return sorted(manifest.parent for manifest in root.glob(f"step-*/{MANIFEST}"))


def checksum(data: Any) -> str:
    """XXH3 of bytes, 64 bits, as hexadecimal digits (xxhash.com; no defence against forgery, only against damage)."""
    return xxhash.xxh3_64_hexdigest(data)


def checksums(data: memoryview) -> list[str]:
    """Of each BLOCK of a box's bytes."""
    return [checksum(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]


class Place(NamedTuple):
    """Where a box lies in a file: its key, its first byte there, and how many there are."""

    key: str
    begin: int
    size: int


def lay_out(boxes: Iterable[Box]) -> tuple[bytes, list[tuple[Box, Place]]]:
    """The header of the safetensors file that holds the boxes, and where in the file each of them goes.

    Largest elements first, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed, at = [], 0
    for box in sorted(boxes, key=lambda box: -box.tensor.itemsize):
        key, size = _key(box), box.tensor.numel() * box.tensor.itemsize
        assert key not in header, f"{key} is given twice"
        header[key] = {
            "dtype": NAMES[box.tensor.dtype],
            "shape": list(box.tensor.shape),
            "data_offsets": [at, at + size],
        }
        placed.append((box, Place(key, at, size)))
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text
    return whole, [(box, place._replace(begin=place.begin + len(whole))) for box, place in placed]


def _key(box: Box) -> str:
    name = box.name if box.slot in (WEIGHT, BUFFER) else f"{box.name}|{box.slot}"
    return name if box.shape == tuple(box.tensor.shape) else f"{name}|{','.join(map(str, box.offsets))}"


def read_header(path: Path) -> Iterator[tuple[str, torch.dtype, Shape, int]]:
    """(key, dtype, shape, first byte) of each tensor of a safetensors file. Raises DamagedError if it is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                if end - begin != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{key} has {end - begin} bytes")
                yield key, dtype, shape, 8 + length + begin
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(path.parent, f"{path} is no safetensors file that can be read: {error}") from None


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_json(path: Path, value: Any) -> str:
    """Write so that the file is the old one or the new one, also after a power cut; returns its checksum."""
    text = json.dumps(value, separators=(",", ":")) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)
    return checksum(text.encode())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a checksum of itself; with it the checkpoint begins to exist."""
    write_json(folder / MANIFEST, {"checksum": checksum(json.dumps(manifest).encode()), **manifest})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint, whose files have the sizes that it says.

    Raises DamagedError if anything of that is not so, CheckpointError for another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        said = manifest.pop("checksum")
        right = said == checksum(json.dumps(manifest).encode())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(folder, f"{path} cannot be read: {error}") from None
    if not right:
        raise DamagedError(folder, f"{path} is not what was written: its checksum differs")
    for name, facts in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise DamagedError(folder, f"{file} {found}")
    return manifest


def read_progress(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The content of progress.json. Raises DamagedError if it is not what was written."""
    try:
        text = (folder / PROGRESS).read_bytes()
    except OSError as error:
        raise DamagedError(folder, f"{folder / PROGRESS} cannot be read: {error}") from None
    if checksum(text) != manifest["files"][PROGRESS]["checksum"]:
        raise DamagedError(folder, f"{folder / PROGRESS} is not what was written: its checksum differs")
    return json.loads(text)
