"""Checks before anything is written: all that the run's file names can be opened, and the ranks can do what it asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint import newest
from bigtrain.checkpoint.format import step_folder
from bigtrain.config import RunConfig, load_config
from bigtrain.config.files import literal
from bigtrain.config.origin import Origin
from bigtrain.config.parallel import check_replicas
from bigtrain.config.schema import StageConfig
from bigtrain.data.prepare import StageData
from bigtrain.data.sources import documents
from bigtrain.data.tokenizer import num_ids
from bigtrain.distributed.world import World
from bigtrain.errors import ConfigError
from bigtrain.models.freeze import frozen, parameter_names
from bigtrain.models.kinds import new_head
from bigtrain.models.trial import try_architecture
from bigtrain.pipeline.build import open_tokenizer
from bigtrain.pipeline.history import open_origin
from bigtrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_execution(config: RunConfig, world: World) -> None:
    """Raises ConfigError for an attention that this rank's device lacks, and a number of ranks that cannot be divided
    into the replicas."""
    check_replicas(config, world.size)
    if config.attention in ("flash", "flex") and world.device.type == "cpu":
        raise ConfigError(f"attention: {config.attention} needs a GPU, and this run computes on the CPU; use sdpa.")


def check_schedules(stages: Sequence[StageConfig], data: Mapping[str, StageData]) -> None:
    """Raises ConfigError for a schedule that does not fit into its stage, whose length depends on its data."""
    for stage in stages:
        steps = -(-data[stage.name].samples(stage) // stage.global_batch_size)
        for (key,), told in stage.schedule.too_long(steps):
            raise ConfigError(f"stages.{stage.name}.schedule.{key}: {told}")


def try_inputs(config: RunConfig) -> dict[str, Any] | None:
    """Open all that the run's file names. Returns what run.json keeps about `model.from_run`: see `_try_origin`.

    Raises DataError for a source whose first document cannot be read, ConfigError for a model or tokenizer that
    cannot be opened or do not fit each other and for a `freeze` that does not fit the model, CheckpointError for a
    checkpoint that is damaged or does not fit.
    """
    for stage in config.stages:
        held_out = (stage.evaluate.data if stage.evaluate else None) or []
        for source in (*stage.data, *held_out):
            next(documents(source, stage.task.columns))
    models: dict[str, PreTrainedModel] = {}
    for stage in config.stages:
        task = stage.task.model_dump_json()
        models[task] = models.get(task) or try_architecture(
            config.model,
            _num_ids(config),
            attention=config.attention,
            needs_document_mask=config.needs_document_mask,
            added_tokens=config.adds_tokens,
            longest=max(stage.sequence_length for stage in config.stages),
            task=stage.task,
        )
        frozen(parameter_names(models[task]), stage.freeze, f"stages.{stage.name}.freeze")
    empty = next(iter(models.values()))
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
        checkpoint.check_fit(empty, new_head(empty))
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
    stage = run.stage(name, f"model.from_run: {origin.folder / 'config.yaml'} has no stage {literal(name)} any more")
    earlier = (stages.metadata().get("origin") or {}).get("tasks", [])
    return [*earlier, *(passed.task.name for passed in run.lineage(stage))]
