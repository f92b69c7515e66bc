"""The names in a run's folder, and whether a folder can become one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bigtrain.config.core import Broken

LOCK = "lock"  # the file in a run's folder that the job at work holds
RESERVED = (
    "tokenizer",
    "architecture",
    "first-weights",
    "preempted",
    "save-now",
    LOCK,
)  # what else a run's folder may hold

LONG_NAME = 200  # characters of a name: disks take 255 bytes of one, and endings come after it


def is_occupied(folder: Path) -> bool:
    """Whether there is something in a folder, and no run; a job that is about to begin one holds its LOCK already."""
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    there = {name for name in there if name != LOCK and not name.endswith(".partial")}
    return bool(there) and "config.yaml" not in there


def wrong_with_folder(output: Path, folder: Path) -> Broken:
    """(key, message) for what keeps a folder below `output` from being a run's."""
    try:
        if output.exists() and not output.is_dir():
            yield ("output",), f"{output} is a file; name a folder."
        elif folder.exists() and not folder.is_dir():
            yield ("name",), f"{folder} is a file; choose another `name` or `output`."
        elif is_occupied(folder):
            yield ("name",), f"{folder} is not empty and holds no run; choose another `name` or `output`."
        else:
            with suppress(FileNotFoundError):
                folder.stat()
    except OSError as error:
        yield ("output",), f"{folder} cannot be used as a folder: {error.strerror}; choose another."
