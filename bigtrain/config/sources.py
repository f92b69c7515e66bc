"""What the `source` of a run's file means, and what is wrong with it, as far as this disk can tell."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bigtrain.config.core import Broken, Section, execution, mathematics
from bigtrain.config.files import literal
from bigtrain.config.texts import PathText
from bigtrain.config.user_code import NAMED
from bigtrain.errors import nearest

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig, StageConfig

Kind = Literal["stdlib", "function", "url", "hub", "saved", "files"]

STANDARD_LIBRARY = ("stdlib", "stdlib-functions")
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
ROWS = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?", re.ASCII)
JSON = (".json", ".jsonl", ".jsonlines", ".ndjson", ".jl")
HIDDEN = ("_", ".")  # of names: what Spark, Hive and systems put beside data, and pyarrow and datasets pass over
SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))  # what `save_to_disk` of datasets writes
# Named by themselves or in a glob they are a mistake; below a folder their bytes will tell.
NO_TEXT = {
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".epub", ".png", ".jpg"),
    *(".npy", ".npz", ".bin", ".pt", ".pth", ".pkl", ".safetensors", ".gguf", ".h5", ".orc", ".avro", ".sqlite"),
}


class SourceConfig(Section):
    source: PathText = execution(
        "Where documents come from; a run goes on wherever the same content lies. A file, a glob, a folder (every file "
        "below it) or any URL of fsspec, like s3://bucket/*.parquet: .json, .jsonl (.jsonlines, .ndjson, .jl), .csv, "
        ".tsv, .parquet, .arrow and .feather files hold rows, any other file is one document; .gz, .bz2, .xz and .zst "
        "are decompressed; a file that several links lead to counts once. Or a folder of datasets' `save_to_disk`; a "
        "dataset of the Hub, owner/name with its `split`; module:name of a function that yields rows, of a module that "
        "is installed, on PYTHONPATH or, looked for there last, in the working folder; `stdlib` (the source of "
        "Python's standard library) or `stdlib-functions` (its functions as prompt and completion)."
    )
    config: str | None = mathematics("Configuration (subset) of a Hub dataset; null: its only or default one.", None)
    split: str | None = mathematics(
        "Split of a Hub dataset or of a saved one, or rows of it counted from 0: `train`, `train[:1000]`, "
        "`train[1000:2000]`. All other sources are one split, `train`. null: all rows.",
        None,
    )
    revision: str | None = mathematics("Branch, tag or commit of a Hub dataset; null: main.", None)
    field: str | None = mathematics(
        'Of JSON files that are one object, like {"data": [...]}: the name of the list that holds the rows; null: the '
        "file is a list of rows, or rows one after another.",
        None,
    )
    columns: dict[str, str] = mathematics("Our column name -> the source's, where they differ.", {})
    on_error: Literal["error", "skip"] = mathematics(
        "What a row does that cannot be used (broken, not UTF-8, without its columns, too long). error: it ends the "
        "run, with file and line; skip: it is left out and counted. A file that cannot be read is always an error.",
        "error",
    )
    max_characters: int = mathematics("Longest document, in characters; a longer one cannot be used.", 10_000_000, ge=1)
    weight: float | None = mathematics(
        "Share of the sequences that come from this source, relative to the other weights. Without weights the sources "
        "are taken as one.",
        None,
        gt=0,
    )

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        try:
            parse_split(self.split)
        except ValueError as error:
            yield ("split",), str(error)

    def check_here(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        kind = kind_of(self)
        if (wrong := wrong_with(self)) is not None:
            yield ("source",), wrong
        elif self.field is not None and kind not in ("files", "url"):
            yield ("field",), f"is for files of JSON, and {self.source} is none; remove it."
        elif kind != "hub":
            is_id = HUB_ID.fullmatch(self.source) is not None
            reason = "exists on this disk and is read from it" if is_id else "is none"
            for key in ("config", "revision"):
                if getattr(self, key) is not None:
                    yield (key,), f"is for datasets of the Hub, and {self.source} {reason}; remove {key}."
            split = parse_split(self.split)[0]
            if kind != "saved" and split not in (None, "train"):
                yield ("split",), f"{self.source} is one split, `train`; there is no {split}."

    def overlaps(self, other: SourceConfig) -> bool:
        """Whether two sources may have a row in common, as far as their names tell."""
        if (self.source, self.config, self.revision) != (other.source, other.config, other.revision):
            return False
        (split, start, stop), (other_split, other_start, other_stop) = parse_split(self.split), parse_split(other.split)
        if split is not None and other_split is not None and split != other_split:
            return False
        return start < (math.inf if other_stop is None else other_stop) and other_start < (
            math.inf if stop is None else stop
        )


def kind_of(source: SourceConfig) -> Kind:
    """How a source is read. What exists as a path is a path; `owner/name` is a Hub id only where `split` is given."""
    name, path = source.source, Path(source.source)
    if name in STANDARD_LIBRARY:
        return "stdlib"
    if any(all((path / file).is_file() for file in files) for files in SAVED):
        return "saved"
    if path.exists():
        return "files"
    if NAMED.fullmatch(name):
        return "function"
    if "://" in name:
        return "url"
    return "hub" if source.split is not None and HUB_ID.fullmatch(name) else "files"


def parse_split(split: str | None) -> tuple[str | None, int, int | None]:
    """(name or None, first row, the row after the last or None for all) of `name` or `name[start:stop]`.

    Raises ValueError with a sentence for anything else.
    """
    if split is None:
        return None, 0, None
    match = ROWS.fullmatch(split)
    if match is None:
        percent = " A percentage would need the number of rows first." if "%" in split else ""
        raise ValueError(
            f"write a split, like `train`, or rows of it, like `train[:1000]`, got {literal(split)}.{percent}"
        )
    start, stop = int(match[2] or 0), int(match[3]) if match[3] else None
    if stop is not None and stop <= start:
        raise ValueError(f"{split} holds no rows.")
    return match[1], start, stop


def local_files(source: str) -> Iterator[str]:
    """The files of a path, of a glob, or all below a folder, in no order; in a folder none whose name, or that of a
    folder below it, begins as HIDDEN says; for a glob, only those that it names.

    Folders that links lead to are looked into; below a `**` each real folder once, so that a link to its own folder, or
    to one above, repeats nothing. Raises OSError for a folder that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return iter([source])
    names = (entry.path for entry in _below(source) if not is_hidden(entry.name)) if path.is_dir() else _matches(source)
    return filter(os.path.isfile, names)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data where a folder is read, like _SUCCESS and .part-0.parquet.crc."""
    return name.startswith(HIDDEN)


def local_hidden(folder: str) -> int:
    """How many files and folders below a folder are not read for their names."""
    return sum(is_hidden(entry.name) for entry in _below(folder))


def _below(folder: str) -> Iterator[os.DirEntry[str]]:
    for each in _folders(folder, HIDDEN):
        with os.scandir(each) as entries:
            yield from entries


def _matches(pattern: str) -> Iterator[str]:
    """What `glob.iglob(recursive=True)` finds, but for folders twice."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)  # noqa: PTH207 - Path.glob refuses absolute patterns
        return
    at = parts.index("**")
    before, after = "/".join(parts[:at]), "/".join(parts[at + 1 :]) or "*"
    tops = glob.iglob(before) if before else ["/" if pattern.startswith("/") else ""]  # noqa: PTH207
    for top in filter(os.path.isdir, tops) if before else tops:
        for folder in _folders(top):
            yield from _matches(os.path.join(glob.escape(folder), after))  # noqa: PTH118


def _folders(top: str, hidden: tuple[str, ...] = (".",)) -> Iterator[str]:
    """A folder and those below it but the hidden ones, each real one once: by its own name if that is below,
    else by a link's."""
    seen, folders, links = set(), [top], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        yield folder
        with os.scandir(folder or ".") as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir() and not entry.name.startswith(hidden):
                    (links if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))  # noqa: PTH118


def wrong_with(source: SourceConfig) -> str | None:
    """What keeps a source from being read here, in a sentence; None if nothing is known to."""
    kind, name = kind_of(source), source.source
    if kind == "url":
        return _protocol(name)
    if kind != "files":
        return None
    path = Path(name)
    if path.is_file() or glob.has_magic(name):
        suffix = path.suffix.lower()
        if suffix in NO_TEXT:
            within = f" For what is in it write `zip://*::{name}`." if suffix == ".zip" else ""
            return f"{suffix} files are no text; convert them to .txt, .jsonl or .parquet.{within}"
    if path.is_file():
        return None
    if path.is_dir() or glob.has_magic(name):
        try:
            if any(True for _ in local_files(name)):
                return None
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}."
        return f"the folder {name} holds no files." if path.is_dir() else f"no file matches {name} in {path.cwd()}."
    return f"there is no file or folder {literal(name)} (looked in {path.cwd()}).{_other_reading(name)}"


def _other_reading(name: str) -> str:
    if HUB_ID.fullmatch(name):
        return f" If the dataset {name} of the Hub is meant, say which split, like `split: train`."
    return ""


def _protocol(url: str) -> str | None:
    """Whether fsspec can open the URL's protocols; whether anything is there, opening will tell."""
    import fsspec

    for part in url.split("::"):
        protocol = part.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError:
            return f"fsspec knows no protocol {protocol}; {nearest(protocol, fsspec.available_protocols())}"
        except ImportError as error:
            extra = "`pip install 'bigtrain[http]'`" if protocol in ("http", "https") else "install what it names"
            return f"{protocol}: {str(error).rstrip('.')}; {extra}."
    return None
