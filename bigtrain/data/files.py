"""Files of documents: found by path, glob, folder or URL, opened by fsspec and decompressed as they are read."""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bigtrain.config.sources import is_hidden, local_files, local_hidden
from bigtrain.errors import DataError, one_line

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError
else:
    from backports.zstd import ZstdError

BUFFER = 1 << 20  # bytes
BYTES_OF_A_CHARACTER = 4  # of UTF-8, at most
OTHER_COLUMNS = 1 << 24  # bytes of a line beside its document, at most
WEB = ("http://", "https://")
TABLES = (".parquet", ".arrow", ".feather")
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
ABOUT = frozenset({"key", "where", "label"})  # what of a document is no text of it
Line = tuple[int, int, bytes | None]  # number from 1, offset in bytes, the line; None for one too long


@dataclass(frozen=True)
class File:
    """system: of fsspec, in which `path` is. name: a path or URL for messages and for datasets."""

    system: Any
    path: str
    name: str

    def bytes(self) -> int | None:
        """Of text, about; None for a compressed one and where the file system does not say."""
        if self.compression is not None or self.kind in TABLES:
            return None
        return Path(self.path).stat().st_size if self.system is None else self.system.info(self.path).get("size")

    @cached_property
    def compression(self) -> str | None:
        """fsspec's name for it."""
        return COMPRESSED.get(Path(self._named).suffix.lower())

    @cached_property
    def stem(self) -> str:
        """The name without the suffix of a compression."""
        path = Path(self._named)
        return (path.with_suffix("") if self.compression else path).name

    @property
    def _named(self) -> str:
        return without_query(self.path)

    @cached_property
    def kind(self) -> str:
        """The suffix, without that of a compression."""
        return Path(self.stem).suffix.lower()


def without_query(path: str) -> str:
    """The path of a file system; of a URL of the web, without what follows its path."""
    return urlsplit(path)._replace(query="", fragment="").geturl() if path.startswith(WEB) else path


def find(source: str) -> list[File]:
    """The files of a path, a glob, a URL, or all below a folder, sorted; hidden ones only where they are named.

    Raises DataError if there are none, and for a folder that cannot be read.
    """
    if "://" in source and not Path(source).exists():
        local = source.removeprefix("file://")
        return _find_remote(source) if "://" in local else find(local)
    try:
        names = _distinct(local_files(source))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return [File(None, name, name) for name in names] or _nothing(source, Path(source).is_dir())


def _distinct(names: Iterable[str]) -> list[str]:
    """Each real file once, sorted: by its own name, or where that is not among them by the first of its links."""
    folders: dict[str, str] = {}  # as they are named -> as they are
    found: dict[str, tuple[bool, str]] = {}
    for name in names:
        folder, base = os.path.split(name)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real = os.path.realpath(name) if Path(name).is_symlink() else os.path.join(folders[folder], base)  # noqa: PTH118
        is_link = real != os.path.abspath(name)  # noqa: PTH100
        found[real] = min(found.get(real, (is_link, name)), (is_link, name))
    return sorted((name for _, name in found.values()), key=Path)


def _find_remote(url: str) -> list[File]:
    import fsspec

    outer = "".join(url.partition("::")[1:])  # of zip://*.txt::s3://bucket/a.zip
    try:
        system, path = fsspec.core.url_to_fs(url)
        folder = system.isdir(path)
        if folder and system.exists(f"{path}/state.json") and system.exists(f"{path}/dataset_info.json"):
            raise DataError(f"{url}: a folder of save_to_disk must lie on a disk; here name its files, {url}/*.arrow.")
        if glob.has_magic(without_query(path)):
            paths = [found for found in system.glob(path) if system.isfile(found)]
        elif folder:
            paths = [p for p in system.find(path) if not _is_hidden_below(path, p)]
        else:
            paths = [path] if system.exists(path) else []
    except DataError:
        raise
    except Exception as error:  # every file system has its own
        raise DataError(f"{url}: cannot be opened: {one_line(error)}") from error
    return [File(system, p, system.unstrip_protocol(p) + outer) for p in sorted(paths)] or _nothing(url, folder)


def _is_hidden_below(folder: str, path: str) -> bool:
    return any(map(is_hidden, path.removeprefix(folder).split("/")))


def hidden(source: str) -> int:
    """How many files and folders of a folder are not read for their names; of a URL, files alone."""
    if Path(source).is_dir():
        return local_hidden(source)
    if "://" not in source or glob.has_magic(source):
        return 0
    if source.startswith("file://"):
        return hidden(source.removeprefix("file://"))
    import fsspec

    system, path = fsspec.core.url_to_fs(source)
    return sum(_is_hidden_below(path, found) for found in system.find(path)) if system.isdir(path) else 0


def _nothing(source: str, folder: bool) -> list[File]:
    if folder:
        raise DataError(f"{source}: the folder holds no files.")
    if glob.has_magic(without_query(source)):
        raise DataError(f"{source}: no file matches.")
    where = "" if "://" in source else f" (looked in {Path.cwd()})"
    raise DataError(f"{source}: there is no such file or folder{where}.")


@contextmanager
def opened(file: File) -> Iterator[io.BufferedReader]:
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


def lines(stream: io.BufferedReader, max_characters: int) -> Iterator[Line]:
    """The lines of a stream; one that is too long is passed over a piece at a time."""
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


def decoded(data: bytes, where: str, offset: int) -> str | Unusable:
    """Text of UTF-8. offset: of the data in the file; a mark of the byte order at its beginning is no text."""
    text = data if offset else data.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        at = offset + len(data) - len(text) + error.start
        wrong = f"byte {at} of the file, 0x{text[error.start]:02x}"
        return Unusable("not UTF-8", f"{where}: is not UTF-8 text: {wrong}. Save it as UTF-8.")


def too_long(where: str, max_characters: int) -> Unusable:
    """What is wrong with a row that is too long to be read."""
    text = f"{where}: is longer than max_characters ({max_characters:,}); split it or raise it."
    return Unusable("longer than max_characters", text)
