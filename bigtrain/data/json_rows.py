"""JSON as rows: an object a line, a list of objects, objects one after another, or a list in a field of one object.

Each row is parsed by itself, so all forms accept the same rows and a broken one is refused or skipped alone. ijson is
not used: it refuses NaN and integers of more than 64 bits, makes `?` of half a surrogate pair, and ends at the first
broken row.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from bigtrain.data.files import (
    BUFFER,
    BYTES_OF_A_CHARACTER,
    OTHER_COLUMNS,
    File,
    Located,
    Row,
    Unusable,
    decoded,
    lines,
    opened,
    too_long,
)
from bigtrain.errors import DataError, nearest

SPACE = re.compile(r"[ \t\r\n]*")
STRUCTURE = re.compile(r'["\[\]{},]')
IN_STRING = re.compile(r'["\\]')
STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# Between strings: letters beside a quote, or two words. Then a quote is missing or too many, and what is in quotes
# cannot be told from what is not.
MISQUOTED = re.compile(r'"\s*[\w.+-]|[\w.+-]\s*"|[\w.+-]\s+[\w.+-]')
UNDECODED = re.compile("[\udc80-\udcff]")  # what the error handler `surrogateescape` makes of bytes that are not UTF-8
DECODER = json.JSONDecoder()


def json_rows(file: File, max_characters: int, field: str | None = None) -> Iterator[Located]:
    """The rows of a file. With `field` the file is one object, and the list in this field holds them.

    Raises DataError for a file whose rows cannot be told apart from some place on.
    """
    with opened(file) as stream:
        head = stream.peek(BUFFER).removeprefix(codecs.BOM_UTF8)
        if field is not None:
            yield from _Values(file.name, stream, max_characters).rows_in(field)
        elif re.match(rb"\s*\[", head):
            yield from _Values(file.name, stream, max_characters).list_rows()
        elif re.match(rb"\s*\{\s*\n", head):
            yield from _Values(file.name, stream, max_characters).consecutive_rows()
        else:
            yield from _line_rows(file, stream, max_characters)


def _line_rows(file: File, stream: io.BufferedReader, max_characters: int) -> Iterator[Located]:
    for number, offset, line in lines(stream, max_characters):
        where = f"{file.name}:{number}"
        text = too_long(where, max_characters) if line is None else decoded(line, where, offset)
        if isinstance(text, Unusable):
            yield where, text
        elif text.strip():
            yield where, _row(text, where)


def _row(text: str, where: str) -> Row | Unusable:
    try:
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError):  # an integer of 5,000 digits, a thousand brackets
            row = _members(text, where)
    except json.JSONDecodeError as error:
        return Unusable("not JSON", f"{where}: is not JSON: {error.msg}, in column {error.pos + 1}.")
    return _object(row, where)


def _object(row: Any, where: str) -> Row | Unusable:
    if isinstance(row, dict):
        return row
    return Unusable("not a JSON object", f"{where}: is a JSON {type(row).__name__}, a row must be an object: {{...}}.")


def _members(text: str, where: str) -> Any:
    """A row of which Python cannot hold all values: an Unusable stands for those, and matters where it is read."""
    at = _behind_space(text, 0)
    if text[at] != "{":
        return []
    members: Row = {}
    while text[at : at + 1] in ("{", ","):
        begin = _behind_space(text, at + 1)
        name, at = DECODER.raw_decode(text, begin)
        at = _behind_space(text, at)
        end = _End().find(text, at + 1)
        if not isinstance(name, str) or text[at : at + 1] != ":" or end is None:
            raise json.JSONDecodeError("Expecting a name and a value", text, begin)
        try:
            members[name] = json.loads(text[at + 1 : end])
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, text, at + 1 + error.pos) from None
        except (ValueError, RecursionError) as error:
            wrong = f"{where}: column `{name}` is not JSON that can be read: {error}."
            members[name] = Unusable("not JSON", wrong)
        at = _behind_space(text, end)
    if text[at:].strip() != "}":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return members


def _behind_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


class _End:
    """Finds where a value ends in a text that comes in pieces."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._in_string = self._escaped = False

    def find(self, text: str, at: int) -> int | None:
        """The place behind the value, None if it goes on. Raises ValueError for brackets that do not match."""
        if self._escaped:
            at, self._escaped = at + 1, False
        while found := (IN_STRING if self._in_string else STRUCTURE).search(text, at):
            sign, at = found[0], found.end()
            if sign == "\\":
                self._escaped = at == len(text)
                at += 1
            elif sign == '"':
                self._in_string = not self._in_string
                if not self._in_string and not self._closers:
                    return at
            elif sign in "[{":
                self._closers.append("]" if sign == "[" else "}")
            elif not self._closers:
                return found.start()  # what stands behind a number, or true
            elif sign != "," and self._closers.pop() != sign:
                raise ValueError(f"a bracket is closed by {sign}")
            elif not self._closers:
                return at
        return None


class _Values:
    """Values of a stream, one after the other, with one of them in memory."""

    def __init__(self, name: str, stream: io.BufferedReader, max_characters: int):
        self._name = name
        self._stream = stream
        self._max_characters = max_characters
        self._limit = BYTES_OF_A_CHARACTER * max_characters + OTHER_COLUMNS  # characters of a row, at most
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at = "", 0
        self._ended = self._has_undecoded = False
        if stream.peek(3).startswith(codecs.BOM_UTF8):
            stream.read(3)

    def list_rows(self) -> Iterator[Located]:
        """The elements of the list that begins here; after it there must be nothing."""
        yield from self._elements()
        if self._next() != "":
            raise DataError(f"{self._name}: holds more after its list of rows; write `[` and `]` around all of them.")

    def consecutive_rows(self) -> Iterator[Located]:
        """Values up to the end of the file."""
        for number in itertools.count():
            if self._next() == "":
                return
            yield self._located(number)

    def rows_in(self, field: str) -> Iterator[Located]:
        """The elements of the list in a field of the object that begins here. What follows the list is not read."""
        if self._next() != "{":
            raise DataError(f"{self._name}: is no object with a field `{field}`; remove `field`.")
        names: list[str] = []
        while True:
            self._at += 1
            if self._next() != '"':
                known = nearest(field, names) if names else "it is empty."
                raise DataError(f"{self._name}: there is no field `{field}` in its object; {known}")
            names.append(str(self._value(self._name)))
            if self._next() != ":":
                raise DataError(f"{self._name}: is not JSON: after `{names[-1]}` there is no colon.")
            self._at += 1
            if names[-1] == field:
                if self._next() != "[":
                    raise DataError(f"{self._name}: its field `{field}` is no list of rows.")
                yield from self._elements()
                return
            self._next()
            self._pass_over(f"{self._name}, field `{names[-1]}`")
            if self._next() not in (",", "}"):
                raise DataError(f"{self._name}: is not JSON: after `{names[-1]}` there is neither a comma nor an end.")

    def _elements(self) -> Iterator[Located]:
        self._next()
        for number in itertools.count():
            self._at += 1  # a bracket or a comma
            if number == 0 and self._next() == "]":
                break
            self._next()
            yield self._located(number)
            if (after := self._next()) not in (",", "]"):
                raise self._unreadable(f"{self._name}, row {number}", "after it there is neither a comma nor an end")
            if after == "]":
                break
        self._at += 1

    def _next(self) -> str:
        """The next character that is no blank, not passed over; empty at the end of the file."""
        while True:
            self._at = _behind_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read on, as much again as there is; False at the end of the file."""
        if self._ended:
            return False
        data = self._stream.read(max(BUFFER, len(self._text) - self._at))
        self._ended = not data
        new = self._decoder.decode(data, final=self._ended)
        self._has_undecoded = self._has_undecoded or not (new.isascii() or UNDECODED.search(new) is None)
        self._text, self._at = self._text[self._at :] + new, 0
        return bool(new)

    def _located(self, number: int) -> Located:
        where = f"{self._name}, row {number}"
        value = self._value(where)
        return where, value if isinstance(value, Unusable) else _object(value, where)

    def _value(self, where: str) -> Any:
        """The value that begins here; Unusable where it is broken, and what follows can be read."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                complete = isinstance(value, dict | list | str) or end < len(self._text) or self._ended
            except (ValueError, RecursionError):
                complete = False
            if complete:
                return self._taken(end, where) or value
            try:
                found = _End().find(self._text, self._at)
            except ValueError as error:
                raise self._unreadable(where, str(error)) from error
            if found is not None and found > self._at:
                text = self._text[self._at : found]
                if MISQUOTED.search(STRING.sub('"', text)):
                    raise self._unreadable(where, "a quote is missing or too many")
                return self._taken(found, where) or _row(text, where)
            if found is not None:
                raise self._unreadable(where, f"there is nothing before {self._text[found]}")
            if len(self._text) - self._at > self._limit:
                self._pass_over(where)
                return too_long(where, self._max_characters)
            if not self._more():
                raise self._unreadable(where, "the file ends in it")

    def _taken(self, end: int, where: str) -> Unusable | None:
        """Go behind a value; what is wrong with its bytes."""
        text, self._at = self._text[self._at : end], end
        if self._has_undecoded and (found := UNDECODED.search(text)):
            byte = f"0x{ord(found[0]) - 0xDC00:02x}"
            return Unusable("not UTF-8", f"{where}: is not UTF-8 text: byte {byte}. Save it as UTF-8.")
        return None

    def _pass_over(self, where: str) -> None:
        end = _End()
        try:
            while (found := end.find(self._text, self._at)) is None:
                self._at = len(self._text)
                if not self._more():
                    raise self._unreadable(where, "the file ends in it")
        except ValueError as error:
            raise self._unreadable(where, str(error)) from error
        self._at = found

    def _unreadable(self, where: str, wrong: str) -> DataError:
        return DataError(f"{where}: is not JSON: {wrong}. What follows it cannot be read.")
