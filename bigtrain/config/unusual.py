"""Values that are allowed and seldom meant: told at the start and by the dry run, with the usual range."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bigtrain.config.schema import OptimizerConfig, RunConfig, SourceConfig, StageConfig
from bigtrain.config.sources import parse_split


def unusual(run: RunConfig) -> list[str]:
    """A sentence for each unusual value, which begins with its key."""
    return [f"stages.{stage.name}.{text}" for stage in run.stages for text in _of_stage(run, stage)]


def _of_stage(run: RunConfig, stage: StageConfig) -> Iterator[str]:
    yield from (f"optimizer.{text}" for text in _of_optimizer(stage.optimizer))
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


def _of_optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    first, second = optimizer.betas
    if first > second:
        yield f"betas: [{first:g}, {second:g}] look swapped; the usual are [0.9, 0.95] to [0.9, 0.999]."
    for name, value, least, most, usual in (
        ("lr", optimizer.lr, 1e-8, 0.1, "1e-5 to 1e-2"),
        ("weight_decay", optimizer.weight_decay, 0.0, 1.0, "0 to 0.3"),
        ("eps", optimizer.eps, 0.0, 1e-2, "1e-10 to 1e-6"),
        ("max_grad_norm", optimizer.max_grad_norm, 1e-3, 1e3, "0.3 to 5"),
        ("ema", optimizer.ema, 0.9, 1.0, "0.99 to 0.9999"),
    ):
        if value is not None and not least <= value <= most:
            yield f"{name}: {value:g} is unusual; the usual range is {usual}."


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
