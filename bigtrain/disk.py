"""Writing to a disk that may fill up or lose power: folders that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import filelock

from bigtrain.config.files import literal
from bigtrain.errors import BigtrainError, DataError

SCRATCH = "bigtrain-"  # begins the name of a temporary folder


def make_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Have `build` fill the folder, with `manifest.json` as its last file, unless that has been done.

    Of several processes the first one builds and the others wait for it; what a killed one left is removed. Raises
    DataError when the disk is full.
    """
    if is_made(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(folder.name + ".lock")):
        if not is_made(folder):
            publish(folder, build)
    return folder


def is_made(folder: Path) -> bool:
    """Whether `make_once` has finished a folder."""
    return (folder / "manifest.json").is_file()


def publish(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill a folder under another name; it gets its own once all of it is on the disk.

    What an earlier attempt has left is removed: the caller sees to it that it is the only one. Raises DataError when
    the disk is full.
    """
    partial = folder.with_name(folder.name + ".partial")
    with _room_on_the_disk(folder):
        for leftover in (partial, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        try:
            build(partial)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk has no room for what nobody will read
            raise
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)


def remove(folder: Path) -> None:
    """Remove a folder that others may be looking into: they see all of it or nothing."""
    going = folder.with_name(f"{folder.name}.removed-{os.uname().nodename}-{os.getpid()}")
    try:
        folder.rename(going)
    except FileNotFoundError:  # somebody else was faster
        return
    shutil.rmtree(going)


def file_within(folder: Path, name: Any) -> Path:
    """The file of a folder that a manifest or an index in it names.

    Raises ValueError for a name that leads elsewhere: an absolute one, `..`, a link out of the folder.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"it names {literal(name)}, which is no file of its folder")
    path = folder / name
    if path.is_symlink() and folder.resolve() not in path.resolve().parents:
        raise ValueError(f"it names {literal(name)}, which is a link to {path.resolve()}, outside its folder")
    return path


def write_whole(path: Path, text: str | bytes, durable: bool = False) -> None:
    """Write a file so that it is the old one or the new one, never a half. durable: also after a power cut."""
    with replaced(path, durable) as file:
        file.write(text.encode() if isinstance(text, str) else text)


@contextmanager
def replaced(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once all went well, and is gone if it did not."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        if durable:
            sync(partial)
        partial.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Seal:
    """How a manifest holds a checksum of itself. key: under which; digest: of the JSON of the rest, in hexadecimal
    digits. first: whether it is the first key; indent: of the JSON, None for a single line."""

    key: str
    digest: Callable[[bytes], str]
    first: bool = False
    indent: int | None = None

    def text(self, manifest: dict[str, Any]) -> str:
        """The manifest as it is written."""
        rest = {name: value for name, value in manifest.items() if name != self.key}
        own = {self.key: self.digest(json.dumps(rest).encode())}
        separators = (",", ":") if self.indent is None else None
        return json.dumps(own | rest if self.first else rest | own, indent=self.indent, separators=separators) + "\n"

    def is_whole(self, text: bytes, manifest: dict[str, Any]) -> bool:
        """Whether a manifest, as it was read, is what was written."""
        return text == self.text(manifest).encode()


def check_sizes(folder: Path, sizes: Mapping[Any, Any]) -> list[str]:
    """What is wrong with the files of a folder: a sentence for each that is missing or has another size in bytes.

    Raises ValueError for a name that leads out of the folder.
    """
    wrong = []
    for file, expected in {file_within(folder, name): size for name, size in sizes.items()}.items():
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes instead of {expected}"
            wrong.append(f"{file} {found}")
    return wrong


def append_lines(path: Path) -> TextIO:
    """Open for appending whole lines: what a killed process has left of its last line gets a line of its own."""
    torn = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as before:
            before.seek(-1, os.SEEK_END)
            torn = before.read() != b"\n"
    file = path.open("a", encoding="utf-8", buffering=1)
    if torn:
        file.write("\n")
    return file


@contextmanager
def scratch(what: str = "") -> Iterator[Path]:
    """A temporary folder, bigtrain-WHAT-*, that is removed at the end; those of processes that were killed go as well.

    A lock in it, that its process holds, tells whether that one lives.
    """
    temporary = Path(tempfile.gettempdir())
    for left in temporary.glob(f"{SCRATCH}*"):
        _remove_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{SCRATCH}"))
    lock = filelock.FileLock(folder / "lock")
    lock.acquire()
    folder = folder.rename(temporary / f"{SCRATCH}{what}{folder.name.removeprefix(f'.{SCRATCH}')}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release(force=True)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError, filelock.Timeout):  # it is another one's, or another process is at it
        if (folder / "lock").is_file() and folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
            with filelock.FileLock(folder / "lock", timeout=0):
                shutil.rmtree(folder)


def clean(folder: Path) -> None:
    """Remove what processes that were killed have left beside the folders that `make_once` and `remove` are about."""
    host = os.uname().nodename
    for left in folder.glob("*.removed-*"):
        where, _, process = left.name.partition(".removed-")[2].rpartition("-")
        if where == host and process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob("*.partial"):
        if left.is_dir():
            with suppress(OSError, filelock.Timeout), filelock.FileLock(left.with_suffix(".lock"), timeout=0):
                shutil.rmtree(left)


@contextmanager
def told_as(error: type[BigtrainError], what: str, remedy: str) -> Iterator[None]:
    """Turn what the disk refuses into a sentence: `what` cannot be written, why, and the remedy."""
    try:
        yield
    except OSError as refused:
        reason = f"{refused.strerror or refused}" + (f" ({refused.filename})" if refused.filename else "")
        raise error(f"{what} cannot be written: {reason}. {remedy}") from refused


def check_free(folder: Path, needed: float, what: str) -> None:
    """Raises DataError if the disk of `folder` has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{what} needs about {megabytes(needed)}, and the disk of {folder} has {megabytes(free)} free. Make room "
            "there, or set `output` to a folder on another disk."
        )


def megabytes(size: float) -> str:
    """A number of bytes to be read: 12.3 MB."""
    return f"{size / 1e6:,.1f} MB"


@contextmanager
def _room_on_the_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the disk is full: {folder} could not be written ({error.strerror}). Make room there, or set `output` to "
            "a folder on another disk, and start again: what was finished before is kept."
        ) from error


def sync(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
