"""CSV as rows: RFC 4180, with a header; all values are text."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator

from bigtrain.data.files import File, Line, Located, Unusable, decoded, lines, opened, too_long
from bigtrain.errors import DataError


def csv_rows(file: File, max_characters: int, delimiter: str = ",") -> Iterator[Located]:
    """A row is named by the line where it begins. After one that is not CSV, the lines behind its first are read as
    rows of their own: a quote that is never closed costs one row, and not all that follow."""
    csv.field_size_limit(max(csv.field_size_limit(), max_characters))
    with opened(file) as stream:
        records = _Records(file.name, stream, max_characters, delimiter)
        header: list[str] = []
        for where, fields in records:
            if not header:
                header = _header(fields, where)
            elif isinstance(fields, Unusable):
                yield where, fields
            elif len(fields) != len(header):
                text = f"{where}: has {len(fields)} fields, and the header has {len(header)}{records.extent}."
                yield where, Unusable("with another number of fields than the header", text)
            else:
                yield where, dict(zip(header, fields, strict=True))


def _header(fields: list[str] | Unusable, where: str) -> list[str]:
    if isinstance(fields, Unusable):
        raise fields
    twice = {name for name in fields if fields.count(name) > 1}
    if twice:
        raise DataError(f"{where}: the header names `{min(twice)}` twice.")
    return fields


class _Records:
    """(where it begins, its fields or what is wrong with it) of each record that is not blank."""

    def __init__(self, name: str, stream: io.BufferedReader, max_characters: int, delimiter: str):
        self._name = name
        self._max_characters = max_characters
        self._delimiter = delimiter
        self._lines = lines(stream, max_characters)
        self._again: deque[Line] = deque()
        self._record: list[Line] = []  # lines of the record that is read
        self._wrong: Unusable | None = None

    @property
    def extent(self) -> str:
        """For messages about the last record: its lines, if it has several."""
        first, last = self._record[0][0], self._record[-1][0]
        return f"; it goes on to line {last}" if last > first else ""

    def __iter__(self) -> Iterator[tuple[str, list[str] | Unusable]]:
        reader = csv.reader(self._texts(), delimiter=self._delimiter, strict=True)
        while True:
            self._record, self._wrong = [], None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                where, *rest = self._where(), *self._record[1:]
                self._again.extendleft(reversed(rest))
                reader = csv.reader(self._texts(), delimiter=self._delimiter, strict=True)
                until = f" (read up to line {self._record[-1][0]})" if rest else ""
                yield where, self._wrong or Unusable("not CSV", f"{where}: is not CSV: {error}{until}.")
                continue
            if fields or self._wrong:
                yield self._where(), self._wrong or fields

    def _where(self) -> str:
        return f"{self._name}:{self._record[0][0]}"

    def _texts(self) -> Iterator[str]:
        while line := self._again.popleft() if self._again else next(self._lines, None):
            self._record.append(line)
            number, offset, data = line
            where = f"{self._name}:{number}"
            if data is None:
                if len(self._record) == 1:
                    self._wrong = too_long(where, self._max_characters)
                raise csv.Error(f"a quote is not closed before line {number}, which is too long")
            text = decoded(data, where, offset)
            if isinstance(text, Unusable):
                self._wrong = self._wrong or text
                text = data.decode(errors="replace")  # for the reader to find the record's end; it is not used
            yield text
