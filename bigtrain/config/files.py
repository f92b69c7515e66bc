"""YAML with line numbers: which line of which file a value came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigtrain.errors import ConfigError

KeyPath = tuple[str | int, ...]


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as YAML 1.2 does."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
# The resolver above also matches integers: those must be tried before it.
for resolvers in Loader.yaml_implicit_resolvers.values():
    resolvers.sort(key=lambda pair: pair[0] != "tag:yaml.org,2002:int")


@dataclass
class Document:
    """A parsed mapping and where each of its values stands: `origins[path]` is 'file.yaml:12' or 'command line'."""

    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path`, or the nearest mapping around it, was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")


def read_yaml(path: Path) -> Document:
    """Raises ConfigError for a missing or unreadable file, bad YAML, a key given twice, or no mapping at the top."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.y*ml"))[:8]) if path.parent.is_dir() else ""
        hint = f" In {path.parent}: {near}." if near else ""
        raise ConfigError(f"{path}: there is no such file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: expected keys and values (like `name: my-run`) at the top of the file.")
        document = Document({}, {(): str(path)})
        document.values = _value(node, loader, (), path, document.origins)
        return document
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _value(node: yaml.Node, loader: Loader, at: KeyPath, file: Path, origins: dict[KeyPath, str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"{file}:{line}: the key {key!r} is not text; put it in quotes.")
            if key in mapping:
                raise ConfigError(f"{file}:{line}: {_dotted((*at, key))} is given twice.")
            origins[(*at, key)] = f"{file}:{line}"
            mapping[key] = _value(value_node, loader, (*at, key), file, origins)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            origins[(*at, index)] = f"{file}:{item.start_mark.line + 1}"
            items.append(_value(item, loader, (*at, index), file, origins))
        return items
    return loader.construct_object(node, deep=True)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
