"""What can be done when a run's file no longer says what its run has trained, and which stages `--restart` is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.config.schema import StageConfig


def stage_of(key: str) -> str | None:
    """The stage that a dotted key of the run's file is about."""
    return key.split(".")[1] if key.startswith("stages.") else None


def choices(stages: Sequence[StageConfig], changed: list[str]) -> list[str]:
    """What can be done about keys that differ from those of the run, and what each would mean."""
    choices = ["  set the values back: the run goes on from its newest checkpoint, as if nothing had been changed."]
    stage, *more = {stage_of(key) for key in changed}
    if stage is not None and not more:
        choices.append(restart_choice(stages, stage, " with the new values"))
    choices.append("  another `name`: a run of its own from the first step on; this one stays as it is.")
    return choices


def restart_choice(stages: Sequence[StageConfig], stage: str, values: str = "") -> str:
    """A line about what `--restart` would do."""
    others = with_dependents(stages, stage)[1:]
    also = f", and {', '.join(others)}, which starts from it," if others else ""
    return (
        f"  `--restart {stage}`: {stage}{also} is trained from its first step{values}; what it was so far is kept as "
        f"{stage}.1 or the next free number."
    )


def with_dependents(stages: Sequence[StageConfig], stage: str | None) -> list[str]:
    """A stage and all later ones whose weights come from it."""
    names = [stage] if stage is not None else []
    for later in stages:
        if later.from_stage in names:
            names.append(later.name)
    return names
