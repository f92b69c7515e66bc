"""Pretrained things by name: a folder, a Hub id, or a .gguf file, as arguments for transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigtrain.errors import BigtrainError, ConfigError

ADVICE = (
    "A folder must exist; a Hub id needs the network or the local cache, and for a gated model `hf auth login`; a file "
    "that was not fetched whole has to be fetched again."
)
WEIGHT_FILES = (".safetensors", ".bin", ".gguf")
OTHER_FILES = (".json", ".jinja", ".model")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what git leaves in place of a large file
LONGEST_REASON = 300  # characters


def arguments(source: str) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) for any `from_pretrained` of transformers. Code of the checkpoint is never run."""
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name, "trust_remote_code": False}
    return (str(path) if path.exists() else source), {"trust_remote_code": False}


def quiet() -> None:
    """Keep the progress bars of transformers and datasets out of what bigtrain prints."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # importing it takes long, and not all need it


@contextmanager
def silenced() -> Iterator[None]:
    """Keep back what transformers warns of, where it is refused or told here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def opening(source: str, key: str) -> Iterator[None]:
    """Turn whatever transformers raises for a checkpoint that cannot be had into one sentence about `key`."""
    try:
        yield
    except BigtrainError:
        raise
    except Exception as error:
        wrong = [told for file in files_of(source) if (told := wrong_file(file))]
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = wrong[0] if wrong else f"{lines[0][:LONGEST_REASON]} ({ADVICE})"
        raise ConfigError(f"{key}: {source} cannot be opened: {reason}") from error


def files_of(source: str) -> list[Path]:
    """What is read of a pretrained model's folder, or the .gguf file that it is; none of a Hub id's."""
    path = Path(source).expanduser()
    there = path.iterdir() if path.is_dir() else [path]
    return sorted(file for file in there if file.suffix in (*WEIGHT_FILES, *OTHER_FILES) and file.is_file())


def find_file(name: str, file: str) -> Path | None:
    """A file of a pretrained model's folder or Hub id, from the Hub or its cache if need be; None if it has none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, file)
    except OSError:  # how transformers says that the model has none
        return None
    return None if found is None else Path(found)


def weight_files(source: str, key: str) -> list[Path]:
    """What transformers would read the weights of a folder or Hub id from: model.safetensors or pytorch_model.bin, or
    the files that an index names. Raises ConfigError, about `key`, for an index that names what is not there."""
    name, _ = arguments(source)
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (whole := find_file(name, file)) is not None:
            return [whole]
        if (index := find_file(name, f"{file}.index.json")) is not None:
            with opening(source, key):
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                return [_shard(source, key, index, shard) for shard in shards]
    return []


def _shard(source: str, key: str, index: Path, shard: str) -> Path:
    if Path(shard).is_absolute() or ".." in Path(shard).parts:
        raise ConfigError(f"{key}: {index} names {shard}, which is no file of its folder.")
    found = find_file(arguments(source)[0], shard)
    if found is None:
        raise ConfigError(f"{key}: {source} has no {shard}, which its {index.name} names; fetch it.")
    return found


def wrong_file(path: Path) -> str | None:
    """In a sentence, why a file of a pretrained model is none that anything can be read from; None for one that may
    be fine. Raises OSError if it cannot be opened."""
    if not path.is_file():
        return f"there is no file {path}."
    with path.open("rb") as file:
        begin = file.read(len(LFS_POINTER))
    if begin == LFS_POINTER:
        return f"{path} is a git-lfs pointer, not the file that it points to; `git lfs pull` in its folder fetches it."
    return None if begin else f"{path} is empty; fetch it again."
