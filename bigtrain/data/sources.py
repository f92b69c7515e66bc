"""Sources of documents: files, folders, Python's standard library or a function, all as rows with a key."""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bigtrain.config.schema import Source
from bigtrain.data import stdlib
from bigtrain.errors import DataError

Row = dict[str, Any]
Columns = tuple[tuple[str, ...], ...]
Located = tuple[str, dict[str, Any]]  # where the row stands, for messages; the row

ROW_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# What each task reads: the first set of columns that a row has all of.
COLUMNS: dict[str, Columns] = {"pretrain": (("text",),), "sft": (("messages",), ("prompt", "completion"))}
STDLIB = {"stdlib": stdlib.modules, "stdlib-functions": stdlib.functions}
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def documents(source: Source, columns: Columns) -> Iterator[Row]:
    """The rows of a source, in the same order every time: `key` and the first of the sets of columns that the row has.

    All values are str, but for `messages`: a list of dicts of str with `role` and `content`.

    The key decides on which side of a split a document falls (`is_held_out`); without a `key` column it is a
    hash of the row's texts, so that exact duplicates share it. Files are read in the order of their paths.

    Raises DataError for a source that is missing, empty or unreadable, a column that is missing, a value that
    is no text.
    """
    theirs = {ours: source.columns.get(ours, ours) for ours in (*itertools.chain(*columns), "key")}
    for ours in source.columns:
        if ours not in theirs:
            raise DataError(
                f"{source.source}: `columns` maps `{ours}`, which this task does not read; "
                f"the nearest of its columns is `{_nearest(ours, theirs)}`."
            )
    empty = True
    for where, row in _rows(source.source):
        empty = False
        chosen = next((names for names in columns if all(theirs[name] in row for name in names)), columns[-1])
        texts = {ours: _value(row, ours, theirs[ours], where) for ours in chosen}
        key = row.get(theirs["key"])
        yield {"key": content_key(texts) if key is None else str(key), **texts}
    if empty:
        raise DataError(f"{source.source}: holds no documents.")


def fingerprint(source: str) -> str:
    """A hash that changes with the files of the source (paths, sizes, modification times) or, for
    `module:name`, with the source code of the module. What such a function reads by itself is not seen."""
    facts: list[Any]
    if source in STDLIB:
        facts = [stdlib.VERSION, sys.version, _file_facts(stdlib.files())]
    elif _is_function(source):
        _load(source)
        file = getattr(sys.modules[source.partition(":")[0]], "__file__", None)
        facts = [hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None]
    else:
        facts = [_file_facts(_paths(source))]
    return hashlib.sha256(json.dumps([source, *facts]).encode()).hexdigest()


def content_key(texts: Row) -> str:
    """A key made of the texts alone."""
    return hashlib.sha256(json.dumps(list(texts.values())).encode()).hexdigest()[:32]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a document is held out; what a fraction holds out, a larger one holds out too."""
    digest = hashlib.sha256(b"held-out:" + key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _rows(source: str) -> Iterator[Located]:
    if source in STDLIB:
        return ((f"{source}: {row['key']}", row) for row in STDLIB[source]())
    if _is_function(source):
        return _function_rows(source)
    return _file_rows(source)


def _value(row: dict[str, Any], ours: str, theirs: str, where: str) -> Any:
    if ours != "messages":
        return _text(row, ours, theirs, where)
    messages = row[theirs]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise DataError(f"{where}: column `{theirs}` must be a list of {{role, content}}, both of them text.")
    return messages


def _text(row: dict[str, Any], ours: str, theirs: str, where: str) -> str:
    if theirs not in row:
        nearest = _nearest(theirs, row)
        raise DataError(
            f"{where}: no column `{theirs}`; there are {', '.join(f'`{name}`' for name in row) or 'none'}. "
            f"The nearest is `{nearest}`: if it is meant, write `columns: {{{ours}: {nearest}}}`."
        )
    value = row[theirs]
    if not isinstance(value, str):
        raise DataError(f"{where}: column `{theirs}` holds {type(value).__name__} instead of text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: column `{theirs}` holds half of a surrogate pair, which is no text.") from error
    return value


def _nearest(name: str, names: Any) -> str:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)), "")


def _is_function(source: str) -> bool:
    return FUNCTION.fullmatch(source) is not None and not Path(source).exists()


def _load(source: str) -> Callable[[], Iterator[dict[str, Any]]]:
    module_name, _, name = source.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise DataError(f"{source}: {module_name} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(
            f"{source}: {module_name} has no function {name}; the nearest is {_nearest(name, vars(module))}."
        )
    return function


def _function_rows(source: str) -> Iterator[Located]:
    for number, row in enumerate(_load(source)()):
        where = f"{source}: row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is {type(row).__name__} instead of a dict.")
        yield where, row


def _paths(source: str) -> list[Path]:
    """The files of a path, a glob, or all below a folder, sorted; hidden ones only where they are named."""
    path = Path(source)
    if path.is_file():
        return [path]
    pattern = f"{glob.escape(source)}/**/*" if path.is_dir() else source
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    files = sorted(file for file in map(Path, found) if file.is_file())
    if files:
        return files
    if path.is_dir():
        raise DataError(f"{source}: the folder holds no files.")
    if glob.has_magic(source):
        raise DataError(f"{source}: no file matches.")
    raise DataError(f"{source}: there is no such file or folder (looked in {Path.cwd()}).")


def _file_facts(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def _file_rows(source: str) -> Iterator[Located]:
    for holds_rows, group in itertools.groupby(_paths(source), lambda file: file.name.endswith(ROW_FILES)):
        if holds_rows:
            for file in group:
                yield from _json_rows(source, file)
        else:
            yield from _text_rows(source, list(group))


def _json_rows(source: str, file: Path) -> Iterator[Located]:
    """One file at a time: the columns of one file say nothing about the next one's."""
    if file.stat().st_size == 0:
        return
    where = f"{source}: {file}"
    try:
        # Chat logs may look like agent traces, which datasets would rewrite.
        for number, row in enumerate(_stream("json", [file], parse_agent_traces=False)):
            yield f"{where}, row {number}", row
    except (
        ValueError,
        TypeError,
        RuntimeError,
        OSError,
        StopIteration,
    ) as error:  # what pyarrow and datasets raise
        raise DataError(f"{where}: cannot be read as JSON rows: {error}") from error


def _text_rows(source: str, files: list[Path]) -> Iterator[Located]:
    """Each file is one document; line ends become newlines, as everywhere in Python's text mode."""
    rows = iter(_stream("text", files, sample_by="document"))
    for file in files:
        where = f"{source}: {file}"
        try:
            row = next(rows)
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{where}: cannot be read as UTF-8 text: {error}") from error
        yield where, row


def _stream(kind: str, files: list[Path], **options: Any) -> Any:
    """datasets' reader, streaming: nothing is copied into a cache."""
    import datasets

    with tempfile.TemporaryDirectory() as scratch:  # datasets leaves a lock file there even when it streams
        return datasets.load_dataset(
            kind,
            data_files=[glob.escape(str(file.absolute())) for file in files],
            split="train",
            streaming=True,
            cache_dir=scratch,
            **options,
        )
