"""The resolved file: every key with its value and where that came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from bigtrain.config.core import Section
from bigtrain.config.files import KeyPath
from bigtrain.config.load import Loaded


class Resolved(NamedTuple):
    """A dotted key (stages by name), its value, and `file.yaml:12`, `command line` or `default`."""

    key: str
    value: Any
    origin: str


def resolved(loaded: Loaded) -> list[Resolved]:
    """Every value of the run, in the order of the schema."""
    return list(_values(loaded.run, (), "", loaded))


def as_yaml(value: Any) -> str:
    """A value in one line, as it could stand in the file."""
    if isinstance(value, str) and value and json.dumps(value, ensure_ascii=False) == f'"{value}"':
        return value
    return json.dumps(value, ensure_ascii=False)


def _values(value: Any, at: KeyPath, key: str, loaded: Loaded) -> Iterator[Resolved]:
    for part, name, below in _below(value):
        yield from _values(below, (*at, part), f"{key}.{name}" if key else name, loaded)
    if not _below(value):
        yield Resolved(key, value, loaded.origin(at))


def _below(value: Any) -> list[tuple[str | int, str, Any]]:
    """(part of the path, its name in a dotted key, value) of what has keys of its own."""
    if isinstance(value, Section):
        keys = [(info.alias or name, name) for name, info in type(value).model_fields.items()]
        return [(key, key, getattr(value, name)) for key, name in keys]
    if isinstance(value, dict):
        return [(key, key, below) for key, below in value.items()]
    if isinstance(value, list) and any(isinstance(item, Section) for item in value):
        return [(i, str(getattr(item, "name", i)), item) for i, item in enumerate(value)]
    return []
