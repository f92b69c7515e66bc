"""Read boxes of a checkpoint that any engine wrote on any number of ranks, each block of them checked."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.checkpoint.format import (
    MANIFEST_DTYPES,
    bytes_of,
    check_tensor,
    checksum,
    complete,
    frozen_folder,
    overlap,
    read_manifest,
    read_progress,
)
from bigtrain.checkpoint.retention import resumable
from bigtrain.errors import CheckpointError, DamagedError, shorten
from bigtrain.models.architecture import parameter_shapes, persistent_buffers
from bigtrain.state import BUFFER, WEIGHT, Shape, flat_span, lies_inside
from bigtrain.tensor_files import read_whole


def newest(root: Path, weights_only: bool = False) -> Path | None:
    """The newest complete checkpoint under `root` that a run can continue from, or that holds weights at least."""
    return next((folder for folder in reversed(complete(root)) if weights_only or resumable(folder)), None)


class Checkpoint:
    """A `StateReader` of a complete checkpoint; reads only what it is asked for, and nothing that fails its checksum.

    weights_only: leave the optimizer's slots out, for a stage that starts from another one's weights.
    Raises DamagedError for a folder that holds no complete checkpoint, CheckpointError for another format.
    """

    def __init__(self, folder: Path, weights_only: bool = False):
        self.folder = folder
        manifest = read_manifest(folder)
        self.progress = read_progress(folder, manifest)
        self.step: int = manifest["step"]
        self._block: int = manifest["block"]
        self._headers: dict[str, Any] = manifest["files"]
        self._state: dict[str, dict[str, Any]] = manifest["state"]
        self._weights_only = weights_only
        self._frozen = _open_frozen(folder) if manifest.get("frozen") else None
        self._files: dict[str, int] = {}
        self._checked: set[tuple[str, str]] = set()  # tensors whose places in the files are known to be right

    @property
    def names(self) -> frozenset[str]:
        """Of its parameters and buffers."""
        return frozenset(self._tensors())

    def slots_of(self, name: str) -> Sequence[str]:
        if name not in self._state and self._frozen is not None:
            return self._frozen.slots_of(name)
        found = self._state.get(name, {}).keys()
        return sorted(found & {WEIGHT, BUFFER} if self._weights_only else found)

    def close(self) -> None:
        """Close its files."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._frozen is not None:
            self._frozen.close()

    def check_fit(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Raises CheckpointError that names the parameters, or the buffers that belong to the state, which the model or
        the checkpoint alone has, that differ in shape, or have no elements. head: parameters of the model that take the
        place of another head, and that the checkpoint need not have."""
        buffers = {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model)}
        for slot, shapes, where in ((WEIGHT, parameter_shapes(model), ""), (BUFFER, buffers, " (buffers)")):
            saved = {name: tuple(slots[slot]["shape"]) for name, slots in self._tensors().items() if slot in slots}
            if head and slot == WEIGHT:
                base = f"{model.base_model_prefix}."
                saved = {name: shape for name, shape in saved.items() if name.startswith(base) or name in head}
                shapes = {name: shape for name, shape in shapes.items() if name not in head or name in saved}
            check_shapes(f"{self.folder}{where}", saved, shapes)

    def _tensors(self) -> dict[str, dict[str, Any]]:
        return self._state if self._frozen is None else self._frozen._state | self._state

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> Tensor:
        if name not in self._state and self._frozen is not None:
            with _needed_by(self.folder):
                return self._frozen.read(name, slot, offsets, lengths)
        try:
            entry = self._state[name][slot]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no {slot} of {name}: it is another model's.") from None
        if (name, slot) not in self._checked:
            check_tensor(self.folder, f"{name} ({slot})", entry, self._headers, self._block)
            self._checked.add((name, slot))
        if not lies_inside(entry["shape"], offsets, lengths):
            raise CheckpointError(f"{self.folder}: {name} has shape {entry['shape']}; the model's is another.")
        dtype = MANIFEST_DTYPES[entry["dtype"]]
        result: Tensor | None = None
        filled = 0
        for box in entry["boxes"]:
            shared = overlap(offsets, lengths, box["offsets"], box["lengths"])
            if shared is None:
                continue
            begin = [a - o for (a, _), o in zip(shared, box["offsets"], strict=True)]
            part = self._part(box, dtype, begin, [b - a for a, b in shared])
            if part.shape == torch.Size(lengths):
                return part
            if result is None:
                result = torch.empty(lengths, dtype=dtype)
            here = tuple(slice(a - o, b - o) for (a, b), o in zip(shared, offsets, strict=True))
            result[here] = part
            filled += part.numel()
        if result is None or filled != result.numel():
            raise CheckpointError(f"{self.folder}: parts of {name} ({slot}) are missing.")
        return result

    def _part(self, box: dict[str, Any], dtype: torch.dtype, begin: list[int], lengths: list[int]) -> Tensor:
        """A part of a box, of shape `lengths`, from the blocks that hold it."""
        span = flat_span(box["lengths"], begin, lengths)
        whole = math.prod(box["lengths"]) * dtype.itemsize
        start = span.first * dtype.itemsize // self._block * self._block
        stop = min(whole, -(-span.stop * dtype.itemsize // self._block) * self._block)
        data = torch.empty(stop - start, dtype=torch.uint8)
        self._read(box, bytes_of(data), start)
        return data.view(dtype).as_strided(lengths, span.strides, span.first - start // dtype.itemsize)

    def _read(self, box: dict[str, Any], data: memoryview, start: int) -> None:
        """Fill `data` with the blocks of a box that begin with its byte `start`. Raises DamagedError."""
        path = self.folder / box["file"]
        try:
            if box["file"] not in self._files:
                self._open(box["file"])
            read_whole(self._files[box["file"]], data, box["begin"] + start)
        except OSError as error:
            raise DamagedError(self.folder, f"{path} cannot be read: {error}") from None
        for number, expected in enumerate(box["checksums"][start // self._block :]):
            block = data[number * self._block : (number + 1) * self._block]
            if not block:
                break
            if checksum(block) != expected:
                at = box["begin"] + start + number * self._block
                raise DamagedError(
                    self.folder, f"{path} is not what was written: the checksum of its bytes from {at} on differs"
                )

    def _open(self, name: str) -> None:
        """Open a file and check its header, which nobody else looks at."""
        self._files[name] = os.open(self.folder / name, os.O_RDONLY)
        header = bytearray(self._headers[name]["header"])
        read_whole(self._files[name], memoryview(header), 0)
        if checksum(header) != self._headers[name]["checksum"]:
            raise DamagedError(self.folder, f"{self.folder / name} is not what was written: its header differs")


def _open_frozen(folder: Path) -> Checkpoint:
    """The frozen weights of a checkpoint."""
    with _needed_by(folder):
        return Checkpoint(frozen_folder(folder.parent))


@contextmanager
def _needed_by(folder: Path) -> Iterator[None]:
    """Frozen weights that are damaged are no reason to set a checkpoint aside: no other one can do without them."""
    try:
        yield
    except DamagedError as damaged:
        raise CheckpointError(
            f"{folder} needs the weights that do not train: {damaged}. Put whole files in place of the damaged ones, "
            f"or train the stage anew with `--restart {folder.parents[1].name}`."
        ) from None


def check_shapes(where: str, saved: dict[str, Shape], shapes: dict[str, Shape]) -> None:
    """Raises CheckpointError that names the parameters which `shapes`, of the model, or `saved` alone has, that differ
    in shape, or have no elements."""
    both = sorted(shapes.keys() & saved.keys())
    problems = {
        "missing": sorted(shapes.keys() - saved.keys()),
        "unknown to the model": sorted(saved.keys() - shapes.keys()),
        "without elements": [name for name in both if 0 in saved[name]],
        "of another shape": [f"{n} {saved[n]} for {shapes[n]}" for n in both if saved[n] != shapes[n]],
    }
    told = [f"{what}: {shorten(names)}" for what, names in problems.items() if names]
    if told:
        raise CheckpointError(f"{where} does not fit the model of its run; {'; '.join(told)}.")
