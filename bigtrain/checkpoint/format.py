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
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from bigtrain.disk import Seal, check_sizes, sync, write_whole
from bigtrain.errors import CheckpointError, DamagedError, reason
from bigtrain.state import BUFFER, WEIGHT, Box, flat_span, lies_inside
from bigtrain.tensor_files import DTYPES

FORMAT = 2
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
BLOCK = 2**22  # bytes of a box that share a checksum: the least that is read to have any of them
PIECE = 2**20  # bytes that are written at a time: gigabytes at once take Linux longer
MANIFEST_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}  # as a manifest names them
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def step_folder(root: Path, step: int) -> Path:
    """Of the checkpoint after `step` steps."""
    return root / f"step-{step:08d}"


def frozen_folder(checkpoints: Path) -> Path:
    """Of the weights that do not train, for all checkpoints of a stage."""
    return step_folder(checkpoints.parent / "frozen", 0)


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


SEAL = Seal("checksum", checksum, first=True)


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
    text = json.dumps(value, separators=(",", ":")).encode() + b"\n"
    write_whole(path, text, durable=True)
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


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a checksum of itself; with it the checkpoint begins to exist."""
    write_whole(folder / MANIFEST, SEAL.text(manifest), durable=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint, whose files have the sizes that it says.

    Raises DamagedError if anything of that is not so, CheckpointError for another format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        if SEAL.key not in manifest:
            _check_format(folder, manifest)
        is_whole = SEAL.is_whole(text, manifest)
        del manifest[SEAL.key]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(folder, f"{path} cannot be read: {reason(error)}") from None
    if not is_whole:
        raise DamagedError(folder, f"{path} is not what was written: its checksum differs")
    try:
        _check_format(folder, manifest)
        _check_values(manifest)
        wrong = check_sizes(folder, {name: metadata["bytes"] for name, metadata in manifest["files"].items()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(folder, f"{path} cannot be used: {reason(error)}") from None
    if wrong:
        raise DamagedError(folder, wrong[0])
    return manifest


def _check_values(manifest: dict[str, Any]) -> None:
    """Raises ValueError, KeyError, AttributeError or TypeError for a manifest that nobody here has written, whatever
    its checksum says. Of the tensors `check_tensor` sees to."""
    if type(manifest["weights_only"]) is not bool or type(manifest.get("frozen", False)) is not bool:
        raise ValueError("weights_only or frozen is neither true nor false")
    if not _is_count(manifest["step"]) or not _is_count(manifest["block"]) or manifest["block"] == 0:
        raise ValueError("its step or block is no number of steps or bytes")
    for name, slots in manifest["state"].items():
        for slot, entry in slots.items():
            if entry["dtype"] not in MANIFEST_DTYPES or not all(map(_is_count, entry["shape"])):
                raise ValueError(f"{name} ({slot}) has no shape or dtype that is known here")
    manifest["files"][PROGRESS].items()
    for name, metadata in manifest["files"].items():
        if not isinstance(metadata["checksum"], str):
            raise ValueError(f"{name} has no checksum")
        header = metadata["header"] if name.endswith(".safetensors") else 0
        if not (_is_count(metadata["bytes"]) and _is_count(header) and header <= metadata["bytes"]):
            raise ValueError(f"the size of {name} is none")


def check_tensor(folder: Path, name: str, entry: Any, manifest_files: dict[str, Any], block: int) -> None:
    """See that a tensor's boxes lie inside it and inside their files, hold each of its elements once, and have a
    checksum for every block: then no size that a manifest claims is taken on trust.

    Raises DamagedError.
    """
    try:
        shape, dtype = entry["shape"], MANIFEST_DTYPES[entry["dtype"]]
        elements = 0
        for box in entry["boxes"]:
            file, offsets, lengths = manifest_files[box["file"]], box["offsets"], box["lengths"]
            if not all(map(_is_count, (*shape, *offsets, *lengths, box["begin"]))):
                raise ValueError("a shape or an offset is no count")
            if len(lengths) != len(shape) or not lies_inside(shape, offsets, lengths):
                raise ValueError(f"the box {offsets} + {lengths} lies outside the shape {shape}")
            size = math.prod(lengths) * dtype.itemsize
            if box["begin"] < file["header"] or box["begin"] + size > file["bytes"]:
                raise ValueError(f"{size} bytes from {box['begin']} on lie outside {box['file']}")
            if len(box["checksums"]) != -(-size // block):
                raise ValueError("blocks have no checksum")
            elements += math.prod(lengths)
        if elements != math.prod(shape):
            raise ValueError(f"its boxes have {elements} elements, its shape {shape} has {math.prod(shape)}")
        _check_apart(shape, entry["boxes"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(folder, f"{folder / MANIFEST} cannot be used: {name}: {reason(error)}") from None


def _check_apart(shape: Sequence[int], boxes: list[dict[str, Any]]) -> None:
    """Raises ValueError if two boxes share an element. Compared are those whose runs in the flat tensor overlap."""
    spans = sorted((*flat_span(shape, box["offsets"], box["lengths"])[:2], i) for i, box in enumerate(boxes))
    near: list[tuple[int, int]] = []  # (end of its run, number) of boxes before
    for first, stop, i in spans:
        near = [(end, j) for end, j in near if end > first]
        for _, j in near:
            if overlap(*(boxes[n][key] for n in (i, j) for key in ("offsets", "lengths"))) is not None:
                raise ValueError(f"the boxes at {boxes[j]['offsets']} and {boxes[i]['offsets']} share elements")
        near.append((stop, i))


def overlap(
    offsets: Sequence[int], lengths: Sequence[int], box_offsets: Sequence[int], box_lengths: Sequence[int]
) -> list[tuple[int, int]] | None:
    """[begin, end) in each dimension of what two boxes share, or None."""
    shared = [
        (max(a, b), min(a + n, b + m)) for a, n, b, m in zip(offsets, lengths, box_offsets, box_lengths, strict=True)
    ]
    return shared if all(begin < end for begin, end in shared) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


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
