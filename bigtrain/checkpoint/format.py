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
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from bigtrain.disk import sync
from bigtrain.errors import CheckpointError, DamagedError
from bigtrain.state import BUFFER, WEIGHT, Box
from bigtrain.tensor_files import DTYPES

FORMAT = 2
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
BLOCK = 2**22  # bytes of a box that share a checksum: the least that is read to have any of them
PIECE = 2**20  # bytes that are written at a time: gigabytes at once take Linux longer
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def step_folder(root: Path, step: int) -> Path:
    """Of the checkpoint after `step` steps."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, by its name; None for one that has another name, a copy of it among them."""
    found = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(found[1]) if found else None


def complete(root: Path) -> list[Path]:
    """The checkpoints under `root` that are whole, oldest first; some may hold weights only."""
    found = {step_of(manifest.parent): manifest.parent for manifest in root.glob(f"step-*/{MANIFEST}")}
    return [folder for _, folder in sorted((step, folder) for step, folder in found.items() if step is not None)]


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


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_json(path: Path, value: Any) -> str:
    """Write so that the file is the old one or the new one, also after a power cut; returns its checksum."""
    text = _json(value)
    partial = path.with_suffix(".partial")
    write_file(partial, text)
    partial.replace(path)
    sync(path.parent)
    return checksum(text)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write and sync a file; one that could not be written whole does not stay."""
    try:
        with path.open("wb") as file:
            for at in range(0, len(data), PIECE):
                file.write(data[at : at + PIECE])
        sync(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a checksum of itself; with it the checkpoint begins to exist."""
    write_json(folder / MANIFEST, _sealed(manifest))


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"checksum": checksum(json.dumps(manifest).encode()), **manifest}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint, whose files have the sizes that it says.

    Raises DamagedError if anything of that is not so, CheckpointError for another format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        if "checksum" not in manifest:
            _check_format(folder, manifest)
        del manifest["checksum"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(folder, f"{path} cannot be read: {error}") from None
    if text != _json(_sealed(manifest)):
        raise DamagedError(folder, f"{path} is not what was written: its checksum differs")
    _check_format(folder, manifest)
    for name, facts in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise DamagedError(folder, f"{file} {found}")
    return manifest


def _check_format(folder: Path, manifest: dict[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {manifest['format']}; this version reads {FORMAT}.")


def read_progress(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The content of progress.json. Raises DamagedError if it is not what was written."""
    try:
        text = (folder / PROGRESS).read_bytes()
    except OSError as error:
        raise DamagedError(folder, f"{folder / PROGRESS} cannot be read: {error}") from None
    if checksum(text) != manifest["files"][PROGRESS]["checksum"]:
        raise DamagedError(folder, f"{folder / PROGRESS} is not what was written: its checksum differs")
    return json.loads(text)
