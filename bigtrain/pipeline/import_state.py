"""Begin a stage with the state of another program: its checkpoint becomes the stage's first one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.checkpoint import Retention, newest, save
from bigtrain.checkpoint.foreign import MOMENTS, find_foreign
from bigtrain.config import RunConfig
from bigtrain.config.schema import StageConfig
from bigtrain.data.tokenizer import num_ids
from bigtrain.distributed.world import joined
from bigtrain.errors import ConfigError, ending_of
from bigtrain.models.architecture import parameter_shapes
from bigtrain.models.trial import try_architecture
from bigtrain.pipeline.build import open_tokenizer
from bigtrain.pipeline.preflight import try_inputs
from bigtrain.pretrained import quiet
from bigtrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def import_state(config: RunConfig, where: Path, stage_name: str | None = None) -> str:
    """Write the state in `where` as a checkpoint of a stage (None: the first), from which a run goes on; returns what
    was done, in words.

    Raises ConfigError for a folder that holds no such state, and a stage that has begun or is too short for it;
    CheckpointError for a state of another model. Nothing is written of the run then.
    """
    quiet()
    stage = config.asked_stage(stage_name) if stage_name else config.stages[0]
    folder = RunFolder(config.folder)
    _check_optimizer(stage)
    folder.check(config)
    _check_not_begun(folder, stage)
    where = where.expanduser().absolute()
    foreign = find_foreign(where)
    _check_length(stage, foreign.step, where)
    origin = try_inputs(config)
    model = _model(config)
    state = foreign.read(model)
    since = time.time()
    try:
        folder.begin(config, None, origin, imported=str(where))
        _check_not_begun(folder, stage)  # again: another job may have done so meanwhile
        folder.record(stage.name, imported=str(where))
        with joined("cpu", "fp32"):
            written = save(
                folder.checkpoints(stage.name), foreign.step, state.boxes(), {"updates": state.updates}, Retention(1)
            )
        folder.end("imported", None, since)
    except BaseException as error:
        folder.end(*ending_of(error), since)
        raise
    finally:
        folder.leave()
    lost = ["the order of samples is bigtrain's own", "learning rate and Adam's settings are those of the run's file"]
    lost += ["the loss scale of fp16 begins anew"] if config.precision == "fp16" else []
    lost += ["the moving average of the weights begins anew"] if stage.optimizer.ema is not None else []
    return "\n".join(
        [
            f"{foreign.folder} is {foreign.kind} after step {foreign.step}: weights and Adam's moments of "
            f"{len(parameter_shapes(model))} parameters.",
            f"{written} has them now; `bigtrain run` of the same file goes on from there.",
            f"Not carried over: from step {foreign.step + 1} on {', '.join(lost)}.",
        ]
    )


def _check_optimizer(stage: StageConfig) -> None:
    """What is imported has the two moments of Adam for each parameter."""
    kept = stage.optimizer.moments("weight", (2, 2))
    if set(kept) != set(MOMENTS):
        raise ConfigError(
            f"stages.{stage.name}.optimizer: {stage.optimizer.name} keeps {', '.join(kept) or 'nothing'} of a "
            f"parameter, and a state that can be imported has {' and '.join(MOMENTS)}; use `name: adamw`, or start "
            "from the weights alone with model.from_pretrained."
        )
    if stage.freeze:
        raise ConfigError(
            f"stages.{stage.name}.freeze: a state that can be imported has trained all parameters; remove freeze, or "
            "start from the weights alone with model.from_pretrained."
        )


def _check_not_begun(folder: RunFolder, stage: StageConfig) -> None:
    begun = "data" in folder.metadata().get("stages", {}).get(stage.name, {})
    if begun or newest(folder.checkpoints(stage.name), weights_only=True) is not None:
        raise ConfigError(
            f"stage {stage.name} of {folder.path} has begun already, and an import would take the place of what it "
            "has trained; give the run another `name`."
        )


def _check_length(stage: StageConfig, step: int, where: Path) -> None:
    """Of a stage whose length is given in epochs, the run knows and tells."""
    if step < 1:
        raise ConfigError(f"{where} was written before the first step: there is nothing to continue.")
    if stage.epochs is not None:
        return
    steps = -(-stage.sequences(0) // stage.global_batch_size)
    if step >= steps:
        raise ConfigError(
            f"stages.{stage.name}: {where} has done {step} steps, and the stage has {steps}, these included; make it "
            "longer."
        )


def _model(config: RunConfig) -> PreTrainedModel:
    """On the meta device. Where the run's file does not give the size of the vocabulary, the tokenizer has to."""
    given = "vocab_size" in (config.model.from_config or {})
    return try_architecture(
        config.model,
        0 if given else num_ids(open_tokenizer(config)),
        attention=config.attention,
        needs_document_mask=config.needs_document_mask,
        added_tokens=config.adds_tokens,
    )
