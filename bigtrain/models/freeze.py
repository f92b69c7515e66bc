"""Which parameters of a model do not train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from bigtrain.config.files import literal
from bigtrain.errors import ConfigError, nearest
from bigtrain.state import Shape

if TYPE_CHECKING:
    from torch import nn


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters that the patterns name (`frozen`) stay as they are. Raises ConfigError as that does."""
    parameters = dict(model.named_parameters())
    for name in frozen(parameter_names(model), patterns):
        parameters[name].requires_grad_(False)


def frozen_shapes(model: nn.Module) -> dict[str, Shape]:
    """Shapes of the parameters that do not train, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not p.requires_grad}


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, with the first one, by which the state knows it: a tied one has several."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    return {name: first[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def frozen(names: Mapping[str, str], patterns: Sequence[str], key: str = "freeze") -> set[str]:
    """The parameters, by the names of the state, that the patterns name; a tied one by any of its names.

    names: as `parameter_names` gives them. A pattern is a shell's (`*`, `?`, `[0-3]`), in upper and lower case as it
    stands, of a whole name, or of a module's, which stands for all parameters below it.
    Raises ConfigError, about `key` of the run's file, for a pattern that names none, and if nothing is left to train.
    """
    found: set[str] = set()
    for pattern in patterns:
        meant = {own for name, own in names.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not meant:
            known = {name.rsplit(".", level)[0] for name in names for level in range(name.count(".") + 1)}
            raise ConfigError(
                f"{key}: no parameter of the model is named {literal(pattern)}; {nearest(pattern, known)}"
            )
        found |= meant
    if found == set(names.values()):
        raise ConfigError(f"{key}: all {len(found)} parameters are frozen, so there is nothing to train.")
    return found
