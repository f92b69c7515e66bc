"""The stages of a run in order, each from the weights of the one before; finished ones are skipped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint import Retention, Saver
from bigtrain.config import RunConfig
from bigtrain.config.schema import ModelConfig, ProfileConfig
from bigtrain.data.batches import Prefetched
from bigtrain.data.prepare import StageData, counts
from bigtrain.data.store import Store
from bigtrain.distributed.collectives import from_first
from bigtrain.errors import BigtrainError, DamagedError, NotFiniteError
from bigtrain.models.architecture import dropouts, parameter_shapes
from bigtrain.models.families import plain_head
from bigtrain.models.freeze import frozen_shapes
from bigtrain.observability.events import Preempted, Preparing, StageSkipped, StageStarted
from bigtrain.observability.hooks import StepHook, StepHooks
from bigtrain.observability.profiler import Profiler
from bigtrain.parallel.engine import Engine
from bigtrain.pipeline.build import StageBuilder, compiling, evaluation_batches, prepare_stages, training_batches
from bigtrain.pipeline.history import History
from bigtrain.pipeline.kept import own_architecture, own_tokenizer
from bigtrain.pipeline.preflight import check_schedules
from bigtrain.pipeline.session import Session
from bigtrain.pipeline.start_state import first_weights, load_engine
from bigtrain.training.loop import train
from bigtrain.training.reports import Reports
from bigtrain.training.run import StageRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


OF_THE_EVENT = ("kind", "stage", "done", "batch")  # of StageStarted, and not for run.json


def train_stages(config: RunConfig, session: Session) -> bool:
    """Prepare the data of all stages, so that faults in it show before anything is trained; then train the stages.

    Collective. False if the run was asked to stop; it has saved then, and its folder says so.
    """
    stream = session.stream
    stream.emit(Preparing(what="tokenizer"))
    tokenizer = own_tokenizer(config, session.folder)
    architecture = own_architecture(config, session.folder, tokenizer)
    data = prepare_stages(config.stages, tokenizer, stores=config.stores, seed=config.seed, stream=stream)
    from_first(lambda: check_schedules(config.stages, data))
    history = History(config.stages, session.world, session.folder, stream)
    builders = [StageBuilder.of(config, stage, architecture, session.world) for stage in config.stages]
    stages = [
        _Stage(builder, data[builder.stage.name], config.model, config.profile, history, session)
        for builder in builders
    ]
    with session.requests:
        while True:
            try:
                return all(stage.train() for stage in stages)
            except DamagedError as damaged:
                history.set_aside(damaged)


class _Stage:
    """A stage, on one rank. model: of the run's file."""

    def __init__(
        self,
        builder: StageBuilder,
        data: StageData,
        model: ModelConfig,
        profile: ProfileConfig | None,
        history: History,
        session: Session,
    ):
        self._builder = builder
        self._stage = builder.stage
        self._data = data
        self._model = model
        self._profile = profile
        self._history = history
        self._session = session
        self._sequences = data.samples(builder.stage)

    def train(self) -> bool:
        """Train the stage from its newest checkpoint, or from its first weights; False if asked to stop before its end.

        Collective. Raises DamagedError for a checkpoint that cannot be read: the one before it may be.
        """
        stage, history, folder = self._stage, self._history, self._session.folder
        checkpoint = history.newest(stage.name)
        resumed = history.open(checkpoint) if checkpoint else None
        reports = Reports(stage.name, self._session.stream, skips_overflows=self._builder.precision == "fp16")
        run = StageRun.of(stage, self._sequences, resumed.step if resumed else 0, reports)
        if resumed:
            history.check_same_data(stage, self._data)
        imported = history.begins_imported(stage, run)
        known = from_first(lambda: "data" in folder.metadata()["stages"].get(stage.name, {}))
        if (run.done == run.steps and known) or (resumed is None and history.is_over(stage)):
            self._session.stream.emit(StageSkipped(stage=stage.name, steps=run.steps))
            self._record(finished=True)
            return True
        if resumed is None:
            history.check_begins(stage)
        empty = self._builder.empty_model(meta=True)
        origin, reader = (
            (imported or resumed.folder.name, resumed)
            if resumed
            else first_weights(self._builder, self._model, empty, history, self._session)
        )
        if resumed:
            resumed.check_fit(empty)
        progress: dict[str, float] = resumed.progress if resumed else {"updates": 0}
        frozen = {} if resumed else frozen_shapes(empty)
        engine = load_engine(self._builder, self._model, reader, progress, self._session, frozen)
        self._tell(run, origin, empty, is_new=not resumed or bool(imported) or not known, resumed=resumed is not None)
        try:
            finished = self._train(run, engine)
        except NotFiniteError as error:
            raise BigtrainError(f"{error} {history.way_on(stage, self._builder.precision)}") from None
        engine.close()
        self._end(run, finished)
        return finished

    def _record(self, **metadata: Any) -> None:
        if self._session.world.rank == 0:
            self._session.folder.record(self._stage.name, **metadata)

    def _tell(self, run: StageRun, origin: str, empty: PreTrainedModel, is_new: bool, resumed: bool) -> None:
        """Say what begins or goes on, and record it in run.json if it is new; collective."""
        stage, data, builder = self._stage, self._data, self._builder
        shapes, frozen = parameter_shapes(empty), frozen_shapes(empty)
        trained = {name: shape for name, shape in shapes.items() if name not in frozen}
        logits = "some tokens at a time" if plain_head(empty) is not None else "whole"
        started = StageStarted(
            stage=stage.name,
            done=run.done,
            batch=stage.global_batch_size,
            origin=origin,
            model=builder.model.model_type,
            parameters=sum(map(math.prod, shapes.values())),
            trained=sum(map(math.prod, trained.values())),
            logits=logits if builder.task.sums_over == "tokens" else None,
            engine=builder.parallel.engine,
            steps=run.steps,
            sequences=self._sequences,
            sequence_length=stage.sequence_length,
        )
        self._session.stream.emit(started)
        if is_new:
            cleaned = str(data.cleaning.folder) if data.cleaning else None
            metadata = {name: value for name, value in started.row().items() if name not in OF_THE_EVENT}
            self._record(**metadata, data=lineage_of(data.train), held_out=lineage_of(data.held_out), cleaned=cleaned)
        self._history.tell_of_dropout(builder, dropouts(builder.model), resumed)
        self._history.plan(stage, trained, run.done)

    def _train(self, run: StageRun, engine: Engine) -> bool:
        stage, data, builder, session = self._stage, self._data, self._builder, self._session
        batches = training_batches(stage, data, builder.seed, builder.dims, self._sequences)

        def evaluate() -> dict[str, float]:
            return builder.task.metrics(engine.evaluate(evaluation_batches(stage, data, builder.dims)))

        settings = stage.checkpoint
        saver = Saver(
            session.folder.checkpoints(stage.name),
            Retention(settings.keep, settings.keep_every, settings.keep_weights_only),
            run.reports.saved,
            asynchronous=settings.asynchronous,
            frozen=bool(stage.freeze),
            check_there=session.folder.check_there,
        )
        rank, pin = session.world.rank, session.world.device.type == "cuda"
        folder = session.folder.stage(stage.name)
        hooks: list[StepHook] = []
        if self._profile is not None:
            hooks.append(Profiler(self._profile, stage.name, run.steps, folder, rank, session.stream))
        with Prefetched(batches, pin) as prefetched, saver, compiling(stage.name):
            return train(run, engine, prefetched, evaluate, saver, session.requests, StepHooks(hooks, session.stream))

    def _end(self, run: StageRun, finished: bool) -> None:
        if finished:
            self._record(finished=True)
        elif self._session.world.rank == 0:
            self._session.folder.preempted.touch()
            self._session.stream.emit(Preempted(stage=self._stage.name, step=run.done))


def lineage_of(stores: list[Store]) -> list[dict[str, Any]]:
    """What run.json says of stores, to be known when they are gone."""
    return [
        {"store": str(s.folder), "fingerprint": s.manifest["fingerprint"], "content": s.content, **counts(s)}
        for s in stores
    ]
