"""What data a source is, whatever it is called and wherever it lies: a hash of what decides which rows it gives."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock
import xxhash

from bigtrain.config.schema import SourceConfig
from bigtrain.config.sources import kind_of
from bigtrain.data import stdlib
from bigtrain.data.files import BUFFER, File, find
from bigtrain.data.sources import load_function
from bigtrain.disk import write_whole
from bigtrain.errors import DataError
from bigtrain.masking import masked

VERSION = 4  # of how rows are read
CHOICES = {"config", "split", "revision", "field", "on_error", "max_characters"}  # of rows, beside the content
KNOWN = "contents.json"  # in the folder of the stores: path -> what `_signs` gives, and the hash of its bytes
YOUNG = {False: 0.1, True: 2.0}  # seconds in which a file system (True: one of whole seconds) may give two changes
# the same time of change
CHANGED = "has changed while it was being read. Start again, once it stays as it is."

Contents = dict[str, list[Any]]


def fingerprint(source: SourceConfig, stores: Path | None = None) -> str:
    """A hash that changes with the rows that the source gives.

    Of files it sees every byte (XXH3, 128 bits), their kinds and their order; not their names, folders and modification
    times. Of URLs it sees what their file system tells: the URL, size, time and ETag. Of the Hub it sees the commit, of
    `module:name` the code of the module; what such a function reads by itself is not seen.

    stores: the folder that remembers the hashes of files, by path, size, inode and the times of the last change of
    content and of status. A file is read again when one of these differs. Processes share the work.

    Raises DataError for a source that is missing, and a file that changes while it is read.
    """
    kind = kind_of(source)
    metadata: list[Any] = [kind]
    if kind == "stdlib":
        files = stdlib.files()
        names = [file.relative_to(stdlib.root()).as_posix() for file in files]
        metadata += [source.source, stdlib.VERSION, sys.version, names, _contents(map(str, files), stores)]
    elif kind == "function":
        load_function(source.source)
        file = getattr(sys.modules[source.source.partition(":")[0]], "__file__", None)
        metadata += [source.source, hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None]
    elif kind == "hub":
        from bigtrain.data.tables import hub_commit

        metadata += [source.source, hub_commit(source)]
    else:
        found = find(source.source)
        local = [file.path for file in found if file.system is None]
        metadata += [[file.kind, file.compression] for file in found]
        metadata += [file.path.removeprefix(source.source) for file in found if kind == "saved"]
        metadata += _contents(local, stores) if local else [_told(file) for file in found]
    metadata.append(source.model_dump(include=CHOICES))
    return hashlib.sha256(json.dumps([VERSION, metadata], sort_keys=True).encode()).hexdigest()


def is_known(source: SourceConfig, stores: Path) -> bool:
    """Whether `fingerprint` would read no file of the source."""
    match kind_of(source):
        case "stdlib":
            files = stdlib.files()
        case "files" | "saved":
            files = [Path(file.path) for file in find(source.source) if file.system is None]
        case _:
            return True
    known = _read(stores / KNOWN)
    return all(_hash_of(file, known) is not None for file in files)


def _told(file: File) -> list[Any]:
    """What the file system of a URL says of a file; a modification time or an ETag are not part of every `ukey`.

    A URL's secret may change while the file stays: it counts only where nothing else tells two files apart.
    """
    metadata = file.system.info(file.path)
    names = ("size", "ETag", "etag", "mtime", "created", "LastModified", "last_modified", "md5", "sha256", "CRC")
    told = [str(metadata[name]) for name in names if metadata.get(name) is not None]
    name = masked(file.name)
    return [name, *told] if name != file.name and told else [name, file.system.ukey(file.path), *told]


def _contents(paths: Iterable[str], stores: Path | None) -> list[str]:
    """The hashes of files, in their order."""
    files = [Path(path) for path in paths]
    try:
        if stores is None:
            return [_hashed(file, {}) for file in files]
        found = [_hash_of(file, known) for known in [_read(stores / KNOWN)] for file in files]
        if None not in found:
            return [str(digest) for digest in found]
        stores.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(stores / f"{KNOWN}.lock"):
            known = _read(stores / KNOWN)  # another process may have read them meanwhile
            digests = [_hash_of(file, known) or _hashed(file, known) for file in files]
            write_whole(stores / KNOWN, json.dumps(known))
        return digests
    except OSError as error:
        raise DataError(f"{error.filename or stores}: cannot be read: {error.strerror or error}") from error


def _hash_of(file: Path, known: Contents) -> str | None:
    """The hash that is remembered of a file, if it is still that file."""
    *signs, digest = known.get(os.path.realpath(file), [None])
    return digest if signs == _signs(file.stat()) else None


def _hashed(file: Path, known: Contents) -> str:
    """The hash of a file's bytes, to be remembered unless it could change once more at the same moment."""
    before, now = file.stat(), time.time_ns()
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while data := stream.read(BUFFER):
            digest.update(data)
    if _signs(before) != _signs(file.stat()):
        raise DataError(f"{file}: {CHANGED}")
    young = YOUNG[before.st_ctime_ns % 10**9 == 0]
    if now - before.st_ctime_ns > young * 1e9:
        known[os.path.realpath(file)] = [*_signs(before), digest.hexdigest()]
    return digest.hexdigest()


def _signs(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(file: Path) -> Contents:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # nothing is lost: the files are read again
        return {}
    return found if isinstance(found, dict) else {}
