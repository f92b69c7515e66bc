"""Sections of a run's file, the marks of their keys, and components: sections that are chosen by `name`.

A component is a class in a file of its own: its keys and its methods. Those of one kind share a base class, which the
package of the kind defines; each module of that package that holds a subclass adds a component. A class of the user's
own is named `package.module:Class`. Nothing here or in a component's file imports torch before a method is called.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

from bigtrain.config.files import KeyPath, literal
from bigtrain.config.user_code import NAMED, imported
from bigtrain.errors import nearest

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig

Mark = Literal["mathematics", "execution", "reporting"]
Broken = Iterator[tuple[KeyPath, str]]


class Section(BaseModel):
    """A mapping of the run's file: unknown keys and wrong types are errors, values cannot be changed later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    # What a section says of its own values; `stage` is the one that it belongs to, None for a section of the run.

    def check(self, run: RunConfig, stage: Any) -> Broken:  # noqa: ARG002
        """(path of a key below this section, message) for each value that is wrong, or is given and has no effect."""
        yield from ()

    def check_here(self, run: RunConfig, stage: Any) -> Broken:  # noqa: ARG002
        """The same for what the run needs on this machine: data, checkpoints, packages."""
        yield from ()

    def unusual(self, run: RunConfig, stage: Any) -> Iterator[str]:  # noqa: ARG002
        """A sentence, which begins with its key, for each value that is allowed and seldom meant."""
        yield from ()

    def gives(self, field: str) -> bool:
        """Whether a field differs from its default: a file that is written out has every key."""
        return getattr(self, field) != type(self).model_fields[field].get_default()


def mathematics(doc: str, default: Any = ..., **limits: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"mark": "mathematics"}, **limits)


def execution(doc: str, default: Any = ..., **limits: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"mark": "execution"}, **limits)


def reporting(doc: str, default: Any = ..., **limits: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"mark": "reporting"}, **limits)


def mark_of(field: Any) -> Mark:
    """The mark of a section's pydantic FieldInfo."""
    return field.json_schema_extra["mark"]


class Component(Section):
    """A section that is chosen by `name`. One of ours has its name as the default of that field."""

    name: str = mathematics("Which one: one of ours, or package.module:Class, a class of your own.")


class Choice:
    """The type of a field that holds a component: takes `{name: NAME, ...}`, NAME alone, or the component itself.

    home: `package:Class` of the base. default: the name where none is given; None: a name is required.
    """

    home: ClassVar[str]
    default: ClassVar[str | None]

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse)

    @classmethod
    def base(cls) -> type[Component]:
        package, _, name = cls.home.partition(":")
        return getattr(import_module(package), name)

    @classmethod
    def ours(cls) -> dict[str, type[Component]]:
        """The components that bigtrain brings, by name."""
        return _components(cls.home.partition(":")[0], cls.base())

    @classmethod
    def of(cls, values: Any) -> type[Component] | None:
        """The class that a mapping of the run's file, not yet checked, chooses; None if it names none that exists."""
        name = values.get("name", cls.default) if isinstance(values, dict) else values
        try:
            return cls._named(name)
        except (ValidationError, PydanticKnownError):
            return None

    @classmethod
    def parse(cls, value: Any) -> Component:
        if isinstance(value, cls.base()):
            return value
        values = {"name": value} if isinstance(value, str) else value
        if not isinstance(values, dict):
            raise PydanticKnownError("string_type" if isinstance(values, bool) else "dict_type")
        if cls.default is not None:
            values = {"name": cls.default, **values}
        if "name" not in values:
            raise _at_name(PydanticKnownError("missing"), values)
        return cls._named(values["name"]).model_validate(values)

    @classmethod
    def _named(cls, name: Any) -> type[Component]:
        """Raises ValidationError, at the key `name`, if there is none."""
        ours, kind = cls.ours(), cls.base().__name__.lower()
        if isinstance(name, str) and name in ours:
            return ours[name]
        if not isinstance(name, str) or not NAMED.fullmatch(name):
            told = f"there is no {kind} {literal(name)}; {nearest(str(name), ours)}"
            raise _wrong(f"{told} One of your own is written package.module:Class.", name)
        try:
            return _own(name, cls.base(), cls.home)
        except ValueError as error:
            raise _wrong(f"{name}: {error}", name) from error


def choice(home: str, default: str | None = None) -> Any:
    """The `Choice` of a kind of component, as the type of a field."""
    return type(home.partition(":")[2], (Choice,), {"home": home, "default": default})


@cache
def _components(package: str, base: type[Component]) -> dict[str, type[Component]]:
    modules = [
        import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(import_module(package).__path__)
    ]
    classes = [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == module.__name__
    ]
    return {kind.model_fields["name"].default: kind for kind in classes if not kind.model_fields["name"].is_required()}


def _own(name: str, base: type[Component], home: str) -> type[Component]:
    """Raises ValueError with a sentence for what is no component of this kind."""
    found = imported(name)
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"it is no subclass of {home.replace(':', '.')}.")
    if inspect.isabstract(found):
        raise ValueError(
            f"it lacks {', '.join(sorted(found.__abstractmethods__))}, which {home.replace(':', '.')} asks for."
        )
    return found


def _wrong(told: str, name: Any) -> ValidationError:
    return _at_name(PydanticCustomError("component", "{told}", {"told": told}), name)


def _at_name(error: PydanticCustomError | PydanticKnownError, value: Any) -> ValidationError:
    kind: Any = error.type if isinstance(error, PydanticKnownError) else error
    return ValidationError.from_exception_data("", [{"type": kind, "loc": ("name",), "input": value}])


def sections(section: Section, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Section]]:
    """A section and all sections below it, each with its path."""
    yield at, section
    for field, info in type(section).model_fields.items():
        value, key = getattr(section, field), info.alias or field
        if isinstance(value, Section):
            yield from sections(value, (*at, key))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Section):
                    yield from sections(item, (*at, key, i))
