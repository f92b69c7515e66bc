"""Tables as rows: parquet, arrow and feather files by pyarrow; folders of `save_to_disk` and the Hub by datasets.

Of a file and of a saved folder only the columns that are read are opened: what the others hold does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from bigtrain.config.schema import SourceConfig
from bigtrain.config.sources import parse_split
from bigtrain.data.files import File, Located, Row, Unusable, opened
from bigtrain.errors import DataError, one_line, shorten

AT_ONCE = 1000  # rows, made into Python's objects together
# What pyarrow and datasets raise; MemoryError for the sizes that a damaged file claims.
UNREADABLE = (ValueError, TypeError, RuntimeError, OSError, LookupError, StopIteration, MemoryError)


def table_rows(file: File, columns: Collection[str]) -> Iterator[Located]:
    """The rows of a parquet, arrow or feather file; memory holds a row group or a record batch of the columns."""
    kind = file.kind.removeprefix(".")
    if file.compression is not None:
        raise DataError(f"{file.name}: {kind} files compress their columns themselves; decompress it to {file.stem}.")
    number = 0
    try:
        with opened(file) as stream:
            names, batches = (_parquet if kind == "parquet" else _arrow)(stream, columns)
            if twice := [name for name in columns if names.count(name) > 1]:
                raise DataError(f"{file.name}: has two columns `{twice[0]}`.")
            for batch in batches:
                yield from _batch_rows(batch, file.name, number, names)
                number += batch.num_rows
    except UNREADABLE as error:
        raise _unreadable(f"{file.name}: cannot be read as {kind}", number, error) from error


def _parquet(stream: IO[bytes], columns: Collection[str]) -> tuple[list[str], Iterator[Any]]:
    """(names of all columns, batches of those that are read)."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    names = file.schema_arrow.names
    return names, file.iter_batches(AT_ONCE, columns=[name for name in names if name in columns])


def _arrow(stream: IO[bytes], columns: Collection[str]) -> tuple[list[str], Iterator[Any]]:
    """The same of Arrow's file and stream formats and of Feather, whose second version is Arrow's file format."""
    import pyarrow
    from pyarrow import feather, ipc

    head = stream.read(6)
    stream.seek(0)
    if head.startswith(b"FEA1"):
        table = feather.read_table(stream)
        return table.column_names, iter(table.select([c for c in table.column_names if c in columns]).to_batches())
    opening = ipc.open_file if head == b"ARROW1" else ipc.open_stream
    names = opening(stream).schema.names
    stream.seek(0)
    chosen = [i for i, name in enumerate(names) if name in columns]
    # An empty list would mean all of them.
    reader = opening(stream, options=ipc.IpcReadOptions(included_fields=chosen or [0]))
    if isinstance(reader, pyarrow.RecordBatchFileReader):
        return names, (reader.get_batch(i) for i in range(reader.num_record_batches))
    return names, iter(reader)


def saved_rows(source: SourceConfig, columns: Collection[str]) -> Iterator[Located]:
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
    name, number = f"{folder} ({source.split})" if source.split else folder, 0
    names = table.column_names
    chosen = table.select_columns([c for c in names if c in columns] or names[:1]).with_format("arrow")
    try:
        for part in chosen.iter(batch_size=AT_ONCE):
            for batch in part.to_batches():
                yield from _batch_rows(batch, name, number, names)
                number += batch.num_rows
    except UNREADABLE as error:
        raise _unreadable(f"{name}: cannot be read", number, error) from error


def hub_rows(source: SourceConfig) -> Iterator[Located]:
    """The rows of a split of a dataset of the Hub, streaming; offline, those of datasets' local cache."""
    builder = _builder(source)
    split = parse_split(source.split)[0]
    try:
        table = builder.as_streaming_dataset(split=split)
    except UNREADABLE as error:
        raise DataError(f"{source.source}: split {split} cannot be opened: {one_line(error)}") from error
    yield from _rows(table, f"{source.source} ({source.split})")


def hub_commit(source: SourceConfig) -> str:
    """The commit that the dataset's revision stands for now, or offline that of the local cache."""
    return str(_builder(source).hash)


def _builder(source: SourceConfig) -> Any:
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


def _batch_rows(batch: Any, name: str, first: int, names: Sequence[str]) -> Iterator[Located]:
    """The rows of a record batch, None in the columns `names` that it lacks."""
    import pyarrow

    unread = dict.fromkeys(names)
    for start in range(0, batch.num_rows, AT_ONCE):
        part = batch.slice(start, AT_ONCE)
        try:
            part.validate(full=True)  # places outside its buffers would be read as they are
            rows = part.to_pylist()
        except (pyarrow.ArrowInvalid, ValueError, OverflowError):
            rows = [_row(part.slice(i, 1), f"{name}, row {first + start + i}") for i in range(part.num_rows)]
        for number, row in enumerate(rows, first + start):
            yield f"{name}, row {number}", row if isinstance(row, Unusable) else unread | row


def _row(part: Any, where: str) -> Row | Unusable:
    """The only row of a part of a record batch."""
    import pyarrow

    try:
        part.validate(full=True)
        return part.to_pylist()[0]
    except (pyarrow.ArrowInvalid, ValueError, OverflowError) as error:
        if "UTF8" in str(error):
            return Unusable("not UTF-8", f"{where}: is not UTF-8 text.")
        return Unusable("with a value that cannot be read", f"{where}: cannot be read: {one_line(error)}.")


def _rows(table: Any, name: str) -> Iterator[Located]:
    number = 0
    try:
        for batch in table.iter(batch_size=AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield f"{name}, row {number}", dict(zip(batch, values, strict=True))
                number += 1
    except UNREADABLE as error:
        raise _unreadable(f"{name}: cannot be read", number, error) from error


def _unreadable(what: str, rows: int, error: BaseException) -> DataError:
    return DataError(f"{what}{f' after row {rows - 1}' if rows else ''}: {one_line(error)}")
