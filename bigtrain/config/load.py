"""From a file and overrides to a checked Run, or one clear message."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bigtrain.config.files import Document, KeyPath, Loader, read_yaml
from bigtrain.config.rules import broken_rules
from bigtrain.config.schema import Run, Section, mark_of
from bigtrain.errors import ConfigError, nearest


@dataclass(frozen=True)
class Loaded:
    """A checked run's file, and where each of its values came from."""

    run: Run
    document: Document

    def origin(self, path: KeyPath) -> str:
        return self.document.origins.get(path, "default")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """Read a run's file and apply `KEY=VALUE` overrides. Raises ConfigError, naming key, file and line."""
    return load(path, overrides).run


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Loaded:
    """As load_config, keeping the origin of every value."""
    document = read_yaml(Path(path))
    for override in overrides:
        _override(document, override)
    try:
        run = Run.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(_explain(error, document)) from None
    broken = broken_rules(run)
    if broken:
        raise ConfigError("\n".join(_line(document, at, message) for at, message in broken))
    return Loaded(run, document)


def to_yaml(run: Run) -> str:
    """The resolved run as YAML: what `load_config` reads to the same Run."""
    return yaml.safe_dump(run.model_dump(by_alias=True), sort_keys=False, width=100)


def differences(old: Run, new: Run, mark: str) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of the fields with this mark that differ; a stage added is no difference."""
    found: list[tuple[str, Any, Any]] = []
    _compare(old, new, (), mark, found)
    return found


def _compare(old: Any, new: Any, at: KeyPath, mark: str, found: list[tuple[str, Any, Any]]) -> None:
    for name, info in type(new).model_fields.items():
        a, b, path = getattr(old, name), getattr(new, name), (*at, info.alias or name)
        if name == "stages":
            stages = {stage.name: stage for stage in b}
            for stage in a:
                if stage.name in stages:
                    _compare(stage, stages[stage.name], (*path, stage.name), mark, found)
                elif mark_of(info) == mark:
                    found.append((_dotted((*path, stage.name)), "a stage", "absent"))
        elif type(a) is type(b) and isinstance(a, Section):
            _compare(a, b, path, mark, found)
        elif a != b and mark_of(info) == mark:
            found.append((_dotted(path), a, b))


def _override(document: Document, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected KEY=VALUE, like stages.pretrain.optimizer.lr=1e-4")
    try:
        value = yaml.load(text, Loader)  # noqa: S506 - Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    at: Any = document.values
    path: KeyPath = ()
    parts = key.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(at, list):
            index = _index(at, part, override)
            path = (*path, index)
            if last:
                at[index] = value
            at = at[index]
        else:
            path = (*path, part)
            if last:
                at[part] = value
            elif not isinstance(at.get(part), dict | list):
                at[part] = {}
            at = at[part]
        if not last and not isinstance(at, dict | list):
            raise ConfigError(f"override {override!r}: {_dotted(path)} has no keys below it.")
    stale = [p for p in document.origins if p[: len(path)] == path]
    for p in stale:
        del document.origins[p]
    document.origins[path] = "command line"


def _index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [str(name) for name in names if name] or [str(i) for i in range(len(items))]
    raise ConfigError(f"override {override!r}: there is no {part!r} here; {nearest(part, known)}")


def _explain(error: ValidationError, document: Document) -> str:
    lines: list[str] = []
    for detail in error.errors(include_url=False):
        path = tuple(p for p in detail["loc"] if not _is_union_branch(p))
        line = _line(document, path, _message(detail, path))
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _is_union_branch(part: str | int) -> bool:
    # pydantic names the branch of `int | Literal[...]` in the location; it is no key
    return part in ("int", "float", "str") or (isinstance(part, str) and part.startswith("literal["))


def _message(detail: ErrorDetails, path: KeyPath) -> str:
    value = detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key; {nearest(str(path[-1]), _keys_at(path[:-1]))}"
        case "missing":
            return "this key is required."
        case "literal_error":
            return f"{value!r} is not one of {detail['ctx']['expected']}."
        case "string_pattern_mismatch":
            return f"{value!r} may hold only letters, digits, '-' and '_', and begins with a letter or digit."
        case _:
            return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {_shown(value)}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(document: Document, path: KeyPath, message: str) -> str:
    named: list[str] = []
    at: Any = document.values
    for part in path:
        at = at[part] if isinstance(at, dict) and part in at else at[part] if isinstance(part, int) else None
        named.append(str(at.get("name", part)) if isinstance(part, int) and isinstance(at, dict) else str(part))
    return f"{document.origin(path)}: {'.'.join(named)}: {message}"


def _keys_at(path: KeyPath) -> list[str]:
    section: type[BaseModel] | None = Run
    for part in path:
        if isinstance(part, str) and section is not None:
            fields = {info.alias or name: info for name, info in section.model_fields.items()}
            section = _section_in(fields[part].annotation)
    assert section is not None, path
    return [info.alias or name for name, info in section.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, UnionType):
        return next((s for s in map(_section_in, typing.get_args(annotation)) if s is not None), None)
    return None


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
