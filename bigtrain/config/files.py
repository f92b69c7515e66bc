"""YAML with line numbers: which line of which file a value came from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigtrain.errors import ConfigError

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 32  # of keys in keys; the schema needs 6
MAX_VALUES = 100_000  # anchors and aliases can make billions of a few lines
MERGE = "tag:yaml.org,2002:merge"


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as YAML 1.2 does, and a date as text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
for first, resolvers in Loader.yaml_implicit_resolvers.items():
    kept = [pair for pair in resolvers if pair[0] != "tag:yaml.org,2002:timestamp"]
    # The resolver above also matches integers: those must be tried before it.
    Loader.yaml_implicit_resolvers[first] = sorted(kept, key=lambda pair: pair[0] != "tag:yaml.org,2002:int")


# What YAML 1.1, which PyYAML reads, takes for another number than a person does.
OCTAL = re.compile(r"[-+]?0[0-9_]*[0-9]")
SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class Dumper(yaml.SafeDumper):
    """Quotes the text that Loader would read as something else, like '1e5'."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def literal(value: Any) -> str:
    """A value as a message writes it: as the run's file would, in one line; texts with white space in quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return repr(value).replace("inf", ".inf").replace("nan", ".nan")
    text = str(value)
    style = None if [text] == text.split() else '"'
    return yaml.dump([text], None, Dumper, default_style=style, default_flow_style=True, width=math.inf,
                     allow_unicode=True)[1:-2]  # fmt: skip


@dataclass
class ConfigFile:
    """A parsed mapping and where each of its values stands: `origins[path]` is 'file.yaml:12' or 'command line'."""

    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path`, or the nearest mapping around it, was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")


def read_yaml(path: Path) -> ConfigFile:
    """Raises ConfigError for a missing or unreadable file, bad YAML, a key given twice, or no mapping at the top."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.{_neighbours(path.parent)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the run's file.{_neighbours(path)}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    document = ConfigFile({}, {(): str(path)})
    values = parse(text, (), lambda line: f"{path}:{line}", document.origins)
    if not isinstance(values, dict):
        found = "the file is empty" if values is None else f"found {_kind(values)}"
        raise ConfigError(f"{path}: expected keys and values (like `name: my-run`) at the top of the file; {found}.")
    document.values = values
    return document


def parse(text: str, at: KeyPath, origin: Callable[[int], str], origins: dict[KeyPath, str]) -> Any:
    """The value of a YAML text that stands at path `at`; notes `origin(line)` of each value in `origins`.

    Raises ConfigError for bad YAML and for a key given twice.
    """
    key = f"{_dotted(at)}: " if at else ""
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Values(loader, origin, origins).of(node, at)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        shown = "".join(text.splitlines()[line - 1 : line]).strip()[:80]
        at_line = f", at `{shown}`" if shown else ""
        raise ConfigError(f"{origin(line)}: {key}not valid YAML: {_problem(error)}{at_line}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{origin(line)}: {key}not valid YAML: the character #x{error.character:02x}.") from None
    except RecursionError:
        raise ConfigError(f"{origin(1)}: {key}keys are nested too deeply, or an anchor contains itself.") from None


@dataclass
class _Values:
    """Turns nodes into values and notes where each stands."""

    loader: Loader
    origin: Callable[[int], str]
    origins: dict[KeyPath, str]

    def of(self, node: yaml.Node, at: KeyPath) -> Any:
        where = self._where(node)
        if len(at) > MAX_DEPTH:
            raise ConfigError(f"{where}: {_dotted(at[:4])}: keys are nested too deeply, or an anchor contains itself.")
        if len(self.origins) > MAX_VALUES:
            raise ConfigError(f"{where}: more than {MAX_VALUES:,} values; is an alias used inside other anchors?")
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key, (key_node, value_node) in self._pairs(node, at).items():
                self.origins[(*at, key)] = self._where(key_node)
                mapping[key] = self.of(value_node, (*at, key))
            return mapping
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.origins[(*at, index)] = self._where(item)
                items.append(self.of(item, (*at, index)))
            return items
        try:
            value = self.loader.construct_object(node, deep=True)
            plain = isinstance(node, yaml.ScalarNode) and node.style is None  # without quotes
            if plain and type(value) in (int, float) and (meant := _meant(node.value, value)):
                raise ConfigError(f"{where}: {_dotted(at)}: {meant}")
            return value
        except (ValueError, KeyError, AttributeError):  # what PyYAML raises for a text that does not fit its tag
            kind = node.tag.rpartition(":")[2]
            raise ConfigError(
                f"{where}: {_dotted(at)}: {literal(str(node.value)[:40])} cannot be read as {kind}."
            ) from None

    def _pairs(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The keys of a mapping, those merged with `<<` first; its own keys replace them."""
        own = self._named([pair for pair in node.value if pair[0].tag != MERGE], at, once=True)
        if len(own) < len(node.value):
            self.loader.flatten_mapping(node)
            own = self._named(node.value, at, once=False) | own
            node.value = list(own.values())  # an alias may lead here again
        return own

    def _named(
        self, pairs: list[tuple[yaml.Node, yaml.Node]], at: KeyPath, once: bool
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        named: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in pairs:
            key = self.of(key_node, (*at, "?"))
            if not isinstance(key, str):
                name = _dotted((*at, str(key)))
                raise ConfigError(f"{self._where(key_node)}: {name}: a key must be text; put it in quotes.")
            if once and key in named:
                raise ConfigError(f"{self._where(key_node)}: {_dotted((*at, key))} is given twice.")
            named[key] = (key_node, value_node)
        return named

    def _where(self, node: yaml.Node) -> str:
        return self.origin(node.start_mark.line + 1)


def _meant(text: str, value: float) -> str | None:
    """What may be meant by a number that YAML reads otherwise than a person; None for all others."""
    if OCTAL.fullmatch(text):
        digits = text.replace("_", "")
        read = f"YAML reads {text} as {value}, with base 8" if value != int(digits) else f"{text} begins with a 0"
        return f"{read}; write {int(digits)} if that number is meant, or '{text}' in quotes if it is text."
    if SIXTIES.fullmatch(text):
        return (
            f"YAML reads {text} as {value:g}, with base 60; write {value:g} if that number is meant, or '{text}' in "
            "quotes if it is text."
        )
    return None


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "it cannot be parsed"
    if "'\\t'" in problem:
        problem += "; indent with spaces, not with tabs"
    if error.problem and error.context and error.context_mark:
        problem += f" ({error.context} that begins in line {error.context_mark.line + 1})"
    return problem


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {literal(value)[:40]}"


def _neighbours(folder: Path) -> str:
    near = ", ".join(sorted(p.name for p in folder.glob("*.y*ml"))[:8]) if folder.is_dir() else ""
    return f" In {folder}: {near}." if near else ""


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each plain value in sections and lists; items that have a name are called by it."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from flat(below, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list) and value:
        for number, below in enumerate(value):
            name = below.get("name", number) if isinstance(below, dict) else number
            yield from flat(below, f"{at}.{name}")
    else:
        yield at, value
