"""Which checkpoints of a stage stay on the disk, and for how long with their optimizer's slots."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.format import MANIFEST, complete, read_manifest, step_of, write_manifest
from bigtrain.config.origin import DAMAGED
from bigtrain.errors import CheckpointError, DamagedError
from bigtrain.state import BUFFER, WEIGHT

AHEAD = "ahead"  # like DAMAGED, begins the name of a folder that nobody will take for a checkpoint


@dataclass(frozen=True)
class Retention:
    """keep: how many of the newest stay whole. every: of the older ones, those whose step is a multiple of it stay
    too, without the optimizer's slots if `weights_only`."""

    keep: int
    every: int | None = None
    weights_only: bool = False

    def apply(self, saved: Path) -> None:
        """Remove what need not stay beside the checkpoint that has just been saved.

        Only those that a run can continue from count for `keep`: one without its slots, or with a file that is missing
        or too short, never takes the place of one that is whole. Those of later steps are let alone.
        """
        step = _step(saved)
        before = [folder for folder in complete(saved.parent) if _step(folder) < step]
        oldest, left = step, self.keep - 1
        for folder in reversed(before):
            if left and is_usable(folder):
                oldest, left = _step(folder), left - 1
        for folder in before:
            if _step(folder) >= oldest:
                continue
            if self.every is None or _step(folder) % self.every:
                discard(folder)
            elif self.weights_only:
                _drop_optimizer(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint, or what is there of it; one that is half removed is never taken for a whole one."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def discard_incomplete(root: Path) -> None:
    """Remove what interrupted saves have left under `root`."""
    whole = set(complete(root))
    for folder in root.glob("step-*"):
        if step_of(folder) is not None and folder not in whole:
            discard(folder)


def set_aside(folder: Path, why: str = DAMAGED) -> Path:
    """Rename a checkpoint so that no run takes it; returns where it lies now."""
    aside = folder.with_name(f"{why}-{folder.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{why}-{folder.name}.{number}")
    return folder.rename(aside)


def resumable(folder: Path) -> bool:
    """Whether a run can continue from a complete checkpoint. One whose manifest is damaged counts: reading it tells."""
    try:
        return not json.loads((folder / MANIFEST).read_bytes())["weights_only"]
    except (ValueError, KeyError, TypeError):
        return True


def is_usable(folder: Path) -> bool:
    """Whether a run can continue from a complete checkpoint, as far as its manifest and the sizes of its files tell."""
    try:
        return not read_manifest(folder)["weights_only"]
    except CheckpointError:
        return False


def _step(folder: Path) -> int:
    step = step_of(folder)
    assert step is not None, folder
    return step


def _drop_optimizer(folder: Path) -> None:
    """Of one that is damaged nothing is removed: this is no place to tell of it."""
    try:
        manifest = read_manifest(folder) if resumable(folder) else None
    except DamagedError:
        return
    if manifest is not None:
        for slots in manifest["state"].values():
            for slot in slots.keys() - {WEIGHT, BUFFER}:
                del slots[slot]
        used = {box["file"] for slots in manifest["state"].values() for slot in slots.values() for box in slot["boxes"]}
        manifest["files"] = {n: f for n, f in manifest["files"].items() if n in used or not n.endswith(".safetensors")}
        write_manifest(folder, manifest | {"weights_only": True})
    for file in folder.glob("optimizer-*.safetensors"):  # also when a kill came between the two
        file.unlink()
