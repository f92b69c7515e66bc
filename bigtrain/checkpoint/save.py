"""Save the state while the steps go on: a copy in host memory at once, the files behind it, the manifest last."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.checkpoint.format import (
    BLOCK,
    FORMAT,
    PROGRESS,
    bytes_of,
    checksum,
    checksums,
    complete,
    lay_out,
    step_folder,
    write_file,
    write_json,
    write_manifest,
)
from bigtrain.checkpoint.retention import Retention, discard, resumable
from bigtrain.disk import sync
from bigtrain.errors import CheckpointError
from bigtrain.state import BUFFER, WEIGHT, Box


class Saved(NamedTuple):
    """A checkpoint that is complete. stalled: seconds that training stood still for it; seconds: until it was whole."""

    folder: Path
    step: int
    stalled: float
    seconds: float


class Saver:
    """Saves the states of a stage, on all ranks together; never two at once.

    `save` returns once this rank's boxes are copied to host memory, in buffers that are kept for the next time. A
    thread writes them. Once no rank is `busy`, each rank has to call `publish`, whereupon rank 0 makes the checkpoint
    complete. What goes wrong behind the steps is raised by the next call of anything. A context: leaving it waits for
    the thread.
    """

    def __init__(
        self,
        root: Path,
        retention: Retention,
        told: Callable[[Saved], None],
        *,
        asynchronous: bool = True,
        frozen: bool = False,
        check_there: Callable[[], None] = lambda: None,
    ):
        """frozen: the weights that do not train have been saved with `save_frozen`.
        told: is called on rank 0 with every checkpoint that is complete, by the thread that completes it.
        check_there: raises CheckpointError if the run's folder is not the one any more in which the run began.
        """
        self._root = root
        self._retention = retention
        self._told = told
        self._asynchronous = asynchronous
        self._frozen = frozen
        self._check_there = check_there
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._buffers: dict[str, Tensor] = {}
        self._current: _Save | None = None  # until it is published
        self._publishing: Future[None] | None = None  # on rank 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)

    def save(self, step: int, boxes: Iterable[Box], progress: dict[str, Any]) -> float:
        """Begin to save the state after `step` steps; collective. Returns the seconds that training stood still.

        Nothing is gathered. Raises CheckpointError when the disk is full or cannot be written.
        """
        began = time.perf_counter()
        self.finish()
        folder = step_folder(self._root, step)
        if self._rank == 0:
            self._check_there()  # else a folder that is gone would be made again, and lack all but this
            with self._writing(folder):
                discard(folder)  # left by a save that was interrupted: it has no manifest
                folder.mkdir(parents=True)
        dist.barrier()
        files = self._copied(boxes)
        self._current = save = _Save(folder, step, progress, began)
        save.stalled = time.perf_counter() - began
        save.writing = self._thread.submit(self._write, save, files)
        if not self._asynchronous:
            self.finish()
            save.stalled = time.perf_counter() - began
        return save.stalled

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing its share of a checkpoint."""
        if self._publishing is not None and self._publishing.done():
            self._publishing.result()
            self._publishing = None
        if self._current is None:
            return False
        if self._current.writing.done():
            self._current.writing.result()
            return False
        return True

    def publish(self) -> None:
        """Make the checkpoint complete that every rank has written, if there is one; returns at once."""
        if self._current is None:
            return
        if self._rank == 0:
            self._publishing = self._thread.submit(self._complete, self._current)
        self._current = None

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is complete; collective."""
        if self._current is not None:
            self._current.writing.result()
            dist.barrier()
            self.publish()
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None

    def _copied(self, boxes: Iterable[Box]) -> dict[str, _File]:
        """The files that this rank has to write, their bytes copied from the device."""
        kinds: dict[str, list[Box]] = {"weights": [], "optimizer": []}
        for box in boxes:
            kinds["weights" if box.slot in (WEIGHT, BUFFER) else "optimizer"].append(box)
        files = {}
        for kind, its_boxes in kinds.items():
            header, placed = lay_out(its_boxes)
            if not placed:
                continue
            size = len(header) + sum(place.size for _, place in placed)
            buffer = self._buffer(kind, size, placed[0][0].tensor.is_cuda)
            buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            for box, place in placed:
                there = buffer[place.begin : place.begin + place.size].view(box.tensor.dtype).view(box.tensor.shape)
                there.copy_(box.tensor.detach(), non_blocking=True)
            entries = [_entry(box, place.begin, place.size) for box, place in placed]
            files[f"{kind}-{self._rank:05d}.safetensors"] = _File(buffer[:size], len(header), entries)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return files

    def _buffer(self, kind: str, size: int, pin: bool) -> Tensor:
        """At least `size` bytes, aligned for any dtype after a safetensors header."""
        if kind not in self._buffers or self._buffers[kind].numel() < size:
            self._buffers[kind] = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        return self._buffers[kind]

    def _write(self, save: _Save, files: dict[str, _File]) -> None:
        """By the thread: this rank's files, and then what the manifest has to say of them."""
        told: dict[str, Any] = {"files": {}, "boxes": []}
        with self._writing(save.folder):
            for name, file in files.items():
                data = bytes_of(file.data)
                write_file(save.folder / name, data)
                told["files"][name] = {
                    "bytes": len(data),
                    "header": file.header,
                    "checksum": checksum(data[: file.header]),
                }
                for entry in file.boxes:
                    at, size = entry["begin"], entry.pop("bytes")
                    told["boxes"].append({**entry, "file": name, "checksums": checksums(data[at : at + size])})
            write_json(save.folder / _part(self._rank), told)

    def _complete(self, save: _Save) -> None:
        """By rank 0's thread: the manifest, and then whatever need not stay."""
        files: dict[str, Any] = {}
        state: dict[str, dict[str, Any]] = {}
        with self._writing(save.folder):
            parts = [save.folder / _part(rank) for rank in range(self._world_size)]
            for part in parts:
                told = json.loads(part.read_bytes())
                files |= told["files"]
                for box in told["boxes"]:
                    name, slot, dtype, shape = (box.pop(key) for key in ("name", "slot", "dtype", "shape"))
                    tensor = {"dtype": dtype, "shape": shape, "boxes": []}
                    state.setdefault(name, {}).setdefault(slot, tensor)["boxes"].append(box)
                part.unlink()
            text = write_json(save.folder / PROGRESS, save.progress)
            files[PROGRESS] = {"bytes": (save.folder / PROGRESS).stat().st_size, "checksum": text}
            manifest = {"format": FORMAT, "step": save.step, "block": BLOCK, "weights_only": False}
            manifest |= {"frozen": True} if self._frozen else {}
            write_manifest(save.folder, {**manifest, "files": files, "state": state})
            sync(save.folder.parent)
            self._retention.apply(save.folder)
        self._told(Saved(save.folder, save.step, save.stalled, time.perf_counter() - save.began))

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Turn what the disk refuses into a sentence."""
        try:
            yield
        except OSError as error:
            self._check_there()
            whole = any(map(resumable, complete(folder.parent)))
            before = "The checkpoints before it are whole" if whole else "There is none before it"
            rest = ", and it goes on from the newest of them" if whole else ""
            raise CheckpointError(
                f"the checkpoint {folder} cannot be written: {error.strerror} ({error.filename or folder}). {before}: "
                f"make room or mend the folder, then start the run again{rest}."
            ) from error


class NoSaver:
    """Saves nothing, for a run of which nothing is to be kept."""

    busy = False

    def save(self, step: int, boxes: Iterable[Box], progress: dict[str, Any]) -> float:  # noqa: ARG002
        return 0.0

    def publish(self) -> None: ...

    def finish(self) -> None: ...


def save(
    root: Path, step: int, boxes: Iterable[Box], progress: dict[str, Any], retention: Retention, frozen: bool = False
) -> Path:
    """Save the state after `step` steps and wait until the checkpoint is complete; collective. Returns its folder."""
    with Saver(root, retention, lambda _: None, asynchronous=False, frozen=frozen) as saver:
        saver.save(step, boxes, progress)
    return step_folder(root, step)


@dataclass
class _File:
    """data: the bytes of a safetensors file, uint8; the first `header` of them are its header."""

    data: Tensor
    header: int
    boxes: list[dict[str, Any]]


@dataclass
class _Save:
    """A checkpoint under way."""

    folder: Path
    step: int
    progress: dict[str, Any]
    began: float
    stalled: float = 0.0
    writing: Future[None] = field(init=False)


def _part(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _entry(box: Box, begin: int, size: int) -> dict[str, Any]:
    return {
        "name": box.name,
        "slot": box.slot,
        "dtype": str(box.tensor.dtype).removeprefix("torch."),
        "shape": list(box.shape),
        "offsets": list(box.offsets),
        "lengths": list(box.tensor.shape),
        "begin": begin,
        "bytes": size,
    }
