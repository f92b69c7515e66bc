"""What of a job that another launcher is to start will not work there, and how much room it takes. Free of torch, but
for the size of a model."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.config.schema import RunConfig, StageConfig
from bigtrain.config.sources import kind_of
from bigtrain.launching.job import Job

if TYPE_CHECKING:
    from bigtrain.launching.dry_run import Size

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108 - folders that each machine has for itself
BYTES = 4  # of a weight or a moment in a checkpoint
GIB = 2**30


def warnings(job: Job, mounted: str | None = None) -> list[str]:
    """What will be missing on the nodes: data and output that they do not see, and rows for all ranks.

    mounted: the folder of the pods that relative paths start from, and outside of which nothing is shared; None: the
    nodes see what this machine sees.
    """
    run = job.loaded.run
    unseen = _outside(job, mounted) if mounted is not None else _node_local(job)
    return [*unseen, *(text for stage in run.stages for text in _without_rows(stage, job.total))]


def _without_rows(stage: StageConfig, ranks: int) -> Iterator[str]:
    rows = stage.global_batch_size
    if ranks > rows:
        yield (
            f"stages.{stage.name}.global_batch_size: {rows} rows a step for {ranks} processes: {ranks - rows} of them "
            f"have none, and compute rows that do not count. Start at most {rows}, or raise it."
        )


def _paths(run: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, path) of what the run writes and reads."""
    yield "output", run.output
    tokenizer = run.tokenizer.from_pretrained if run.tokenizer else None
    for key, name in (
        ("model.from_pretrained", run.model.from_pretrained),
        ("model.from_run", run.model.from_run),
        ("tokenizer.from_pretrained", tokenizer),
    ):
        if name is not None and (name.startswith(("/", ".")) or key == "model.from_run"):
            yield key, name
    for stage in run.stages:
        held_out = (stage.evaluate.data if stage.evaluate else None) or []
        for key, sources in (("data", stage.data), ("evaluate.data", held_out)):
            for i, source in enumerate(sources):
                if kind_of(source) in ("files", "saved"):
                    yield f"stages.{stage.name}.{key}.{i}.source", source.source


def _node_local(job: Job) -> Iterator[str]:
    if job.nodes == 1 and job.launcher != "slurm":
        return
    local = {*NODE_LOCAL, tempfile.gettempdir()}
    for key, path in [*_paths(job.loaded.run), ("the run's file", job.config)]:
        absolute = Path(path).absolute()
        if found := [folder for folder in sorted(local) if absolute.is_relative_to(folder)]:
            yield (
                f"{key}: {path} lies in {found[0]}, which each node has for itself: the nodes will not see what is "
                "there. Put it on a disk that all of them share."
            )


def _outside(job: Job, mounted: str) -> Iterator[str]:
    for key, path in _paths(job.loaded.run):
        place = os.path.normpath(os.path.join(mounted, path))  # noqa: PTH118 - a path in a pod
        if place != mounted and not place.startswith(f"{mounted}/"):
            yield (
                f"{key}: {path} is {place} in the pods, which share {mounted} alone: they will not see it. Copy it to "
                f"the claim, and write its path as one below {mounted}."
            )


@dataclass(frozen=True)
class Room:
    """What a run needs, in GiB, and in words what that is: on the shared disk, and in the memory of a node beside what
    its processes themselves take. disk is None where the size of the model is not known here."""

    disk: int | None
    told: str
    memory: int


def room(job: Job) -> Room:
    """Checkpoints that are kept and the one being written, exports, and token stores of what is trained on."""
    from bigtrain.launching.dry_run import model_size

    run = job.loaded.run
    size = model_size(run)
    if isinstance(size, str):
        return Room(None, f"A guess, as the model's size is {' '.join(size.split())}.", 0)
    whole = max(_checkpoint_bytes(stage, size) for stage in run.stages)
    checkpoints = sum(_kept(stage, size) for stage in run.stages)
    exports = sum(size.parameters * (4 if run.precision == "fp32" else 2) for stage in run.stages if stage.export)
    parts = [f"checkpoints {_gib(checkpoints)} GiB"] + ([f"exports {_gib(exports)} GiB"] if exports else [])
    tokens = [(stage.num_steps or 0) * stage.global_batch_size * stage.sequence_length for stage in run.stages]
    stores = sum(tokens) * 4
    parts.append(f"token stores at most {_gib(stores)} GiB" if all(tokens) else "token stores not counted")
    copies = whole if any(stage.checkpoint.asynchronous for stage in run.stages) else 0
    told = f"{', '.join(parts)}, and a fifth more."
    return Room(_gib(1.2 * (checkpoints + exports + stores)), told[0].upper() + told[1:], _gib(copies / job.nodes))


def _checkpoint_bytes(stage: StageConfig, size: Size) -> int:
    return BYTES * stage.optimizer.elements(size.trained(stage))


def _kept(stage: StageConfig, size: Size) -> int:
    settings = stage.checkpoint
    whole = _checkpoint_bytes(stage, size)
    steps = stage.num_steps
    older = 0 if settings.keep_every is None or steps is None else steps // settings.keep_every
    trained = sum(map(math.prod, size.trained(stage).values()))
    frozen = BYTES * (size.parameters - trained)  # once
    return (settings.keep + 1) * whole + older * (BYTES * trained if settings.keep_weights_only else whole) + frozen


def _gib(size: float) -> int:
    return math.ceil(size / GIB)
