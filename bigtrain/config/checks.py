"""What the sections of a run say of their values: what is wrong, what is missing here, what is unusual."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from bigtrain.config.core import Broken, Section, sections
from bigtrain.config.files import KeyPath, literal
from bigtrain.config.schema import RunConfig, StageConfig


def broken_rules(run: RunConfig) -> list[tuple[KeyPath, str]]:
    """(path of the key to change, message) for every rule between fields that the run breaks."""
    found = list(_finite(run.model_dump(by_alias=True), ()))
    for at, section, stage in _sections(run):
        found += [((*at, *key), told) for key, told in section.check(run, stage)]
    return found


def broken_here(run: RunConfig) -> list[tuple[KeyPath, str]]:
    """The same for what the run needs on this machine: data, checkpoints, packages, a folder of its own."""
    return [
        ((*at, *key), told) for at, section, stage in _sections(run) for key, told in section.check_here(run, stage)
    ]


def unusual(run: RunConfig) -> list[str]:
    """A sentence for each unusual value, which begins with its key."""
    found = []
    for at, section, stage in _sections(run):
        key = at if stage is None else ("stages", stage.name, *at[2:])
        found += [".".join(map(str, (*key, told))) for told in section.unusual(run, stage)]
    return found


def _sections(run: RunConfig) -> Iterator[tuple[KeyPath, Section, StageConfig | None]]:
    """(path, section, the stage that it belongs to) of all sections of a run."""
    for at, section in sections(run):
        yield at, section, run.stages[int(at[1])] if at[:1] == ("stages",) else None


def _finite(value: Any, at: KeyPath) -> Broken:
    if isinstance(value, float) and not math.isfinite(value):
        yield at, f"must be a finite number, got {literal(value)}."
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield at, f"is too large a number; the largest is {2**63 - 1}."
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _finite(below, (*at, key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from _finite(below, (*at, i))
