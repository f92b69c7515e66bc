"""What a file holds, by its suffix: rows of JSON, CSV or a table, or one document.

Text, JSON and CSV are read here and not by datasets, whose readers take ten times as long, do not tell the line of an
error, and make a number of `007` and a null of `NA` in a CSV file.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from bigtrain.config.sources import JSON
from bigtrain.data.csv_rows import csv_rows
from bigtrain.data.files import (
    BUFFER,
    BYTES_OF_A_CHARACTER,
    TABLES,
    File,
    Located,
    Unusable,
    decoded,
    opened,
    too_long,
)
from bigtrain.data.json_rows import json_rows
from bigtrain.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def rows_of(file: File, max_characters: int, columns: Collection[str], field: str | None = None) -> Iterator[Located]:
    """The rows of a file, in order, with at most a line or a document of `max_characters` characters in memory.

    columns: those that are read; of a table no others are opened, and stand in the row as None. field: of a JSON object
    whose list has the rows. A plain text file is one row, {"text": ...}, with its line ends as they are.
    Raises DataError for a file that cannot be read.
    """
    if field is not None and file.kind not in JSON:
        raise DataError(f"{file.name}: `field` is for files of JSON ({', '.join(JSON)}), and this is none.")
    if file.kind in TABLES:
        from bigtrain.data.tables import table_rows

        return table_rows(file, columns)
    if file.kind in JSON:
        return json_rows(file, max_characters, field)
    if file.kind in DELIMITERS:
        return csv_rows(file, max_characters, DELIMITERS[file.kind])
    return _text_rows(file, max_characters)


def _text_rows(file: File, max_characters: int) -> Iterator[Located]:
    limit = BYTES_OF_A_CHARACTER * max_characters
    with opened(file) as stream:  # in pieces: memory for `limit` bytes at once would cost more than a small file
        data = b"".join(itertools.islice(iter(lambda: stream.read(BUFFER), b""), limit // BUFFER + 1))
    if len(data) > limit:
        yield file.name, too_long(file.name, max_characters)
        return
    text = decoded(data, file.name, 0)
    yield file.name, text if isinstance(text, Unusable) else {"text": text}
