"""What is known of a run's stages: their checkpoints, the same for all ranks, and what run.json says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bigtrain.checkpoint import AHEAD, Checkpoint, complete, discard_incomplete, newest, set_aside, step_of
from bigtrain.config.origin import damaged_ones, put_back
from bigtrain.config.restart import restart_choice
from bigtrain.config.schema import StageConfig
from bigtrain.data.prepare import StageData
from bigtrain.data.store import Store, content_of
from bigtrain.disk import megabytes, told_as
from bigtrain.distributed.collectives import from_first, read_together
from bigtrain.distributed.world import World
from bigtrain.errors import CheckpointError, ConfigError, DamagedError, DataError
from bigtrain.observability.events import CheckpointAhead, CheckpointDamaged, CheckpointsPlanned, DropoutDraws
from bigtrain.observability.stream import Stream
from bigtrain.pipeline.build import StageBuilder
from bigtrain.run_folder import CANNOT_BEGIN, RunFolder
from bigtrain.state import Shape
from bigtrain.training.run import StageRun


class History:
    """Of the stages of one run, as one rank sees it."""

    def __init__(self, stages: Sequence[StageConfig], world: World, folder: RunFolder, stream: Stream):
        self._stages = stages
        self._world = world
        self._folder = folder
        self._stream = stream

    def newest(self, stage: str, weights_only: bool = False) -> Path | None:
        """The newest complete checkpoint of a stage that rank 0 sees: a shared disk may show the others less."""
        choice = [newest(self._folder.checkpoints(stage), weights_only)]
        dist.broadcast_object_list(choice, src=0)
        return choice[0]

    def open(self, folder: Path, weights_only: bool = False) -> Checkpoint:
        """Open a checkpoint; collective. Raises DamagedError on all ranks if one of them cannot."""
        opened: list[Checkpoint] = []
        read_together(lambda: opened.append(Checkpoint(folder, weights_only)))
        return opened[0]

    def origin(self) -> Checkpoint:
        """The checkpoint of another run that this one starts from; collective. Raises CheckpointError on all ranks."""

        def checkpoint() -> str:
            origin = self._folder.metadata().get("origin")
            if origin is None:
                raise CheckpointError(
                    f"{self._folder.path / 'run.json'} does not say any more from which checkpoint of model.from_run "
                    "this run has started; give it another `name`."
                )
            return origin["checkpoint"]

        folder = Path(from_first(checkpoint))
        opened: list[Checkpoint] = []
        read_together(lambda: opened.append(open_origin(folder)))
        return opened[0]

    def set_aside(self, damaged: DamagedError) -> None:
        """Let no rank find a damaged checkpoint again; collective. Finished stages that it was of are so no more."""
        if self._world.rank == 0:
            try:
                aside = set_aside(damaged.folder)
            except OSError as error:
                raise CheckpointError(
                    f"{damaged}. It cannot be set aside ({error.strerror}): remove it, and the run goes on from the "
                    "checkpoint before it."
                ) from None
            self._stream.emit(CheckpointDamaged(reason=str(damaged), set_aside=str(aside)))
        dist.barrier()

    def tell_of_dropout(self, builder: StageBuilder, probabilities: dict[str, float], resumed: bool) -> None:
        """Say on what a stage's dropout draws depend, and after a resume whether they differ from here on."""
        if self._world.rank != 0:
            return
        stage = builder.stage
        now = {
            "number of processes": self._world.size,
            "engine": builder.parallel.engine,
            "micro-batch": builder.micro_batch_size,
        }
        before = self._folder.metadata()["stages"].get(stage.name, {}).get("layout", now)
        self._folder.record(stage.name, layout=now)
        if not probabilities:
            return
        named = ", ".join(f"{key} {value:g}" for key, value in probabilities.items())
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
        if resumed and changed:
            text = f"{named}: other draws from here on than without the change ({', '.join(changed)})"
        else:
            text = f"{named}: its draws depend on the number of processes, the engine and the micro-batch"
        self._stream.emit(DropoutDraws(stage=stage.name, text=text, probabilities=probabilities))

    def check_begins(self, stage: StageConfig) -> None:
        """Raises CheckpointError, on all ranks, when a stage that has no checkpoint to go on from would begin at its
        first step although it has been trained; collective."""

        def check() -> None:
            if self._folder.has_state(stage.name):
                raise CheckpointError(lost(self._stages, self._folder, stage))

        from_first(check)

    def plan(self, stage: StageConfig, shapes: dict[str, Shape], done: int) -> None:
        """Tell how large checkpoints will be and how much room there is, and set those aside that are ahead of a run
        that has `done` steps of the stage; collective.

        Raises CheckpointError if there is not room for one.
        """

        def plan() -> None:
            root = self._folder.checkpoints(stage.name)
            with told_as(CheckpointError, f"the folder of checkpoints {root}", CANNOT_BEGIN):
                root.mkdir(parents=True, exist_ok=True)
                discard_incomplete(root)
            for ahead in (folder for folder in complete(root) if (step_of(folder) or 0) > done):
                aside = set_aside(ahead, AHEAD)
                self._stream.emit(CheckpointAhead(stage=stage.name, done=done, set_aside=str(aside)))
            size, free = 4 * stage.optimizer.elements(shapes), shutil.disk_usage(root).free
            self._stream.emit(CheckpointsPlanned(bytes=size, free_bytes=free, keep=stage.checkpoint.keep))
            if size > free:
                raise CheckpointError(
                    f"a checkpoint of stage {stage.name} takes {megabytes(size)}, and the disk of {root} has "
                    f"{megabytes(free)} free: the run could not save even once. Make room there, or set `output` to a "
                    "folder on another disk."
                )

        from_first(plan)

    def way_on(self, stage: StageConfig, precision: str) -> str:
        """What can be done about numbers that are not finite, with commands that work as they stand; collective."""
        name, optimizer, schedule = stage.name, stage.optimizer, stage.schedule
        lower = f"stages.{name}.optimizer.lr={min(optimizer.lr / 10, 1e-3):.3g}"
        if optimizer.max_grad_norm is None:
            lower += f" stages.{name}.optimizer.max_grad_norm=1.0"
        if schedule.warmup_steps is None and not schedule.warmup_ratio:
            lower += f" stages.{name}.schedule.warmup_ratio=0.1"
        whole, kept = self.newest(name), from_first(lambda: (self._folder.has_state(name), self._folder.is_kept()))
        if kept[0]:
            return (
                f"{f'{whole} is intact, but' if whole else 'Started again as it is,'} the run would come to the same "
                f"end. Train the stage anew with gentler values: `bigtrain run CONFIG {lower} --restart {name}` (what "
                f"it has so far is kept as {name}.1 or the next free number)."
            )
        also = ", or precision=fp32" if not kept[1] and precision != "fp32" else ""
        return (
            f"Nothing of stage {name} has been saved, so its values may change: start the run again with gentler ones, "
            f"like {lower}{also}."
        )

    def is_over(self, stage: StageConfig) -> bool:
        """Whether a stage was finished once and its last checkpoint, that is gone, is needed no more; collective.

        Raises CheckpointError when it is needed: by a stage that starts from it, or for the stage's export.
        """

        def is_over() -> bool:
            if not self._folder.metadata()["stages"].get(stage.name, {}).get("finished"):
                return False
            waiting = [
                f"stage {later.name} starts from {stage.name}"
                for later in self._stages
                if later.from_stage == stage.name and not self._folder.has_state(later.name)
            ]
            if stage.export and not self._folder.is_exported(stage.name):
                waiting.append(f"stage {stage.name} is still to be exported (`export: false` goes without)")
            if waiting:
                raise CheckpointError(f"{', and '.join(waiting)}, but {lost(self._stages, self._folder, stage)}")
            return True

        return from_first(is_over)

    def check_same_data(self, stage: StageConfig, data: StageData) -> None:
        """Raises DataError when a stage that has begun would go on with other documents than it began with."""
        known = self._folder.metadata()["stages"].get(stage.name, {})
        of_its_own = stage.evaluate is not None and stage.evaluate.data is not None
        for name, key, stores in (
            ("data", "data", data.train),
            ("held_out", "evaluate.data" if of_its_own else "data", data.held_out),
        ):
            for before, store in zip(known.get(name, []), stores, strict=False):
                if not _is_same(before, store):
                    raise DataError(
                        f"stages.{stage.name}.{key}: {store.manifest['source']} has changed since this stage began "
                        f"(it was {before['store']}, it is {store.folder}). Put the documents back to continue, "
                        f"or begin the stage anew with `--restart {stage.name}`."
                    )

    def begins_imported(self, stage: StageConfig, run: StageRun) -> str | None:
        """The folder that `bigtrain import` has taken a stage's first checkpoint from, until the stage has begun here.

        Raises CheckpointError when that checkpoint is gone, ConfigError when it leaves nothing to train.
        """
        known = self._folder.metadata()["stages"].get(stage.name, {})
        imported = known.get("imported")
        if imported is None or known.get("finished"):
            return None
        if run.done == 0 and "data" not in known:
            raise CheckpointError(
                f"stage {stage.name} goes on from {imported}, but {self._folder.checkpoints(stage.name)} has nothing "
                f"of it any more. Import it again, or begin the stage anew with `--restart {stage.name}`."
            )
        if "data" in known:
            return None
        if run.done >= run.steps:
            raise ConfigError(
                f"stages.{stage.name}: it has {run.steps} steps, and {imported}, from which it was imported, has done "
                f"{run.done}. Begin it anew with `--restart {stage.name}`, or import into a run whose stage is longer."
            )
        return imported


def lost(stages: Sequence[StageConfig], folder: RunFolder, stage: StageConfig) -> str:
    """What is left of a stage that cannot go on, and what can be done."""
    root, name = folder.checkpoints(stage.name), stage.name
    weights = newest(root, weights_only=True)
    aside = sorted(entry.name for entry in root.iterdir() if step_of(entry) is None) if root.is_dir() else []
    has = ([f"the weights of step {step_of(weights)}"] if weights else []) + aside
    damaged = damaged_ones(root)
    lines = [
        f"stage {name} has been trained, and has no checkpoint left to go on from: {root} has "
        f"{' and '.join(has) or 'none'}. Nothing was begun in its place. Choose:",
        f"  {put_back(damaged[-1]) if damaged else f'put a checkpoint back into {root}'}; the run goes on from there.",
        restart_choice(stages, name),
    ]
    if weights:
        lines.append(
            f"  another `name`, with `model: {{from_run: {weights}}}` and no `tokenizer`: a run of its own that "
            "starts from these weights, with a new optimizer, at its first step."
        )
    return "\n".join(lines)


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


def _is_same(before: dict[str, Any], store: Store) -> bool:
    """Whether a store holds what run.json knows of it, also when it was made in another way."""
    if "content" not in before:  # of an earlier version
        manifest = Path(before["store"]) / "manifest.json"
        before = before | ({"content": content_of(json.loads(manifest.read_text()))} if manifest.is_file() else {})
    return before["fingerprint"] == store.manifest["fingerprint"] or before.get("content") == store.content
