"""Values that are allowed and seldom meant: told at the start and by the dry run, with the usual range."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bigtrain.config.core import Component, sections
from bigtrain.config.schema import RunConfig, SourceConfig, StageConfig
from bigtrain.config.sources import parse_split


def unusual(run: RunConfig) -> list[str]:
    """A sentence for each unusual value, which begins with its key."""
    return [f"stages.{stage.name}.{text}" for stage in run.stages for text in _of_stage(run, stage)]


def _of_stage(run: RunConfig, stage: StageConfig) -> Iterator[str]:
    for at, component in sections(stage):
        if isinstance(component, Component):
            yield from (f"{'.'.join(map(str, at))}.{text}" for text in component.unusual())
    micro = run.parallel_of(stage).micro_batch_size
    if micro > stage.global_batch_size and micro != type(run.parallel).model_fields["micro_batch_size"].default:
        batch = stage.global_batch_size
        yield f"global_batch_size: {batch} is less than micro_batch_size ({micro}), which shrinks to it."
    for source in (stage.evaluate.data if stage.evaluate else None) or []:
        for trained in _lineage(run, stage):
            if any(_overlap(source, other) for other in trained.data):
                yield (
                    f"evaluate.data: {source.source} is trained on too, in stage {trained.name}: the loss on it says "
                    "nothing about other documents. Evaluate on others, or hold some out with `held_out`."
                )


def _lineage(run: RunConfig, stage: StageConfig) -> Iterator[StageConfig]:
    """A stage, and those that its weights come from."""
    stages = {other.name: other for other in run.stages}
    at: StageConfig | None = stage
    while at is not None:
        yield at
        at = stages[at.from_stage] if at.from_stage is not None else None


def _overlap(one: SourceConfig, other: SourceConfig) -> bool:
    """Whether two sources may have a row in common, as far as their names tell."""
    if (one.source, one.config, one.revision) != (other.source, other.config, other.revision):
        return False
    (split, start, stop), (other_split, other_start, other_stop) = parse_split(one.split), parse_split(other.split)
    if split is not None and other_split is not None and split != other_split:
        return False
    return start < (math.inf if other_stop is None else other_stop) and other_start < (
        math.inf if stop is None else stop
    )
