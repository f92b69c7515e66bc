"""The state that a stage starts with: of a checkpoint, a pretrained model, or random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtrain.checkpoint import Checkpoint, save_frozen
from bigtrain.config.schema import ModelConfig
from bigtrain.disk import remove
from bigtrain.errors import CheckpointError, DamagedError, shorten
from bigtrain.models.kinds import new_head
from bigtrain.models.weights import RandomWeights, pretrained_weights
from bigtrain.observability.events import WeightsConverted
from bigtrain.parallel.engine import Engine
from bigtrain.pipeline.build import StageBuilder
from bigtrain.pipeline.history import History, lost_origin
from bigtrain.pipeline.session import Session
from bigtrain.state import Overlay, Shape, StateReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_weights(
    builder: StageBuilder, model: ModelConfig, empty: PreTrainedModel, history: History, session: Session
) -> tuple[str, StateReader]:
    """(origin in words, reader) of a stage that begins; collective.

    model: of the run's file. empty: the stage's model, on meta. Raises CheckpointError for a checkpoint that is gone.
    """
    stage, folder = builder.stage, session.folder
    if stage.from_stage is not None:
        checkpoint = history.newest(stage.from_stage, weights_only=True)
        if checkpoint is None:
            raise CheckpointError(
                f"stages.{stage.name}.from: stage {stage.from_stage} has no checkpoint in "
                f"{folder.checkpoints(stage.from_stage)} any more."
            )
        opened = history.open(checkpoint, weights_only=True)
        return f"{stage.from_stage}, {checkpoint.name}", _with_new_head(opened, empty, builder.seed)
    if model.from_run is not None:
        origin = history.origin()
        return f"{origin.folder.parents[1]}, {origin.folder.name}", _with_new_head(origin, empty, builder.seed)
    if model.from_pretrained is not None:
        converted = folder.first_weights

        def tell(reason: str) -> None:
            session.stream.emit(WeightsConverted(reason=reason, folder=str(converted)))

        return model.from_pretrained, pretrained_weights(model.from_pretrained, empty, builder.seed, converted, tell)
    return "random weights", RandomWeights(empty, builder.seed)


def _with_new_head(checkpoint: Checkpoint, empty: PreTrainedModel, seed: int) -> StateReader:
    """The checkpoint of another stage, with random weights where it lacks the head of this stage's task."""
    head = new_head(empty)
    checkpoint.check_fit(empty, head)
    drawn = head - checkpoint.names
    return Overlay(checkpoint, RandomWeights(empty, seed), drawn) if drawn else checkpoint


def load_engine(
    builder: StageBuilder,
    model: ModelConfig,
    reader: StateReader,
    progress: dict[str, float],
    session: Session,
    frozen: dict[str, Shape],
) -> Engine:
    """The stage's engine with the state that the reader gives; collective. A checkpoint is closed afterwards.

    frozen: shapes of the weights that do not train, for a stage that begins: they are saved before the first step.

    Raises DamagedError for a damaged checkpoint of this run, CheckpointError for one of another run, and for numbers
    that are not finite.
    """
    engine = builder.engine()
    try:
        if frozen:
            save_frozen(session.folder.checkpoints(builder.stage.name), frozen, reader)
        engine.load(reader, progress)
        _check_finite(engine, reader, model, builder.precision)
    except DamagedError as damaged:
        engine.close()
        if session.folder.path in damaged.folder.parents:
            raise
        raise CheckpointError(lost_origin(damaged)) from None
    finally:
        base = reader.base if isinstance(reader, Overlay) else reader
        if isinstance(base, Checkpoint):
            base.close()
    if session.world.rank == 0:
        remove(session.folder.first_weights)  # all ranks have read them
    return engine


def _check_finite(engine: Engine, reader: StateReader, model: ModelConfig, precision: str) -> None:
    """Raises on all ranks if what was loaded is not finite: DamagedError for a checkpoint, else CheckpointError."""
    names = engine.not_finite()
    if not names:
        return
    told = f"there are numbers that are not finite in {precision} in {shorten(names)}"
    if isinstance(reader, Checkpoint):
        raise DamagedError(reader.folder, f"{reader.folder}: {told}")
    source = model.from_pretrained
    where = "model.from_config: of the first weights" if source is None else f"model.from_pretrained: in {source}"
    raise CheckpointError(f"{where} {told}.")
