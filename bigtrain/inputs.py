"""What a run's file names: opened before anything is written, and kept with the run once it has begun."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint import Checkpoint, complete, newest
from bigtrain.checkpoint.format import step_folder
from bigtrain.config import RunConfig, load_config
from bigtrain.config.files import literal
from bigtrain.config.origin import Origin
from bigtrain.data.sources import COLUMNS, documents
from bigtrain.data.tokenizer import load_tokenizer, num_ids
from bigtrain.disk import make_once
from bigtrain.errors import CheckpointError, ConfigError, DamagedError
from bigtrain.inference.generation import lineage
from bigtrain.models.causal_lm import keep_config, kept_config, model_config
from bigtrain.models.trial import try_architecture
from bigtrain.pipeline.build import open_tokenizer
from bigtrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def try_inputs(config: RunConfig) -> dict[str, Any] | None:
    """Open all that the run's file names; returns what is to be remembered of the other run that it starts from.

    Raises DataError for a source whose first document cannot be read, ConfigError for a model or tokenizer that
    cannot be opened or do not fit each other, CheckpointError for a checkpoint that is damaged or does not fit.
    """
    for stage in config.stages:
        held_out = (stage.evaluate.data if stage.evaluate else None) or []
        for source in (*stage.data, *held_out):
            next(documents(source, COLUMNS[stage.task]))
    empty = try_architecture(
        config.model,
        _num_ids(config),
        attention=config.attention,
        needs_document_mask=config.needs_document_mask,
        added_tokens=config.adds_tokens,
        longest=max(stage.sequence_length for stage in config.stages),
    )
    return None if config.model.from_run is None else _try_origin(config.model.from_run, empty)


def _num_ids(config: RunConfig) -> int:
    """How many ids the run's tokenizer has; at most, of one that is to be trained: a small text gives fewer."""
    if config.given_tokenizer is not None:
        return num_ids(open_tokenizer(config))
    assert config.tokenizer is not None and config.tokenizer.train is not None
    given = (config.model.from_config or {}).get("vocab_size")
    return given or config.tokenizer.train.vocab_size + len(config.tokenizer.add_tokens)


def _try_origin(from_run: str, empty: PreTrainedModel) -> dict[str, Any]:
    """run, stage, step and checkpoint; tasks: of the stages that its weights have gone through."""
    origin = Origin.of(from_run)
    if (problem := origin.problem()) is not None:
        raise ConfigError(f"model.from_run: {problem}")
    root = origin.checkpoints
    folder = newest(root, weights_only=True) if origin.step is None else step_folder(root, origin.step)
    if folder is None:
        raise ConfigError(f"model.from_run: {root} has no whole checkpoint any more.")
    with closing(open_origin(folder)) as checkpoint:
        checkpoint.check_fit(empty)
        step = checkpoint.step
    return {
        "run": str(origin.folder),
        "stage": origin.stage,
        "step": step,
        "checkpoint": str(folder),
        "tasks": _tasks(origin),
    }


def _tasks(origin: Origin) -> list[str]:
    run, stages = load_config(origin.folder / "config.yaml"), RunFolder(origin.folder)
    name, _, _ = origin.stage.partition(".")  # of one that was set aside
    stage = next((stage for stage in run.stages if stage.name == name), None)
    if stage is None:
        raise ConfigError(f"model.from_run: {origin.folder / 'config.yaml'} has no stage {literal(name)} any more.")
    earlier = (stages.metadata().get("origin") or {}).get("tasks", [])
    return [*earlier, *(passed.task for passed in lineage(run, stage))]


def own_tokenizer(config: RunConfig, folder: RunFolder) -> Any:
    """The run's own; a run that begins takes the one that its file leads to, and keeps it."""

    def keep(empty: Path) -> None:
        tokenizer = open_tokenizer(config)
        tokenizer.save_pretrained(empty)
        (empty / "manifest.json").write_text(json.dumps({"from": tokenizer.name_or_path}) + "\n")

    return load_tokenizer(make_once(folder.tokenizer, keep))


def own_architecture(config: RunConfig, folder: RunFolder, tokenizer: Any) -> PreTrainedConfig:
    """The model's configuration. It is kept as well, for runs that start from this one. One that was taken from another
    run is read from here alone: that run may be gone."""

    def keep(empty: Path) -> None:
        keep_config(config.model, model_config(config.model, tokenizer, config.adds_tokens), empty)
        (empty / "manifest.json").write_text(json.dumps({"from": config.name}) + "\n")

    kept = make_once(folder.architecture, keep)
    if config.model.from_run is not None:
        return kept_config(kept)
    return model_config(config.model, tokenizer, config.adds_tokens)


def open_origin(folder: Path) -> Checkpoint:
    """The weights of another run's checkpoint. Raises CheckpointError for one that is damaged or gone: it is not this
    run's to set aside."""
    try:
        return Checkpoint(folder, weights_only=True)
    except DamagedError as damaged:
        raise CheckpointError(lost_origin(damaged)) from None


def lost_origin(damaged: DamagedError) -> str:
    """What is wrong with another run's checkpoint, and what can be done."""
    others = [str(other) for other in complete(damaged.folder.parent) if other != damaged.folder]
    gone = "" if damaged.folder.exists() else " Its run has removed it, as it keeps only its newest ones."
    way_on = f"name another one, like model.from_run={others[-1]}" if others else "there is no other one beside it"
    return f"model.from_run: {damaged}.{gone} That run is left as it is; {way_on}."
