"""Read boxes of a checkpoint that any engine wrote on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigtrain.checkpoint.save import FORMAT, MANIFEST, PROGRESS
from bigtrain.errors import CheckpointError, shorten
from bigtrain.state import BUFFER, WEIGHT, Shape


class Checkpoint:
    """A `Reader` of a complete checkpoint; reads only what it is asked for.

    weights_only: leave the optimizer's slots out, for a stage that starts from another one's weights.
    Raises CheckpointError for a folder that holds no complete checkpoint of this format.
    """

    def __init__(self, folder: Path, weights_only: bool = False):
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            self.progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no complete checkpoint: {error}") from None
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has checkpoint format {manifest['format']}; this version reads {FORMAT}.")
        self.step: int = manifest["step"]
        self._state: dict[str, dict[str, Any]] = manifest["state"]
        self._files: dict[str, Any] = {}
        found = {slot for slots in self._state.values() for slot in slots}
        self.slots: Sequence[str] = sorted(found & {WEIGHT, BUFFER} if weights_only else found)

    def check_fit(self, shapes: dict[str, Shape]) -> None:
        """Raises CheckpointError that names the parameters which the model or the checkpoint alone has, that differ in
        shape, or have no elements."""
        saved = {name: tuple(slots[WEIGHT]["shape"]) for name, slots in self._state.items() if WEIGHT in slots}
        both = sorted(shapes.keys() & saved.keys())
        problems = {
            "missing": sorted(shapes.keys() - saved.keys()),
            "unknown to the model": sorted(saved.keys() - shapes.keys()),
            "without elements": [name for name in both if 0 in saved[name]],
            "of another shape": [f"{n} {saved[n]} for {shapes[n]}" for n in both if saved[n] != shapes[n]],
        }
        told = [f"{what}: {shorten(names)}" for what, names in problems.items() if names]
        if told:
            raise CheckpointError(f"{self.folder} does not fit the model of its run; {'; '.join(told)}.")

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> Tensor:
        try:
            entry = self._state[name][slot]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no {slot} of {name}: it is another model's.") from None
        shape = entry["shape"]
        if len(shape) != len(offsets) or any(o + n > size for o, n, size in zip(offsets, lengths, shape, strict=True)):
            raise CheckpointError(f"{self.folder}: {name} has shape {shape}; the model's is another.")
        result: Tensor | None = None
        filled = 0
        for box in entry["boxes"]:
            overlap = _overlap(offsets, lengths, box["offsets"], box["lengths"])
            if overlap is None:
                continue
            there = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, box["offsets"], strict=True))
            here = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, offsets, strict=True))
            part = self._part(box["file"], box["key"], there)
            if part.shape == torch.Size(lengths):
                return part
            if result is None:
                result = torch.empty(lengths, dtype=part.dtype)
            result[here] = part
            filled += part.numel()
        if result is None or filled != result.numel():
            raise CheckpointError(f"{self.folder}: parts of {name} ({slot}) are missing.")
        return result

    def _part(self, file: str, key: str, place: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            reader = self._files[file]
            return reader.get_slice(key)[place] if place else reader.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from None


def _overlap(
    offsets: Sequence[int], lengths: Sequence[int], box_offsets: Sequence[int], box_lengths: Sequence[int]
) -> list[tuple[int, int]] | None:
    """[begin, end) in each dimension of what two boxes share, or None."""
    shared = [
        (max(a, b), min(a + n, b + m)) for a, n, b, m in zip(offsets, lengths, box_offsets, box_lengths, strict=True)
    ]
    return shared if all(begin < end for begin, end in shared) else None
