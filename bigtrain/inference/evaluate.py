"""How well a model predicts text that it was not trained on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from bigtrain.config.schema import EvaluateConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig, StageConfig
from bigtrain.data.batches import held_out_batches
from bigtrain.data.prepare import held_out_parts, prepare_stage
from bigtrain.data.store import Store, open_store
from bigtrain.disk import is_made, scratch
from bigtrain.distributed.world import World, joined
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.inference.documents import listing, sums_by_document, write_documents
from bigtrain.inference.generate import positions
from bigtrain.inference.load import LoadedModel, load_model
from bigtrain.inference.places import RunPlace, locate
from bigtrain.masking import MASK
from bigtrain.parallel import engine
from bigtrain.parallel.task_module import TaskModule
from bigtrain.run_folder import RunFolder
from bigtrain.tasks import TASKS

LONGEST_WINDOW = 4096  # tokens, of a model with more positions when nothing is said
MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per target. accuracy: part of the targets that were the likeliest token. targets: their number.
    what: which model on what, in words."""

    loss: float
    perplexity: float
    accuracy: float
    targets: int
    what: str


def evaluate(
    where: str | Path,
    data: list[SourceConfig] | None = None,
    *,
    sequence_length: int | None = None,
    sequences: int | None = None,
    micro_batch_size: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    documents: str | Path | None = None,
) -> Evaluation:
    """Evaluate what `where` names (see `locate`): in this process alone, or with all ranks of a group that is there.

    Without `data`: a run's checkpoint on the held-out documents of its stage, as the run itself evaluates.
    With `data`: every token of these documents, in windows.

    sequence_length: of the windows, in tokens; None: the stage's, or the model's positions (at most 4096).
    sequences: at most so many; None: the stage's `evaluate.sequences`, or all. micro_batch_size: sequences that go
    through the model at once; dtype: fp32, bf16 or fp16; both as trained if None. documents: a file to write a line of
    JSON for each document to, with its place, beginning, targets and loss (see `write_documents`).

    Raises ConfigError if there is nothing to evaluate on, DataError for data that cannot be read.
    """
    place = locate(where)
    file = None if documents is None else Path(documents)
    with _world(device) as world, listing(file, world) as out:
        opened = load_model(
            place.checkpoint if isinstance(place, RunPlace) else where, dtype=dtype, device=world.device
        )
        if data is None:
            if not isinstance(place, RunPlace):
                raise ConfigError(f"{place} is no run, so it has no held-out documents of its own; give data.")
            if sequence_length is not None:
                raise ConfigError("sequence_length: a run's held-out sequences are as long as its stage says.")
            stage = _evaluating(place)
            assert stage.evaluate is not None
            recorded = _recorded(place, stage)
            if file is not None or not recorded:
                _check_readable(stage)
            stores = recorded or prepare_stage(place.run, stage, TASKS[stage.task](), opened.tokenizer).held_out
            limit = stage.evaluate.sequences if sequences is None else sequences
            micro = micro_batch_size or place.run.parallel_of(stage).micro_batch_size
            on = "its held-out documents"
            return _evaluated(opened, place.run, stage, stores, limit, micro, world, on, file, out)
        with scratch("evaluate-") as folder:
            run = _run_over(data, _length(opened, sequence_length), world.size, folder)
            stage = run.stages[0]
            stores = prepare_stage(run, stage, TASKS[stage.task](), opened.tokenizer).held_out
            micro = micro_batch_size or max(1, MICRO_BATCH_TOKENS // stage.sequence_length)
            names = ", ".join(source.source for source in data)
            return _evaluated(opened, run, stage, stores, sequences, micro, world, names, file, out)


def _recorded(place: RunPlace, stage: StageConfig) -> list[Store]:
    """The held-out stores that the run itself evaluates on; empty if it has none, or they are not there any more."""
    known = RunFolder(place.folder).metadata().get("stages", {}).get(stage.name, {}).get("held_out", [])
    folders = [Path(place.run.output) / "stores" / Path(store["store"]).name for store in known]
    if not all(map(is_made, folders)):
        return []
    document_mask = not stage.cross_document_attention
    return [open_store(folder, stage.sequence_length, document_mask) for folder in folders]


def _check_readable(stage: StageConfig) -> None:
    """Raises ConfigError for a held-out source that only opens with a secret: the run's folder has none."""
    assert stage.evaluate is not None
    for source in stage.evaluate.data or stage.data:
        if MASK in source.source:
            raise ConfigError(
                f"{source.source}: the run's folder keeps no secrets, so its held-out documents cannot be read again; "
                "name them with --data."
            )


def _evaluated(
    opened: LoadedModel,
    run: RunConfig,
    stage: StageConfig,
    stores: list[Store],
    sequences: int | None,
    micro: int,
    world: World,
    on: str,
    file: Path | None,
    out: TextIO | None,
) -> Evaluation:
    """file: whether documents are listed; out: where, on the rank that writes."""
    task = TASKS[stage.task]()
    batches = held_out_batches(stores, stage.global_batch_size, sequences, world.rank, world.size, file is not None)
    if file is None:
        sums = engine.evaluate(TaskModule(opened.model, task, world.device), batches, micro, world.size, world.device)
    else:
        each = sums_by_document(opened.model, task, stores, batches, micro, world)
        sums = {name: float(values.sum()) for name, values in each.items()}
        if out is not None:
            write_documents(out, held_out_parts(run, stage), stores, task, opened.tokenizer, each)
    if not sums["targets"]:
        raise ConfigError(f"{on}: nothing in the first {sequences} sequences is to be predicted; take more.")
    loss = sums["loss"] / sums["targets"]
    if not math.isfinite(loss):
        raise BigtrainError(f"{opened.what}, on {on}: the loss is {loss}; the model computes what is not finite.")
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=sums["correct"] / sums["targets"],
        targets=int(sums["targets"]),
        what=f"{opened.what}, on {on}",
    )


def _evaluating(place: RunPlace) -> StageConfig:
    """The stage as it evaluates; one that holds documents out without looking at them does so now."""
    stage = place.stage
    if stage.evaluate is not None:
        return stage
    if not stage.held_out:
        raise ConfigError(f"{place}: the stage has no held-out documents (`evaluate` or `held_out`); give data.")
    return stage.model_copy(update={"evaluate": EvaluateConfig()})


def _length(opened: LoadedModel, asked: int | None) -> int:
    limit = positions(opened.model)
    if asked is not None:
        if limit is not None and asked > limit:
            raise ConfigError(f"sequence_length: {asked} is more than the {limit} positions of {opened.what}.")
        return asked
    if opened.trained is not None:
        return opened.trained.sequence_length
    return min(limit or LONGEST_WINDOW, LONGEST_WINDOW)


def _run_over(data: list[SourceConfig], sequence_length: int, world_size: int, folder: Path) -> RunConfig:
    """A run's file that says to evaluate on all documents of `data`, with its token stores in `folder`.

    It would train on the same documents, so that each store is made once."""
    stage = StageConfig(
        name="evaluate",
        task="pretrain",
        data=data,
        sequence_length=sequence_length,
        global_batch_size=max(1, MICRO_BATCH_TOKENS // sequence_length) * world_size,
        steps=1,
        optimizer=OptimizerConfig(lr=1.0),
        evaluate=EvaluateConfig(data=data),
    )
    return RunConfig(name="evaluate", output=str(folder), model=ModelConfig(), stages=[stage])


@contextmanager
def _world(device: str) -> Iterator[World]:
    """The process group that is there, or one of this process alone (or of what a launcher's environment names)."""
    if not dist.is_initialized():
        with joined(device, "fp32") as world:  # fp32: whatever the weights' dtype, any device can evaluate
            yield world
        return
    nccl = dist.get_backend() == "nccl"
    there = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)), there)
