"""Files of documents: found by path, glob, folder or URL, decompressed and read as they come, never copied.

fsspec opens them. Text, JSON and CSV are read here and not by datasets, whose readers take ten times as long, do not
tell the line of an error, and make a number of `007` and a null of `NA` in a CSV file.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bigtrain.errors import DataError
from bigtrain.masking import masked

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError
else:
    from backports.zstd import ZstdError

BUFFER = 1 << 20  # bytes
BYTES_OF_A_CHARACTER = 4  # of UTF-8, at most
OTHER_COLUMNS = 1 << 24  # bytes of a line beside its document, at most
TOLD = ("size", "ETag", "etag", "mtime", "created", "LastModified", "last_modified", "md5", "sha256", "CRC")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


class Unusable(DataError):
    """What is wrong with one row. A value that stands in the row's place, so that the rows after it can be read.

    reason: the same few words for all rows with this fault, to be counted by.
    """

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


Row = dict[str, Any]
Located = tuple[str, Row | Unusable]  # where the row stands, for messages; the row
ABOUT = frozenset({"key", "where"})  # what of a document is no text of it
Lines = Iterator[tuple[int, int, bytes | None]]  # number from 1, offset in bytes, the line; None for one too long


@dataclass(frozen=True)
class File:
    """system: of fsspec, in which `path` is. name: a path or URL for messages and for datasets."""

    system: Any
    path: str
    name: str

    def facts(self) -> list[Any]:
        """What changes with the content: name and what the file system says, on a disk size and modification time."""
        if self.system is None:
            stat = Path(self.path).stat()
            return [self.name, stat.st_size, stat.st_mtime_ns]
        name, facts = masked(self.name), self.system.info(self.path)
        told = [str(facts[key]) for key in TOLD if facts.get(key) is not None]
        # a URL's secret may change while the file stays: it counts only where nothing else tells two files apart
        return [name, *told] if name != self.name and told else [name, self.system.ukey(self.path)]

    def bytes(self) -> int | None:
        """Of text, about; None for a compressed one and where the file system does not say."""
        if self.compression is not None or self.kind in (".parquet", ".arrow"):
            return None
        return Path(self.path).stat().st_size if self.system is None else self.system.info(self.path).get("size")

    @cached_property
    def compression(self) -> str | None:
        """fsspec's name for it."""
        return COMPRESSED.get(Path(self.path).suffix.lower())

    @cached_property
    def kind(self) -> str:
        """The suffix, without that of a compression."""
        path = Path(self.path)
        return (path.with_suffix("") if self.compression else path).suffix.lower()


def find(source: str) -> list[File]:
    """The files of a path, a glob, a URL, or all below a folder, sorted; hidden ones only where they are named.

    Raises DataError if there are none.
    """
    if "://" in source and not Path(source).exists():
        return _find_remote(source)
    path = Path(source)
    if path.is_file():
        return [File(None, source, source)]
    pattern = f"{glob.escape(source)}/**/*" if path.is_dir() else source
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    files = sorted(file for file in map(Path, found) if file.is_file())
    return [File(None, str(file), str(file)) for file in files] or _nothing(source, path.is_dir())


def _find_remote(url: str) -> list[File]:
    import fsspec

    outer = "".join(url.partition("::")[1:])  # of zip://*.txt::s3://bucket/a.zip
    try:
        system, path = fsspec.core.url_to_fs(url)
        folder = system.isdir(path)
        if folder and system.exists(f"{path}/state.json") and system.exists(f"{path}/dataset_info.json"):
            raise DataError(f"{url}: a folder of save_to_disk must lie on a disk; here name its files, {url}/*.arrow.")
        if glob.has_magic(path):
            paths = [found for found in system.glob(path) if system.isfile(found)]
        elif folder:
            paths = [p for p in system.find(path) if "/." not in p.removeprefix(path) and not p.startswith(".")]
        else:
            paths = [path] if system.exists(path) else []
    except DataError:
        raise
    except Exception as error:  # every file system has its own
        raise DataError(f"{url}: cannot be opened: {one_line(error)}") from error
    return [File(system, p, system.unstrip_protocol(p) + outer) for p in sorted(paths)] or _nothing(url, folder)


def _nothing(source: str, folder: bool) -> list[File]:
    if folder:
        raise DataError(f"{source}: the folder holds no files.")
    if glob.has_magic(source):
        raise DataError(f"{source}: no file matches.")
    where = "" if "://" in source else f" (looked in {Path.cwd()})"
    raise DataError(f"{source}: there is no such file or folder{where}.")


def rows_of(file: File, max_characters: int) -> Iterator[Located]:
    """The rows of a file, in order, with at most a line or a document of `max_characters` characters in memory.

    A plain text file is one row, {"text": ...}, with its line ends as they are. Raises DataError for a file that cannot
    be read.
    """
    if file.kind in (".parquet", ".arrow"):
        from bigtrain.data.tables import table_rows

        return table_rows(file.kind.removeprefix("."), file.name)
    return READERS.get(file.kind, _text_rows)(file, max_characters)


def _text_rows(file: File, max_characters: int) -> Iterator[Located]:
    limit = BYTES_OF_A_CHARACTER * max_characters
    with _opened(file) as stream:  # in pieces: memory for `limit` bytes at once would cost more than a small file
        data = b"".join(itertools.islice(iter(lambda: stream.read(BUFFER), b""), limit // BUFFER + 1))
    if len(data) > limit:
        yield file.name, _too_long(file.name, max_characters)
        return
    text = _decoded(data, file.name, 0)
    yield file.name, text if isinstance(text, Unusable) else {"text": text}


def _json_rows(file: File, max_characters: int) -> Iterator[Located]:
    """Objects line by line, a list of them, or some that each take several lines."""
    with _opened(file) as stream:
        head = stream.peek(BUFFER).removeprefix(codecs.BOM_UTF8)
        if re.match(rb"\s*(\[|\{\s*\n)", head) is None:
            yield from _json_lines(file, stream, max_characters)
        else:
            yield from _json_values(file, stream, "item" if head.lstrip().startswith(b"[") else "")


def _json_lines(file: File, stream: io.BufferedReader, max_characters: int) -> Iterator[Located]:
    for number, offset, line in _lines(stream, max_characters):
        where = f"{file.name}:{number}"
        text = _too_long(where, max_characters) if line is None else _decoded(line, where, offset)
        if isinstance(text, Unusable):
            yield where, text
        elif text.strip():
            yield where, _json_row(text, where)


def _json_row(text: str, where: str) -> Row | Unusable:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return Unusable("not JSON", f"{where}: is not JSON: {error.msg}, in column {error.colno}.")
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, a thousand brackets
        return Unusable("not JSON", f"{where}: is not JSON that can be read: {error}.")
    return _object(row, where)


def _object(row: Any, where: str) -> Row | Unusable:
    if isinstance(row, dict):
        return row
    return Unusable("not a JSON object", f"{where}: is a JSON {type(row).__name__}, a row must be an object: {{...}}.")


def _json_values(file: File, stream: io.BufferedReader, prefix: str) -> Iterator[Located]:
    import ijson

    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    values = ijson.items(stream, prefix, use_float=True, multiple_values=not prefix)
    for number in itertools.count():
        where = f"{file.name}, row {number}"
        try:
            row = next(values)
        except StopIteration:
            return
        except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON: {one_line(error)}. What follows it cannot be read.") from error
        yield where, _object(row, where)


def _csv_rows(file: File, max_characters: int, delimiter: str = ",") -> Iterator[Located]:
    """RFC 4180, with a header; all values are text. A row is named by the line where it begins."""
    csv.field_size_limit(max(csv.field_size_limit(), max_characters))
    wrong: list[Unusable] = []

    def text(line: tuple[int, int, bytes | None]) -> str:
        number, offset, data = line
        where = f"{file.name}:{number}"
        if data is None:
            raise _too_long(where, max_characters)
        decoded = _decoded(data, where, offset)
        if isinstance(decoded, str):
            return decoded
        wrong.append(decoded)
        return data.decode(errors="replace")  # for the reader to find the row's end; the row is not used

    with _opened(file) as stream:
        reader = csv.reader(map(text, _lines(stream, max_characters)), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            where = f"{file.name}:{reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                wrong.append(Unusable("not CSV", f"{where}: is not CSV: {error}."))
                fields = []
            if not header:
                header = _header(fields, wrong, where)
            elif wrong:
                yield where, wrong[0]
            elif fields and len(fields) != len(header):
                text_ = f"{where}: has {len(fields)} fields, and the header has {len(header)}."
                yield where, Unusable("with another number of fields than the header", text_)
            elif fields:
                yield where, dict(zip(header, fields, strict=True))
            wrong.clear()


def _header(fields: list[str], wrong: list[Unusable], where: str) -> list[str]:
    if wrong:
        raise wrong[0]
    twice = {name for name in fields if fields.count(name) > 1}
    if twice:
        raise DataError(f"{where}: the header names `{min(twice)}` twice.")
    return fields


def _tsv_rows(file: File, max_characters: int) -> Iterator[Located]:
    return _csv_rows(file, max_characters, "\t")


READERS: dict[str, Callable[[File, int], Iterator[Located]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}  # any other file is text


@contextmanager
def _opened(file: File) -> Iterator[io.BufferedReader]:
    """The decompressed bytes. Raises DataError for what goes wrong while they are read."""
    import fsspec

    try:
        # Not zstandard for zstd: it ends silently where the first of several frames does.
        with Path(file.path).open("rb") if file.system is None else file.system.open(file.path, "rb") as raw:
            data = fsspec.compression.compr[file.compression](raw, mode="rb") if file.compression else raw
            yield data if isinstance(data, io.BufferedReader) else io.BufferedReader(data, BUFFER)
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ZstdError) as error:
        raise DataError(f"{file.name}: cannot be read: {one_line(error)}") from error


def _lines(stream: io.BufferedReader, max_characters: int) -> Lines:
    """A line that is too long is passed over a piece at a time."""
    limit, offset = BYTES_OF_A_CHARACTER * max_characters + OTHER_COLUMNS, 0
    for number in itertools.count(1):
        line = stream.readline(limit + 1)
        if not line:
            return
        begin, offset = offset, offset + len(line)
        if len(line) <= limit:
            yield number, begin, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(BUFFER)
            offset += len(line)
        yield number, begin, None


def _decoded(data: bytes, where: str, offset: int) -> str | Unusable:
    """offset: of the data in the file; a mark of the byte order at its beginning is no text."""
    text = data if offset else data.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        at = offset + len(data) - len(text) + error.start
        wrong = f"byte {at} of the file, 0x{text[error.start]:02x}"
        return Unusable("not UTF-8", f"{where}: is not UTF-8 text: {wrong}. Save it as UTF-8.")


def _too_long(where: str, max_characters: int) -> Unusable:
    text = f"{where}: is longer than max_characters ({max_characters:,}); split it or raise it."
    return Unusable("longer than max_characters", text)


def one_line(error: BaseException) -> str:
    """What an error of another library says, in a line; its kind where it says nothing."""
    message = error.args[0] if error.args and isinstance(error.args[0], bytes) else str(error)
    text = message.decode(errors="replace") if isinstance(message, bytes) else message
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
