"""From a file and overrides to a checked Run, or one clear message."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bigtrain.config.checks import broken_here, broken_rules
from bigtrain.config.core import Choice, Section, mark_of
from bigtrain.config.files import ConfigFile, Dumper, KeyPath, literal, parse, read_yaml
from bigtrain.config.schema import RunConfig, SourceConfig
from bigtrain.config.texts import MEANINGS
from bigtrain.errors import ConfigError, nearest
from bigtrain.masking import masked_values

DEFAULT = "default"  # the origin of a value that nobody has given


RENAMED = {"documents_may_read_each_other": "cross_document_attention"}
ABSENT, A_STAGE = "absent", "a stage"  # in the place of a value, in `differences`

Kind = type[Section] | type[Choice]  # what may stand below a key


@dataclass(frozen=True)
class Loaded:
    """A checked run's file, and where each of its values came from."""

    run: RunConfig
    document: ConfigFile

    def origin(self, path: KeyPath) -> str:
        return self.document.origins.get(path, DEFAULT)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's file and apply `KEY=VALUE` overrides. Raises ConfigError, naming key, file and line."""
    return load(path, overrides).run


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, here: bool = False) -> Loaded:
    """As load_config, keeping the origin of every value.

    here: the run is to be started on this machine: what it names must be on its disk.
    """
    document = read_yaml(Path(path))
    _spell_out(document)
    for override in overrides:
        _override(document, override)
        _spell_out(document)
    try:
        run = RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(_explain(error, document)) from None
    loaded = Loaded(run, document)
    broken = [_line(document, at, message) for at, message in broken_rules(run)] or (lacking(loaded) if here else [])
    if broken:
        raise ConfigError("\n".join(broken))
    return loaded


def _spell_out(document: ConfigFile) -> None:
    """Write each component that is given by its name alone as `{name: NAME}`, so that its keys have a place."""

    def spell(kind: Kind | None, value: Any, at: KeyPath) -> Any:
        if isinstance(value, list):
            value[:] = [spell(kind, item, (*at, i)) for i, item in enumerate(value)]
        elif kind is not None and isinstance(value, str) and issubclass(kind, Choice):
            document.origins[(*at, "name")] = document.origin(at)
            return {"name": value}
        elif kind is not None and isinstance(value, dict):
            section = _section_of(kind, value)
            for key, below in _kinds(section).items() if section else ():
                if key in value:
                    value[key] = spell(below, value[key], (*at, key))
        return value

    spell(RunConfig, document.values, ())


def source(text: str, option: str) -> SourceConfig:
    """A source that is named on the command line. Raises ConfigError, which names the option."""
    try:
        return SourceConfig(source=text)
    except ValidationError as error:
        raise ConfigError(f"{option} {text}: {_message(error.errors(include_url=False)[0], ('source',), {})}") from None


def lacking(loaded: Loaded) -> list[str]:
    """What keeps the run from being started on this machine: a line each, with key, file and line."""
    return [_line(loaded.document, at, message) for at, message in broken_here(loaded.run)]


def to_yaml(run: RunConfig) -> str:
    """The resolved run as YAML: what `load_config` reads to the same Run."""
    return yaml.dump(run.model_dump(by_alias=True), Dumper=Dumper, sort_keys=False, width=100)


def shareable(run: RunConfig) -> str:
    """The resolved run as YAML, without its secrets: to be written down, and compared."""
    return to_yaml(without_secrets(run))


def without_secrets(run: RunConfig) -> RunConfig:
    """The run with the secrets in its texts masked: to be written down and compared, not to read its sources from."""
    return RunConfig.model_validate(masked_values(run.model_dump(by_alias=True)))


def difference(key: str, old: Any, new: Any) -> str:
    """A difference between two runs in words; of lists, a line for each item that went (-) and that came (+)."""
    if isinstance(old, list) and isinstance(new, list):
        lines = [f"    - {_item(item)}" for item in old if item not in new]
        lines += [f"    + {_item(item)}" for item in new if item not in old]
        return "\n".join([f"{key}:", *lines]) if lines else f"{key}: the same items, in another order or number"
    return f"{key}: {_item(old)} in the run, {_item(new)} now"


def _item(value: Any) -> str:
    """A section by what it says: its `source` or `name`, and each other value that is no default."""
    if not isinstance(value, Section):
        return value if value in (ABSENT, A_STAGE) else literal(value)
    said = value.model_dump(by_alias=True, exclude_defaults=True)
    words = [str(said.pop(key)) for key in ("source", "name") if key in said]
    return ", ".join([*words, *(f"{key} {literal(below).removesuffix('.0')}" for key, below in said.items())])


def differences(old: RunConfig, new: RunConfig, mark: str) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of the fields with this mark that differ; a stage added is no difference."""
    found: list[tuple[str, Any, Any]] = []
    _compare(old, new, (), mark, found)
    return found


def _compare(old: Any, new: Any, at: KeyPath, mark: str, found: list[tuple[str, Any, Any]]) -> None:
    for name, info in type(new).model_fields.items():
        if name not in type(old).model_fields:  # another component, which its name tells
            continue
        a, b, path = getattr(old, name), getattr(new, name), (*at, info.alias or name)
        if name == "stages":
            stages = {stage.name: stage for stage in b}
            for stage in a:
                if stage.name in stages:
                    _compare(stage, stages[stage.name], (*path, stage.name), mark, found)
                elif mark_of(info) == mark:
                    found.append((_dotted((*path, stage.name)), A_STAGE, ABSENT))
        elif isinstance(a, Section) and isinstance(b, Section):
            _compare(a, b, path, mark, found)
        elif _are_sections(a) and _are_sections(b) and len(a) == len(b):
            for i, pair in enumerate(zip(a, b, strict=True)):
                _compare(*pair, (*path, i), mark, found)
        elif a != b and mark_of(info) == mark:
            found.extend((_dotted(place), old_value, new_value) for place, old_value, new_value in _parts(a, b, path))


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(item, Section) for item in value)


def _parts(a: Any, b: Any, at: KeyPath) -> Iterator[tuple[KeyPath, Any, Any]]:
    """The values within two values that differ: of mappings and sections key by key, of lists as long item by item."""
    if isinstance(a, Section) and isinstance(b, Section):
        a, b = a.model_dump(by_alias=True), b.model_dump(by_alias=True)
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            yield from _parts(a.get(key, ABSENT), b.get(key, ABSENT), (*at, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from _parts(*pair, (*at, i))
    elif a != b:
        yield at, a, b


def _override(document: ConfigFile, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {literal(override)}: expected KEY=VALUE, like stages.pretrain.optimizer.lr=1e-4")
    origins: dict[KeyPath, str] = {}
    value = parse(text, tuple(key.split(".")), lambda _line: "command line", origins)
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
                at[part] = {"name": at[part]} if isinstance(at.get(part), str) else {}  # a component's short form
            at = at[part]
        if not last and not isinstance(at, dict | list):
            raise ConfigError(f"override {literal(override)}: {_dotted(path)} has no keys below it.")
    stale = [p for p in document.origins if p[: len(path)] == path]
    for p in stale:
        del document.origins[p]
    document.origins[path] = "command line"
    for below in origins:
        document.origins[(*path, *below[len(parts) :])] = "command line"


def _index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    known = [str(name) for name in names if name] or [str(i) for i in range(len(items))]
    raise ConfigError(f"override {literal(override)}: there is no {literal(part)} here; {nearest(part, known)}")


def _explain(error: ValidationError, document: ConfigFile) -> str:
    messages: dict[KeyPath, list[str]] = {}
    details = error.errors(include_url=False)
    misspelt = {
        (*detail["loc"][:-1], meant)
        for detail in details
        if detail["type"] == "extra_forbidden" and (meant := _meant(detail["loc"], document.values))
    }
    for detail in details:
        if detail["type"] == "missing" and detail["loc"] in misspelt:
            continue
        path = tuple(p for p in detail["loc"] if not _is_union_branch(p))
        messages.setdefault(path, []).append(_message(detail, path, document.values))
    return "\n".join(_line(document, path, _joined(told)) for path, told in messages.items())


def _joined(told: list[str]) -> str:
    """The messages about one value: those of a union's branches are alternatives."""
    return "; or: ".join([*(one.removesuffix(".") for one in told[:-1]), told[-1]])


def _meant(unknown: KeyPath, values: dict[str, Any]) -> str | None:
    """The known key that an unknown one probably is."""
    close = difflib.get_close_matches(str(unknown[-1]), _kinds(_at(unknown[:-1], values)[1]), 1, 0.6)
    return close[0] if close else None


def _is_union_branch(part: str | int) -> bool:
    # pydantic names the branch of `int | Literal[...]` in the location; it is no key
    return part in ("int", "float", "str") or (isinstance(part, str) and part.startswith("literal["))


def _message(detail: ErrorDetails, path: KeyPath, values: dict[str, Any]) -> str:
    value = detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(str(path[-1]), *_at(path[:-1], values))
        case "component":
            return detail["msg"]
        case "missing":
            return "this key is required."
        case "literal_error":
            expected = detail["ctx"]["expected"].replace("'", "")  # of Python
            return f"{_shown(value)} is not one of {expected}{_remedy(detail['type'], value)}."
        case "string_pattern_mismatch":
            return f"{_shown(value)} {MEANINGS[detail['ctx']['pattern']]}."
        case "value_error":
            return f"{detail['ctx']['error']}."
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"expected keys and values below it, got {_shown(value)}."
        case _:
            return (
                f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {_shown(value)}{_remedy(detail['type'], value)}."
            )


def _unknown_key(key: str, kind: Kind, section: type[Section]) -> str:
    if key in RENAMED:
        return f"this key is called `{RENAMED[key]}` now."
    if issubclass(kind, Choice):
        theirs = [name for name, other in sorted(kind.ours().items()) if key in other.model_fields]
        if theirs:
            names = " and ".join(filter(None, [", ".join(theirs[:-1]), theirs[-1]]))
            return f"is a key of {names}; remove it, or choose {'that' if len(theirs) == 1 else 'one of these'}."
    if homes := sorted(set(_homes(key))):
        return f"unknown key; it belongs below {' or '.join(f'`{home}`' for home in homes)}."
    return f"unknown key; {nearest(key, _kinds(section))}"


def _remedy(kind: str, value: Any) -> str:
    """How a value of the wrong type may have come about."""
    if value is None:
        return ": nothing is written after the key, or `~` or `null`; give a value or remove the key"
    if kind in ("int_type", "float_type") and isinstance(value, str) and (number := _number(value)):
        return "; write it without quotes" if number == value.strip() else f"; write {number}"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in ("string_type", "literal_error") and isinstance(value, bool):
        return " (YAML reads yes, no, on and off as true and false); put it in quotes"
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if kind == "list_type" and not isinstance(value, dict):
        return f"; write [{_shown(value)}]"
    return ""


def _number(text: str) -> str | None:
    """The number that a text spells, as YAML reads it; None if it spells none."""
    plain = re.sub(r"[ ,'](?=\d{3}\b)", "", text.strip())  # 1,000,000
    for read in (float, lambda digits: int(digits, 0)):  # the latter: 0o17
        try:
            number = read(plain)
        except ValueError:
            continue
        return plain if read is float else str(number)
    return None


def _shown(value: Any) -> str:
    text = literal(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(document: ConfigFile, path: KeyPath, message: str) -> str:
    named: list[str] = []
    at: Any = document.values
    for part in path:
        at = at[part] if isinstance(part, int) or (isinstance(at, dict) and part in at) else None
        named.append(str(at.get("name", part)) if isinstance(part, int) and isinstance(at, dict) else str(part))
    return f"{document.origin(path)}: {'.'.join(named)}: {message}"


def _kinds(section: type[Section]) -> dict[str, Kind | None]:
    """The keys of a section, each with what stands below it; None where no keys do."""
    return {info.alias or name: _kind_in(info.annotation) for name, info in section.model_fields.items()}


def _kind_in(annotation: Any) -> Kind | None:
    if isinstance(annotation, type) and issubclass(annotation, Section | Choice):
        return annotation
    return next((kind for kind in map(_kind_in, typing.get_args(annotation)) if kind is not None), None)


def _section_of(kind: Kind, values: Any) -> type[Section] | None:
    """The section that values of the file, not yet checked, are meant as."""
    return kind.of(values) if issubclass(kind, Choice) else kind


def _at(path: KeyPath, values: Any) -> tuple[Kind, type[Section]]:
    """What stands at the path of a section: its kind, and the section that the values choose."""
    kind: Kind | None = RunConfig
    section: type[Section] | None = RunConfig
    for part in path:
        values = values[part]
        if isinstance(part, str) and section is not None:
            kind = _kinds(section)[part]
            section = None if kind is None else _section_of(kind, values)
    assert kind is not None and section is not None, path
    return kind, section


def _homes(key: str, section: type[Section] = RunConfig, path: str = "") -> Iterator[str]:
    """The sections below which a key of this name stands, with dots."""
    for name, info in section.model_fields.items():
        known, kind = info.alias or name, _kind_in(info.annotation)
        if known == key and path:
            yield path
        if kind is not None:
            place = f"{known}.NAME" if typing.get_origin(info.annotation) is list else known
            for below in kind.ours().values() if issubclass(kind, Choice) else [kind]:
                yield from _homes(key, below, f"{path}.{place}" if path else place)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
