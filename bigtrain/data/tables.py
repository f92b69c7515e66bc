"""What datasets reads, streaming: parquet and arrow files, folders of its `save_to_disk`, datasets of the Hub."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.config.schema import Source
from bigtrain.config.sources import parse_split
from bigtrain.data.files import Located, one_line
from bigtrain.errors import DataError, shorten

AT_ONCE = 100  # rows, made into Python's objects together
# What pyarrow and datasets raise; MemoryError for the sizes that a damaged file claims.
UNREADABLE = (ValueError, TypeError, RuntimeError, OSError, LookupError, StopIteration, MemoryError)


def table_rows(kind: str, name: str) -> Iterator[Located]:
    """The rows of a parquet or arrow file, a path or a URL; memory holds a row group or a record batch."""
    import datasets

    url = name if "://" in name else os.path.abspath(name)  # noqa: PTH100 - resolves no links
    try:
        with tempfile.TemporaryDirectory() as scratch:  # datasets leaves a lock file there even when it streams
            table = datasets.load_dataset(
                kind, data_files=[glob.escape(url)], split="train", streaming=True, cache_dir=scratch
            )
    except UNREADABLE as error:
        raise DataError(f"{name}: cannot be read as {kind}: {one_line(error)}") from error
    yield from _rows(table, name)


def saved_rows(source: Source) -> Iterator[Located]:
    """The rows of a folder of `save_to_disk`, from where it lies; of one with several splits, those of `split`."""
    import datasets

    folder, split = source.source, parse_split(source.split)[0]
    try:
        table: Any = datasets.load_from_disk(folder)
    except UNREADABLE as error:
        raise DataError(f"{folder}: cannot be read as a folder of save_to_disk: {one_line(error)}") from error
    if isinstance(table, datasets.DatasetDict):
        table = table[_choose(folder, split, list(table))]
    elif split not in (None, "train", str(table.split)):
        raise DataError(f"{folder}: is one split, {table.split or 'train'}; there is no {split}. Remove `split`.")
    yield from _rows(table.with_format(None), f"{folder} ({source.split})" if source.split else folder)


def hub_rows(source: Source) -> Iterator[Located]:
    """The rows of a split of a dataset of the Hub, streaming; offline, those of datasets' local cache."""
    builder = _builder(source)
    split = parse_split(source.split)[0]
    try:
        table = builder.as_streaming_dataset(split=split)
    except UNREADABLE as error:
        raise DataError(f"{source.source}: split {split} cannot be opened: {one_line(error)}") from error
    yield from _rows(table, f"{source.source} ({source.split})")


def hub_commit(source: Source) -> str:
    """The commit that the dataset's revision stands for now, or offline that of the local cache."""
    return str(_builder(source).hash)


def _builder(source: Source) -> Any:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = datasets.load_dataset_builder(source.source, source.config, revision=source.revision)
    except UNREADABLE as error:
        raise DataError(
            f"{source.source}: as a path it does not exist (looked in {Path.cwd()}), and as a dataset of the Hub it "
            f"cannot be opened: {one_line(error)}."
        ) from error
    if not isinstance(builder, Cache):
        return builder
    # Where the Hub cannot be reached, datasets takes the newest that its cache holds, whatever that is.
    configs = sorted(folder.name for folder in Path(builder.cache_dir).parents[2].iterdir() if folder.is_dir())
    if source.config is None and len(configs) > 1:
        raise DataError(
            f"{source.source}: the Hub cannot be reached, and the local cache holds the configurations "
            f"{shorten(configs)}; choose one with `config`."
        )
    if source.revision not in (None, builder.hash):
        raise DataError(
            f"{source.source}: the Hub cannot be reached, and the local cache holds commit {builder.hash}, which may "
            f"not be revision {source.revision}; write `revision: {builder.hash}` if it is meant."
        )
    return builder


def _choose(folder: str, split: str | None, names: list[str]) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return split
    asked = "say which with `split`" if split is None else f"there is no {split}"
    raise DataError(f"{folder}: its splits are {shorten(names)}; {asked}.")


def _rows(table: Any, name: str) -> Iterator[Located]:
    number = 0
    try:
        for batch in table.iter(batch_size=AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield f"{name}, row {number}", dict(zip(batch, values, strict=True))
                number += 1
    except UNREADABLE as error:
        after = f"after row {number - 1}" if number else "from its first row on"
        raise DataError(f"{name}: cannot be read {after}: {one_line(error)}") from error
