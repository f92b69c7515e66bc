"""What a stage is trained with: its tokenizer, data, model, engine and batches. A run, `bench` and others use it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config.schema import ParallelConfig, RunConfig, StageConfig
from bigtrain.data.batches import Batch, Batches, held_out_batches
from bigtrain.data.prepare import StageData, counts, prepare_stage, prepare_tokenizer
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.distributed.world import World
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.architecture import empty_model, with_task
from bigtrain.observability.events import Cleaned, CleanedTooMuch, Prepared, Preparing
from bigtrain.observability.stream import Stream
from bigtrain.parallel import build_engine
from bigtrain.parallel.dims import ParallelDims
from bigtrain.parallel.engine import Engine
from bigtrain.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def open_tokenizer(config: RunConfig) -> Any:
    """The tokenizer that the run's file names, with the tokens that it adds; trained first where nobody has."""
    settings, where = config.tokenizer, config.given_tokenizer
    if settings is None:
        key = "model.from_pretrained" if config.model.from_run is None else "model.from_run"
        assert where is not None
        return load_tokenizer(where, key=key)
    if settings.train is not None:
        where = str(prepare_tokenizer(settings.train, config.stages[0], config.stores))
    if where is None:
        raise ConfigError("tokenizer: give either train or from_pretrained.")
    return load_tokenizer(where, settings.add_tokens)


def prepare_stages(
    stages: Sequence[StageConfig], tokenizer: Any, *, stores: Path, seed: int, stream: Stream
) -> dict[str, StageData]:
    """The data of each stage, by name; made first where nobody has. The stream hears of each store.

    Raises as `prepare_stage` does.
    """
    data = {}
    for stage in stages:
        stream.emit(Preparing(what=f"data of {stage.name}"))
        made = prepare_stage(stage, stage.task, tokenizer, stores=stores, seed=seed, stream=stream)
        if made.cleaning is not None:
            summary = made.cleaning.summary()
            stream.emit(Cleaned(stage=stage.name, **summary))
            if summary["warning"] is not None:
                stream.emit(CleanedTooMuch(stage=stage.name, text=summary["warning"], folder=summary["folder"]))
        for store in (*made.train, *made.held_out):
            stream.emit(Prepared(stage=stage.name, folder=str(store.folder), counts=counts(store)))
        data[stage.name] = made
    return data


@dataclass(frozen=True)
class StageBuilder:
    """Builds the model and the engine of a stage, as a run does and as `bench` does.

    model: the transformers configuration of the stage's model. parallel: how the stage is executed.
    """

    stage: StageConfig
    task: Task
    parallel: ParallelConfig
    model: PreTrainedConfig
    attention: str
    precision: str
    seed: int
    world: World

    @classmethod
    def of(cls, config: RunConfig, stage: StageConfig, model: PreTrainedConfig, world: World) -> StageBuilder:
        task, parallel = stage.task, config.parallel_of(stage)
        return cls(
            stage,
            task,
            parallel,
            with_task(model, task.model_values),
            config.attention,
            config.precision,
            config.seed,
            world,
        )

    @property
    def dims(self) -> ParallelDims:
        """How the ranks divide the stage's work."""
        return ParallelDims.of(self.parallel.engine, self.world.rank, self.world.size, self.parallel.replicate)

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank runs through the model at once: no more than its share of a global batch."""
        return min(self.parallel.micro_batch_size, -(-self.stage.global_batch_size // self.dims.data_size))

    def empty_model(self, meta: bool = False) -> PreTrainedModel:
        """The model without its weights; meta: without memory for them either."""
        return empty_model(
            self.model,
            kind=self.task.model_kind,
            attention=self.attention,
            activation_checkpointing=self.parallel.activation_checkpointing,
            freeze=self.stage.freeze,
            meta=meta,
        )

    def engine(self) -> Engine:
        """The engine of the model, whose weights are still to be loaded; collective."""
        return build_engine(
            self.parallel.engine,
            self.empty_model,
            self.task,
            dims=self.dims,
            precision=self.precision,
            compile=self.parallel.compile,
            micro_batch_size=self.micro_batch_size,
            optimizer=self.stage.optimizer,
            seed=self.seed,
            device=self.world.device,
        )


def training_batches(
    stage: StageConfig, data: StageData, seed: int, dims: ParallelDims, sequences: int | None = None
) -> Batches:
    """A rank's share of the stage's batches. sequences: of all steps together; None: as many as the stage trains on."""
    return Batches(
        data.train,
        data.weights,
        seed=seed,
        global_batch_size=stage.global_batch_size,
        total_samples=data.samples(stage) if sequences is None else sequences,
        data_rank=dims.data_rank,
        data_size=dims.data_size,
    )


def evaluation_batches(stage: StageConfig, data: StageData, dims: ParallelDims) -> Iterator[Batch]:
    """A rank's share of an evaluation's batches."""
    limit = stage.evaluate.sequences if stage.evaluate else None
    return held_out_batches(data.held_out, stage.global_batch_size, limit, dims.data_rank, dims.data_size)


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
