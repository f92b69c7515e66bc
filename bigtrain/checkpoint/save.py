"""Write the logical state: each rank its own boxes, rank 0 the manifest, last.

step-00000100/
    rank-00000.safetensors ...  the boxes of one rank, under the keys that the manifest names
    progress.json               the scalars that stand beside the weights
    manifest.json               written last: without it the checkpoint does not exist
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from bigtrain.disk import sync
from bigtrain.state import Box

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"


def save(root: Path, step: int, boxes: Iterable[Box], progress: dict[str, Any], keep: int) -> Path:
    """Save the state after `step` steps under `root`, on all ranks together; returns the checkpoint's folder.

    Nothing is gathered: a rank copies only its own boxes to host memory. Afterwards the `keep` newest remain.
    """
    folder = root / f"step-{step:08d}"
    rank = dist.get_rank()
    if rank == 0:
        if folder.exists():
            shutil.rmtree(folder)  # left by a save that was interrupted: it has no manifest
        folder.mkdir(parents=True)
    dist.barrier()
    entries = _write_boxes(folder / f"rank-{rank:05d}.safetensors", boxes)
    everyone: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(entries, everyone if rank == 0 else None)
    if rank == 0:
        _write_json(folder / PROGRESS, progress)
        _write_manifest(folder, step, [entry for entries in everyone for entry in entries])
        _retain(root, keep)
    dist.barrier()
    return folder


def _write_boxes(path: Path, boxes: Iterable[Box]) -> list[dict[str, Any]]:
    """Write one rank's file, if it has any boxes; returns their entries for the manifest."""
    tensors, entries = {}, []
    for box in boxes:
        key = f"{box.name}|{box.slot}|{','.join(map(str, box.offsets))}"
        assert key not in tensors, f"{key} is given twice"
        # a box is often a view of a larger buffer, which safetensors would refuse
        tensors[key] = box.tensor.detach().cpu().contiguous().clone()
        entries.append(
            {
                "name": box.name,
                "slot": box.slot,
                "shape": list(box.shape),
                "offsets": list(box.offsets),
                "lengths": list(box.tensor.shape),
                "file": path.name,
                "key": key,
            }
        )
    if tensors:
        save_file(tensors, path)
        sync(path)
    return entries


def _write_manifest(folder: Path, step: int, entries: list[dict[str, Any]]) -> None:
    state: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda e: (e["name"], e["slot"], e["offsets"])):
        slot = state.setdefault(entry["name"], {}).setdefault(entry["slot"], {"shape": entry["shape"], "boxes": []})
        slot["boxes"].append({k: entry[k] for k in ("offsets", "lengths", "file", "key")})
    _write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "state": state})


def _write_json(path: Path, value: Any) -> None:
    """Write so that the file is either absent or whole, also after a power cut."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _retain(root: Path, keep: int) -> None:
    for old in complete(root)[:-keep]:
        (old / MANIFEST).unlink()  # first, so that a half-removed checkpoint is never taken for a whole one
        shutil.rmtree(old)


def complete(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    return sorted(manifest.parent for manifest in root.glob(f"step-*/{MANIFEST}"))
