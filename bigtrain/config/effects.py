"""Options without effect. Given is what differs from its default: resolved files have every key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigtrain.config.core import Section
from bigtrain.config.files import KeyPath
from bigtrain.config.schema import RunConfig, StageConfig

# Key of a stage, when it has no effect although it is given, what is said then.
OF_STAGES: tuple[tuple[KeyPath, Callable[[StageConfig], bool], str], ...] = (
    (
        ("checkpoint", "keep_weights_only"),
        lambda stage: stage.checkpoint.keep_every is None,
        "is about what keep_every keeps; add keep_every, or remove it.",
    ),
    (
        ("checkpoint", "keep_every"),
        lambda stage: stage.checkpoint.every is None,
        "needs checkpoints to keep; add `every`, or remove it.",
    ),
    (
        ("clean", "repetition"),
        lambda stage: all(value is None for name, value in stage.clean.repetition if name != "min_words"),  # type: ignore[union-attr]
        "has no limit, so it drops nothing; give one, or remove it.",
    ),
    (
        ("prompts",),
        lambda stage: not stage.export,
        "the exported model answers them, and `export` is false; remove one of them.",
    ),
    (
        ("data", 0, "weight"),
        lambda stage: len(stage.data) == 1,
        "is relative to other sources, and there is none; remove it.",
    ),
)


def without_effect(run: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    """(path of the key, message) for every option that is given and changes nothing."""
    for i, stage in enumerate(run.stages):
        for at, has_none, message in OF_STAGES:
            if _given(stage, at) and has_none(stage):
                yield ("stages", i, *at), message
    if run.deterministic and run.parallel.device == "cpu":
        yield ("deterministic",), "is for GPUs; with parallel.device: cpu it is so anyway. Remove it."
    yield from _of_profile(run)
    for name in type(run.stages[0].parallel).model_fields:
        if _given(run, ("parallel", name)) and all(getattr(stage.parallel, name) is not None for stage in run.stages):
            yield ("parallel", name), "has no effect, as every stage has its own; remove it, or those of the stages."


def _of_profile(run: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    lengths = [stage.num_steps for stage in run.stages]
    known = [length for length in lengths if length is not None]
    if run.profile is not None and len(known) == len(lengths) and run.profile.steps[0] > max(known):
        yield (
            ("profile", "steps"),
            f"begins at step {run.profile.steps[0]}, and no stage has more than {max(known)}; choose earlier steps.",
        )


def _given(section: Section, at: KeyPath) -> bool:
    value: Any = section
    for key in at:
        if value is None:
            return False
        above, value = value, value[key] if isinstance(key, int) else getattr(value, key)
    return value != type(above).model_fields[at[-1]].get_default()
