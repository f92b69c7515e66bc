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

from bigtrain.config.schema import SourceConfig, StageConfig
from bigtrain.data.batches import held_out_batches
from bigtrain.data.prepare import SourcePart, held_out_parts, prepare_held_out, prepare_parts
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
from bigtrain.tasks import Task
from bigtrain.tasks.pretrain import Pretrain

LONGEST_WINDOW = 4096  # tokens, of a model with more positions when nothing is said
MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Evaluation:
    """metrics: of the task, like `loss` (nats per target), `accuracy`, and `targets` (their number). what: which model
    on what, in words."""

    metrics: dict[str, float]
    what: str

    @property
    def loss(self) -> float:
        return self.metrics["loss"]


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
        if data is not None:
            with scratch("evaluate-") as stores:
                parts = [SourcePart(source, stores) for source in data]
                length = _length(opened, sequence_length)
                on = _every_token(parts, opened, length, sequences, micro_batch_size, world.size)
                return _evaluated(opened, on, world, file is not None, out)
        if not isinstance(place, RunPlace):
            raise ConfigError(f"{place} is no run, so it has no held-out documents of its own; give data.")
        if sequence_length is not None:
            raise ConfigError("sequence_length: a run's held-out sequences are as long as its stage says.")
        on = _held_out(place, opened, sequences, micro_batch_size, listed=file is not None)
        return _evaluated(opened, on, world, file is not None, out)


@dataclass(frozen=True)
class _Data:
    """What is evaluated on. stores: of `parts`. rows: sequences of a batch, over all ranks; micro: that go through the
    model at once. sequences: the first so many, None: all. what: in words."""

    task: Task
    parts: list[SourcePart]
    stores: list[Store]
    rows: int
    micro: int
    sequences: int | None
    what: str


def _every_token(
    parts: list[SourcePart], opened: LoadedModel, length: int, sequences: int | None, micro: int | None, world_size: int
) -> _Data:
    """All documents of `parts`, in windows of `length` tokens; for a model of another task, rows of that task."""
    trained = opened.trained
    task = trained.task if trained is not None and not trained.task.generates else Pretrain()
    together = max(1, MICRO_BATCH_TOKENS // length)
    return _Data(
        task,
        parts,
        prepare_parts(parts, task, opened.tokenizer, length),
        rows=together * world_size,
        micro=micro or together,
        sequences=sequences,
        what=", ".join(part.source.source for part in parts),
    )


def _held_out(place: RunPlace, opened: LoadedModel, sequences: int | None, micro: int | None, listed: bool) -> _Data:
    """The held-out documents of a run's stage, also of one that holds documents out and never evaluates on them.

    listed: whether the documents themselves are read as well. Raises ConfigError if there are none, or no longer.
    """
    run, stage = place.run, place.stage
    if stage.evaluate is None and not stage.held_out:
        raise ConfigError(f"{place}: the stage has no held-out documents (`evaluate` or `held_out`); give data.")
    task = stage.task
    stores = _recorded(place, stage)
    if listed or not stores:
        _check_readable(stage)
    stores = stores or prepare_held_out(stage, task, opened.tokenizer, stores=run.stores, seed=run.seed)
    if sequences is None and stage.evaluate is not None:
        sequences = stage.evaluate.sequences
    return _Data(
        task,
        held_out_parts(stage, run.stores),
        stores,
        rows=stage.global_batch_size,
        micro=micro or run.parallel_of(stage).micro_batch_size,
        sequences=sequences,
        what="its held-out documents",
    )


def _recorded(place: RunPlace, stage: StageConfig) -> list[Store]:
    """The held-out stores that the run itself evaluates on; empty if it has none, or they are not there any more."""
    known = RunFolder(place.folder).metadata().get("stages", {}).get(stage.name, {}).get("held_out", [])
    folders = [place.run.stores / Path(store["store"]).name for store in known]
    if not all(map(is_made, folders)):
        return []
    document_mask = not stage.cross_document_attention
    return [open_store(folder, stage.sequence_length, document_mask) for folder in folders]


def _check_readable(stage: StageConfig) -> None:
    """Raises ConfigError for a held-out source that only opens with a secret: the run's folder has none."""
    for source in (stage.evaluate.data if stage.evaluate else None) or stage.data:
        if MASK in source.source:
            raise ConfigError(
                f"{source.source}: the run's folder keeps no secrets, so its held-out documents cannot be read again; "
                "name them with --data."
            )


def _evaluated(opened: LoadedModel, on: _Data, world: World, listed: bool, out: TextIO | None) -> Evaluation:
    """listed: whether each document is told of; out: where, on the rank that writes."""
    batches = held_out_batches(on.stores, on.rows, on.sequences, world.rank, world.size, listed)
    if not listed:
        module = TaskModule(opened.model, on.task, world.device)
        sums = engine.evaluate(module, batches, on.micro, world.size, world.device)
    else:
        sums, each = sums_by_document(opened.model, on.task, on.stores, batches, on.micro, world)
        if out is not None:
            write_documents(out, on.parts, on.stores, on.task, opened.tokenizer, each)
    metrics = on.task.metrics(sums)
    if not metrics["targets"]:
        raise ConfigError(f"{on.what}: nothing in the first {on.sequences} sequences is to be predicted; take more.")
    if not math.isfinite(loss := metrics["loss"]):
        raise BigtrainError(f"{opened.what}, on {on.what}: the loss is {loss}; the model computes what is not finite.")
    return Evaluation(metrics, f"{opened.what}, on {on.what}")


def _length(opened: LoadedModel, asked: int | None) -> int:
    limit = positions(opened.model)
    if asked is not None:
        if limit is not None and asked > limit:
            raise ConfigError(f"sequence_length: {asked} is more than the {limit} positions of {opened.what}.")
        return asked
    if opened.trained is not None:
        return opened.trained.sequence_length
    return min(limit or LONGEST_WINDOW, LONGEST_WINDOW)


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
