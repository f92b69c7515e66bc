"""Sources of documents: files, tables, the Hub, Python's standard library or a function, all as rows with a key."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

from bigtrain.config.files import literal
from bigtrain.config.schema import SourceConfig
from bigtrain.config.sources import Kind, kind_of, parse_split
from bigtrain.config.user_code import closest, imported, raised
from bigtrain.data import stdlib
from bigtrain.data.conversations import LISTS, SHAPES, UNREAD, one_shape, read_column, unread
from bigtrain.data.files import Located, Row, Unusable, find
from bigtrain.data.formats import rows_of
from bigtrain.data.tally import Tally
from bigtrain.errors import DataError, shorten

Columns = tuple[tuple[str, ...], ...]

STDLIB = {"stdlib": stdlib.modules, "stdlib-functions": stdlib.functions}


def documents(source: SourceConfig, columns: Columns, tally: Tally | None = None) -> Iterator[Row]:
    """The rows of a source, in the same order every time: `key`, `where` (file and line, or file and row, for messages)
    and the first of the sets of columns that the row has, conversations as `one_shape` gives them.

    All values are str, but for `messages`: a list of dicts with at least `role` and `content`, both str; `tools`, of
    which they make use.

    The key decides on which side of a split a document falls (`is_held_out`); without a `key` column it is a
    hash of the row's texts, so that exact duplicates share it. Files are read in the order of their paths.

    tally: counts all rows and those that `on_error: skip` leaves out, as far as they have been read, and columns of
    which nothing is used.

    Raises DataError for a source that is missing, empty or unreadable, and with `on_error: error` for a row that is
    broken or too long, lacks a column or holds no text there.
    """
    theirs = {ours: source.columns.get(ours, ours) for ours in names_of(columns)}
    for ours in source.columns:
        if ours not in theirs:
            raise DataError(
                f"{source.source}: `columns` maps `{ours}`, which this task does not read; "
                f"the nearest of its columns is `{closest(ours, theirs)}`."
            )
    first_wrong, used = None, False
    tally = Tally() if tally is None else tally
    noted = UNREAD if columns is SHAPES else ()
    for where, row in _rows(source, frozenset({*theirs.values(), *noted})):
        tally.rows += 1
        try:
            document = _document(row, columns, theirs, where, source.max_characters)
        except DataError as error:
            if source.on_error == "error":
                raise refused(error) from error
            first_wrong = first_wrong or error
            tally.drop(error.reason if isinstance(error, Unusable) else "without usable turns", where)
            continue
        used = True
        tally.unread.update(document.pop("unread"))
        yield document
    if first_wrong is not None and not used:
        raise DataError(f"{source.source}: no row can be used. The first: {first_wrong}") from first_wrong
    if not used:
        raise DataError(f"{source.source}: holds no documents{f' in {source.split}' if source.split else ''}.")


def _document(row: Row | Unusable, columns: Columns, theirs: dict[str, str], where: str, longest: int) -> Row:
    if isinstance(row, Unusable):
        raise row
    chosen, texts = _chosen(row, columns, theirs), {}
    for ours in (name.removesuffix("?") for name in chosen):
        if f"{ours}?" not in chosen or row.get(theirs[ours]) not in (None, "", []):
            texts[ours] = _value(row, ours, theirs[ours], where)
    if (length := _length(texts)) > longest:
        raise Unusable(
            "longer than max_characters",
            f"{where}: is {length:,} characters long, more than max_characters ({longest:,}); split it or raise it.",
        )
    key = content_key(texts) if row.get(theirs["key"]) is None else _key(row, theirs["key"], where)
    left = unread(row, theirs.values(), where) if chosen in SHAPES else ()
    return {"key": key, "where": where, "unread": left, **one_shape(texts, where)}


def _chosen(row: Row, columns: Columns, theirs: dict[str, str]) -> tuple[str, ...]:
    """The first set of columns that have a value in the row, else the last."""
    there = {name for name, value in row.items() if value is not None}  # a column of a table is in all of its rows
    needed = ([theirs[name] for name in names if not name.endswith("?")] for names in columns)
    return next((names for names, needs in zip(columns, needed, strict=True) if there.issuperset(needs)), columns[-1])


def names_of(columns: Columns) -> list[str]:
    """All columns that may be read, with that of the key."""
    return [*(name.removesuffix("?") for name in itertools.chain(*columns)), "key"]


def refused(error: DataError) -> DataError:
    """What ends the run, with `on_error: error`, for what is wrong with a row."""
    return DataError(f"{error} `on_error: skip` leaves such rows out.")


def _key(row: Row, theirs: str, where: str) -> str:
    if isinstance(row[theirs], Unusable):
        raise row[theirs]
    return _whole(str(row[theirs]), theirs, where)


def _length(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_length, held))


def size_of(source: SourceConfig) -> int | None:
    """Bytes of the source's files, about those of its text; None where the files do not say."""
    if source.source == "stdlib":
        return sum(file.stat().st_size for file in stdlib.files())
    _, start, stop = parse_split(source.split)
    if kind_of(source) not in ("files", "url") or start or stop is not None:
        return None
    sizes = [file.bytes() for file in find(source.source)]
    return None if None in sizes else sum(size or 0 for size in sizes)


def content_key(texts: Row) -> str:
    """A key made of the texts alone."""
    return hashlib.sha256(json.dumps(list(texts.values())).encode()).hexdigest()[:32]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a document is held out; what a fraction holds out, a larger one holds out too."""
    digest = hashlib.sha256(b"held-out:" + key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _rows(source: SourceConfig, columns: Collection[str]) -> Iterator[Located]:
    name, start, stop = parse_split(source.split)
    kind = kind_of(source)
    if kind not in ("hub", "saved") and name not in (None, "train"):
        raise DataError(f"{source.source}: is one split, `train`; there is no {name}.")
    return itertools.islice(_all_rows(source, kind, columns), start, stop)


def _all_rows(source: SourceConfig, kind: Kind, columns: Collection[str]) -> Iterator[Located]:
    if kind == "stdlib":
        return ((f"{source.source}: {row['key']}", row) for row in STDLIB[source.source]())
    if kind == "function":
        return _function_rows(source.source)
    if kind in ("hub", "saved"):
        from bigtrain.data.tables import hub_rows, saved_rows

        return hub_rows(source) if kind == "hub" else saved_rows(source, columns)
    files = find(source.source)
    return itertools.chain.from_iterable(rows_of(file, source.max_characters, columns, source.field) for file in files)


def _value(row: dict[str, Any], ours: str, theirs: str, where: str) -> Any:
    if isinstance(row.get(theirs), Unusable):
        raise row[theirs]
    may_be_turns = ours in ("prompt", "completion") and isinstance(row.get(theirs), list | dict)
    if row.get(theirs) is not None and (ours in LISTS or may_be_turns):
        return read_column(row, ours, theirs, where)
    if ours == "label" and isinstance(row.get(theirs), int | float):
        return literal(row[theirs])
    return _text(row, ours, theirs, where)


def _text(row: dict[str, Any], ours: str, theirs: str, where: str) -> str:
    if row.get(theirs) is None:
        raise Unusable("without a column that the task reads", f"{where}: {_missing(row, ours, theirs)}")
    value = row[theirs]
    if not isinstance(value, str):
        raise Unusable(
            "with a column that is no text", f"{where}: column `{theirs}` holds {type(value).__name__} instead of text."
        )
    return _whole(value, theirs, where)


def _whole(text: str, theirs: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"{where}: column `{theirs}` holds half of a surrogate pair, which is no text."
        raise Unusable("with half of a surrogate pair", wrong) from error
    return text


def _missing(row: Row, ours: str, theirs: str) -> str:
    if theirs in row:
        return f"column `{theirs}` is null."
    nearest = closest(theirs, row)
    lists = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    wrapped = f" If the rows are the list in {_shown(lists[0])}, write `field: {lists[0]}`." if lists else ""
    meant = _shown(nearest)
    return (
        f"no column `{theirs}`; there are {shorten([_shown(name) for name in row]) or 'none'}. "
        f"The nearest is {meant}: if it is meant, write `columns: {{{ours}: {meant[1:-1]}}}`.{wrapped}"
    )


def _shown(name: Any) -> str:
    """A column's name in a message; of a CSV file without a header it may be a whole text."""
    line = " ".join(str(name).encode(errors="backslashreplace").decode().split())
    return f"`{line if len(line) <= 60 else line[:60] + '...'}`"


def load_function(source: str) -> Callable[[], Iterator[dict[str, Any]]]:
    """The function that `module:name` names: of a module that is installed, on PYTHONPATH, or in the working folder.

    Raises DataError if there is none.
    """
    try:
        function = imported(source)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error
    if not callable(function):
        raise DataError(f"{source}: is no function.")
    return function


def _function_rows(source: str) -> Iterator[Located]:
    function, number = load_function(source), 0
    try:
        for row in function():
            where = f"{source}: row {number}"
            wrong = None if isinstance(row, dict) else f"{where} is {type(row).__name__} instead of a dict."
            yield where, row if wrong is None else Unusable("not a dict", wrong)
            number += 1
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # also what would end the process without a word, like SystemExit
        raise DataError(f"{source}: gives no row {number}: {raised(error)}") from error
