"""Options without effect. Given is what differs from its default: resolved files have every key."""

from __future__ import annotations

from collections.abc import Iterator

from bigtrain.config.files import KeyPath
from bigtrain.config.schema import Run, Section, Stage


def without_effect(run: Run) -> Iterator[tuple[KeyPath, str]]:
    """(path of the key, message) for every option that is given and changes nothing."""
    for i, stage in enumerate(run.stages):
        yield from ((("stages", i, *at), message) for at, message in _of_stage(stage))
    yield from _of_profile(run)
    for name in type(run.stages[0].parallel).model_fields:
        if _given(run.parallel, name) and all(getattr(stage.parallel, name) is not None for stage in run.stages):
            yield ("parallel", name), "has no effect, as every stage has its own; remove it, or those of the stages."


def known_steps(stage: Stage) -> int | None:
    """Steps of a stage; None where they depend on its data."""
    return None if stage.epochs is not None else stage.sequences(0) // stage.global_batch_size


def _of_stage(stage: Stage) -> Iterator[tuple[KeyPath, str]]:
    schedule, checkpoint = stage.schedule, stage.checkpoint
    if schedule.name == "constant" and _given(schedule, "min_ratio"):
        yield ("schedule", "min_ratio"), "has no effect with `constant`; remove it, or choose cosine or linear."
    if schedule.warmup_steps is not None and _given(schedule, "warmup_ratio"):
        yield ("schedule", "warmup_ratio"), "has no effect beside warmup_steps; remove one of them."
    if checkpoint.keep_every is None and _given(checkpoint, "keep_weights_only"):
        yield ("checkpoint", "keep_weights_only"), "is about what keep_every keeps; add keep_every, or remove it."
    if checkpoint.every is None and _given(checkpoint, "keep_every"):
        yield ("checkpoint", "keep_every"), "needs checkpoints to keep; add `every`, or remove it."
    if stage.task == "pretrain" and _given(stage, "max_cut_answers"):
        yield ("max_cut_answers",), "is for task sft, where there are answers; remove it."
    if stage.task == "pretrain" and _given(stage, "long_conversations"):
        yield ("long_conversations",), "is for task sft, where there are conversations; remove it."
    if stage.long_conversations == "drop" and _given(stage, "max_cut_answers"):
        yield ("max_cut_answers",), "has no effect with `long_conversations: drop`, which cuts no answer; remove it."
    limits = stage.clean.repetition if stage.clean else None
    if limits is not None and all(value is None for name, value in limits if name != "min_words"):
        yield ("clean", "repetition"), "has no limit, so it drops nothing; give one, or remove it."
    if not stage.export and stage.prompts:
        yield ("prompts",), "the exported model answers them, and `export` is false; remove one of them."
    if len(stage.data) == 1 and stage.data[0].weight is not None:
        yield ("data", 0, "weight"), "is relative to other sources, and there is none; remove it."


def _of_profile(run: Run) -> Iterator[tuple[KeyPath, str]]:
    lengths = [known_steps(stage) for stage in run.stages]
    known = [length for length in lengths if length is not None]
    if run.profile is not None and len(known) == len(lengths) and run.profile.steps[0] > max(known):
        yield (
            ("profile", "steps"),
            f"begins at step {run.profile.steps[0]}, and no stage has more than {max(known)}; choose earlier steps.",
        )


def _given(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].get_default()
