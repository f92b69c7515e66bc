"""The stages of a run in order, each fed by the one before; finished ones are skipped."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import bigtrain
from bigtrain.checkpoint import Checkpoint, Retention, Saver, newest, set_aside
from bigtrain.config import RunConfig
from bigtrain.config.environment import has_launcher
from bigtrain.config.rules import check_replicas
from bigtrain.config.schema import StageConfig
from bigtrain.config.unusual import unusual
from bigtrain.data.batches import Batches, Prefetched, held_out_batches
from bigtrain.data.prepare import StageData, counts
from bigtrain.data.store import Store
from bigtrain.disk import remove
from bigtrain.distributed.collectives import from_first
from bigtrain.distributed.consistency import check_same_folder, in_common
from bigtrain.distributed.world import World, joined
from bigtrain.errors import (
    BigtrainError,
    CheckpointError,
    ConfigError,
    DamagedError,
    NotFiniteError,
    ReportedError,
    shorten,
)
from bigtrain.history import History, lost
from bigtrain.inference.export import export
from bigtrain.inference.generate import generate
from bigtrain.inference.generation import left_out
from bigtrain.inference.load import LoadedModel, load_model
from bigtrain.inputs import lost_origin, own_architecture, own_tokenizer, try_inputs
from bigtrain.models.causal_lm import dropouts, empty_model, parameter_shapes
from bigtrain.models.families import plain_head
from bigtrain.models.weights import RandomWeights, pretrained_weights
from bigtrain.observability.profiler import Profiler
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Event, Files, Stream
from bigtrain.observability.summary import Summary
from bigtrain.observability.trackers import trackers
from bigtrain.parallel import build_engine
from bigtrain.parallel.dims import ParallelDims
from bigtrain.parallel.engine import Engine
from bigtrain.pipeline.build import prepare_stages
from bigtrain.pretrained import quiet
from bigtrain.resilience.requests import Requests, TimeLimit
from bigtrain.run_folder import RunFolder, ending_of
from bigtrain.state import StateReader
from bigtrain.tasks import TASKS, Task
from bigtrain.training.loop import train
from bigtrain.training.run import StageRun

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ANSWER_TOKENS = 64  # of an answer to one of a stage's `prompts`


def run_here(config: RunConfig, restart: str | None = None) -> int:
    """Run all stages with this process as one rank: that of the launcher's environment, or the only one.

    Returns the exit code: 0, or 75 if it was asked to stop and has saved.
    """
    quiet()
    folder, since, first = RunFolder.of(config), time.time(), os.environ.get("RANK", "0") == "0"
    try:
        code = _run(config, folder, restart)
        if first:
            folder.end("preempted" if code else "finished", None, since)
        return code
    except BaseException as error:
        if not has_launcher():  # which knows the rank that failed first
            how, reason = ending_of(error)
            if first:
                folder.end(how, reason, since)
            elif not isinstance(
                error, ReportedError | RuntimeError
            ):  # RuntimeError: torch's word for another rank that is gone
                folder.note(how, reason=reason, rank=int(os.environ["RANK"]))
        raise
    finally:
        folder.leave()


def _run(config: RunConfig, folder: RunFolder, restart: str | None) -> int:
    begun, stream = time.monotonic(), Stream()
    try:
        with joined(config.parallel.device, config.precision, in_common(config), config.deterministic) as world:
            check_execution(config, world)
            requests = Requests()
            if world.rank == 0:
                seconds = config.time_limit_seconds
                limit = None if seconds is None else TimeLimit(seconds, begun)
                requests = Requests(folder.save_request, limit, folder.check_there)
            stream = _open(config, folder, world, restart, requests)
            finished = _Pipeline(config, world, folder, stream, requests).run()
        if finished and world.rank == 0:  # on its own: nobody waits in a collective for it
            try:
                _finish(config, folder, stream)
            except DamagedError as damaged:
                aside = set_aside(damaged.folder)
                if newest(damaged.folder.parent) is not None:
                    way_on = "start the run again, and its stage goes on from the checkpoint before it."
                else:
                    [stage] = [s for s in config.stages if folder.checkpoints(s.name) == damaged.folder.parent]
                    way_on = lost(config, folder, stage)
                raise CheckpointError(f"{damaged}. It is set aside as {aside}: {way_on}") from None
            stream.emit("finished", folder=str(folder.path), seconds=time.monotonic() - begun)
        return 0 if finished else os.EX_TEMPFAIL
    finally:
        stream.close()  # what a run that failed has reported is not lost either


def check_execution(config: RunConfig, world: World) -> None:
    """Raises ConfigError for an attention that this rank's device does not have, and replicas that do not come out."""
    check_replicas(config, world.size)
    if config.attention in ("flash", "flex") and world.device.type == "cpu":
        raise ConfigError(f"attention: {config.attention} needs a GPU, and this run computes on the CPU; use sdpa.")


def check_schedules(config: RunConfig, data: dict[str, StageData]) -> None:
    """Raises ConfigError for a schedule that does not fit into its stage, whose length the data has told."""
    for stage in config.stages:
        steps = -(-data[stage.name].samples(stage) // stage.global_batch_size)
        for (key,), told in stage.schedule.too_long(steps):
            raise ConfigError(f"stages.{stage.name}.schedule.{key}: {told}")


def _open(config: RunConfig, folder: RunFolder, world: World, restart: str | None, requests: Requests) -> Stream:
    """Begin an attempt and see that all ranks find it; what rank 0 finds wrong ends all of them."""
    execution = {
        "world_size": world.size,
        "engine": config.parallel.engine,
        "precision": config.precision,
        "device": str(world.device),
    }

    told = unusual(config)

    def begin() -> tuple[int, str]:
        told.extend(left_out(config))
        origin = None if folder.is_kept() else try_inputs(config)
        return folder.begin(config, restart, origin, **execution), folder.newest_attempt() or ""

    number, attempt = from_first(begin)
    check_same_folder(folder, attempt)
    if world.rank != 0:
        return Stream()
    readers: list[Callable[[Event], None]] = [
        Files(folder.path),
        Progress(),
        Summary(config, folder),
        *trackers(config, folder.path),
        *requests.readers(),
    ]
    stream = Stream(readers, attempt=number)
    stream.emit(
        "started",
        version=bigtrain.__version__,
        folder=str(folder.path),
        attention=config.attention,
        chosen=world.chosen,
        **execution,
    )
    if world.network is not None:
        stream.emit("network", **asdict(world.network))
    for text in told:
        stream.emit("unusual", text=text)
    return stream


def _finish(config: RunConfig, folder: RunFolder, stream: Stream) -> None:
    """Export each stage that asks for it and let it answer its prompts."""
    for stage in config.stages:
        if not stage.export or folder.is_exported(stage.name):
            continue
        stream.emit("exporting", stage=stage.name, folder=str(folder.export(stage.name)))
        where = export(folder.path, stage.name)
        opened = load_model(str(folder.stage(stage.name))) if stage.prompts else None
        answers = [{"prompt": prompt, "answer": _answer(opened, prompt)} for prompt in stage.prompts if opened]
        steps = folder.metadata()["stages"][stage.name]["steps"]
        folder.record(stage.name, export=str(where), exported_step=steps, answers=answers)


def _answer(opened: LoadedModel, prompt: str) -> str:
    """To be read; a prompt that cannot be answered ends no run."""
    try:
        return generate(opened, prompt, max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    except ConfigError as error:
        return f"(none: {error})"


def stage_model(config: RunConfig, stage: StageConfig, model: PreTrainedConfig) -> Callable[..., PreTrainedModel]:
    """What builds the stage's model, empty."""
    checkpointing = config.parallel_of(stage).activation_checkpointing
    return partial(empty_model, model, attention=config.attention, activation_checkpointing=checkpointing)


def stage_dims(config: RunConfig, stage: StageConfig, world: World) -> ParallelDims:
    """How the ranks divide the stage's work."""
    parallel = config.parallel_of(stage)
    return ParallelDims.of(parallel.engine, world.rank, world.size, parallel.replicate)


def stage_engine(
    config: RunConfig, stage: StageConfig, task: Task, build: Callable[..., PreTrainedModel], world: World
) -> Engine:
    """The engine of the stage's model, whose weights are still to be loaded; collective."""
    parallel = config.parallel_of(stage)
    dims = stage_dims(config, stage, world)
    return build_engine(
        parallel.engine,
        build,
        task,
        dims=dims,
        precision=config.precision,
        compile=parallel.compile,
        micro_batch_size=min(parallel.micro_batch_size, -(-stage.global_batch_size // dims.data_size)),
        optimizer=stage.optimizer,
        seed=config.seed,
        device=world.device,
    )


class _Pipeline:
    """One rank's way through the stages."""

    def __init__(self, config: RunConfig, world: World, folder: RunFolder, stream: Stream, requests: Requests):
        self.requests = requests
        self.config = config
        self.world = world
        self.folder = folder
        self.stream = stream
        self.history = History(config, world, folder, stream)

    def run(self) -> bool:
        """Prepare all data first, so that what is wrong with it shows before anything is trained; then train.

        False if it was asked to stop, and has saved and marked its folder.
        """
        self.stream.emit("preparing", what="tokenizer")
        tokenizer = own_tokenizer(self.config, self.folder)
        model = own_architecture(self.config, self.folder, tokenizer)
        tasks = {stage.name: TASKS[stage.task]() for stage in self.config.stages}
        stores, seed = self.config.stores, self.config.seed
        data = prepare_stages(self.config.stages, tokenizer, stores=stores, seed=seed, stream=self.stream)
        from_first(lambda: check_schedules(self.config, data))
        with self.requests:
            while True:
                try:
                    return all(
                        self._stage(stage, tasks[stage.name], data[stage.name], model) for stage in self.config.stages
                    )
                except DamagedError as damaged:
                    self.history.set_aside(damaged)

    def _stage(self, stage: StageConfig, task: Task, data: StageData, model: PreTrainedConfig) -> bool:
        """Train a stage, or what is left of it; False if it was asked to stop before its end."""
        sequences = data.samples(stage)
        folder = self.history.newest(stage.name)
        resumed = self.history.open(folder) if folder else None
        run = StageRun(
            stage,
            sequences,
            resumed.step if resumed else 0,
            self.stream,
            skips_overflows=self.config.precision == "fp16",
            profiler=Profiler.of(self.config.profile, self.folder.stage(stage.name), self.world.rank),
        )
        if resumed:
            self.history.check_same_data(stage, data)
        imported = self.history.begins_imported(stage, run)
        known = from_first(lambda: "data" in self.folder.metadata()["stages"].get(stage.name, {}))
        if (run.done == run.steps and known) or (resumed is None and self.history.is_over(stage)):
            self.stream.emit("stage_skipped", stage=stage.name, steps=run.steps)
            if self.world.rank == 0:
                self.folder.record(stage.name, finished=True)
            return True
        if resumed is None:
            self.history.check_begins(stage)
        build = stage_model(self.config, stage, model)
        empty = build(meta=True)
        origin, reader = (imported or resumed.folder.name, resumed) if resumed else self._first_weights(stage, empty)
        shapes = parameter_shapes(empty)
        if isinstance(reader, Checkpoint):
            reader.check_fit(empty)
        engine = self._load(stage, task, build, reader, resumed.progress if resumed else {"updates": 0})
        parameters = sum(math.prod(shape) for shape in shapes.values())
        metadata = {
            "from": origin,
            "model": model.model_type,
            "parameters": parameters,
            "logits": "some tokens at a time" if plain_head(empty) is not None else "whole",
            "engine": self.config.parallel_of(stage).engine,
            "steps": run.steps,
            "sequences": sequences,
            "sequence_length": stage.sequence_length,
        }
        self.stream.emit("stage_started", stage=stage.name, done=run.done, batch=stage.global_batch_size, **metadata)
        if self.world.rank == 0 and (not resumed or imported or not known):
            self.folder.record(
                stage.name,
                **metadata,
                data=_lineage(data.train),
                held_out=_lineage(data.held_out),
                cleaned=str(data.cleaning.folder) if data.cleaning else None,
            )
        self.history.tell_of_dropout(stage, dropouts(model), resumed is not None)
        self.history.plan(stage, shapes, run.done)
        try:
            finished = self._train(stage, task, run, engine, data, sequences)
        except NotFiniteError as error:
            raise BigtrainError(f"{error} {self.history.way_on(stage)}") from None
        engine.close()
        if self.world.rank == 0:
            if finished:
                self.folder.record(stage.name, finished=True)
            else:
                self.folder.preempted.touch()
                self.stream.emit("preempted", stage=stage.name, step=run.done)
        return finished

    def _load(
        self,
        stage: StageConfig,
        task: Task,
        build: Callable[..., PreTrainedModel],
        reader: StateReader,
        progress: dict[str, float],
    ) -> Engine:
        """The stage's engine, with what the reader has; it is closed afterwards."""
        engine = stage_engine(self.config, stage, task, build, self.world)
        try:
            engine.load(reader, progress)
            self._check_start(engine, reader)
        except DamagedError as damaged:
            engine.close()
            if self.folder.path in damaged.folder.parents:
                raise
            raise CheckpointError(lost_origin(damaged)) from None
        finally:
            if isinstance(reader, Checkpoint):
                reader.close()
        if self.world.rank == 0:
            remove(self.folder.first_weights)  # all ranks have read them
        return engine

    def _check_start(self, engine: Engine, reader: StateReader) -> None:
        """Raises on all ranks if what was loaded is not finite: DamagedError for a checkpoint, else CheckpointError."""
        names = engine.not_finite()
        if not names:
            return
        told = f"there are numbers that are not finite in {self.config.precision} in {shorten(names)}"
        if isinstance(reader, Checkpoint):
            raise DamagedError(reader.folder, f"{reader.folder}: {told}")
        source = self.config.model.from_pretrained
        where = "model.from_config: of the first weights" if source is None else f"model.from_pretrained: in {source}"
        raise CheckpointError(f"{where} {told}.")

    def _train(
        self, stage: StageConfig, task: Task, run: StageRun, engine: Engine, data: StageData, sequences: int
    ) -> bool:
        dims = stage_dims(self.config, stage, self.world)
        batches = Batches(
            data.train,
            data.weights,
            seed=self.config.seed,
            global_batch_size=stage.global_batch_size,
            total_samples=sequences,
            data_rank=dims.data_rank,
            data_size=dims.data_size,
        )
        limit = stage.evaluate.sequences if stage.evaluate else None
        held_out = partial(
            held_out_batches, data.held_out, stage.global_batch_size, limit, dims.data_rank, dims.data_size
        )
        settings = stage.checkpoint
        retention = Retention(settings.keep, settings.keep_every, settings.keep_weights_only)
        saver = Saver(
            self.folder.checkpoints(stage.name),
            retention,
            run.saved,
            asynchronous=settings.asynchronous,
            check_there=self.folder.check_there,
        )
        pin = self.world.device.type == "cuda"
        with Prefetched(batches, pin) as prefetched, saver, compiling(stage.name):
            return train(
                run,
                engine,
                prefetched,
                evaluate=lambda: task.metrics(engine.evaluate(held_out())),
                saver=saver,
                requests=self.requests,
            )

    def _first_weights(self, stage: StageConfig, empty: PreTrainedModel) -> tuple[str, StateReader]:
        if stage.from_stage is not None:
            folder = self.history.newest(stage.from_stage, weights_only=True)
            if folder is None:
                raise CheckpointError(
                    f"stages.{stage.name}.from: stage {stage.from_stage} has no checkpoint in "
                    f"{self.folder.checkpoints(stage.from_stage)} any more."
                )
            return f"{stage.from_stage}, {folder.name}", self.history.open(folder, weights_only=True)
        if self.config.model.from_run is not None:
            checkpoint = self.history.origin()
            return f"{checkpoint.folder.parents[1]}, {checkpoint.folder.name}", checkpoint
        source = self.config.model.from_pretrained
        if source is not None:
            folder = self.folder.first_weights

            def tell(reason: str) -> None:
                self.stream.emit("weights_converted", reason=reason, folder=str(folder))

            return source, pretrained_weights(source, empty, self.config.seed, folder, tell)
        return "random weights", RandomWeights(empty, self.config.seed)


@contextmanager
def compiling(stage: str) -> Iterator[None]:
    """Turn what torch.compile raises, in the first step, into a sentence."""
    try:
        yield
    except Exception as error:
        compiler = sys.modules.get("torch._dynamo.exc")
        if compiler is None or not isinstance(error, compiler.TorchDynamoException):
            raise
        reason = "\n".join(str(error).strip().splitlines()[:3])
        raise BigtrainError(
            f"stage {stage}: torch.compile cannot compile this model here; set parallel.compile: false. "
            f"It says:\n{reason}"
        ) from error


def _lineage(stores: list[Store]) -> list[dict[str, Any]]:
    """What of a store is worth remembering when it is gone."""
    return [
        {"store": str(s.folder), "fingerprint": s.manifest["fingerprint"], "content": s.content, **counts(s)}
        for s in stores
    ]
