"""Open a model to use it: of a run's checkpoint, filled tensor by tensor, or with transformers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.checkpoint import Checkpoint
from bigtrain.config.files import literal
from bigtrain.config.schema import RunConfig, StageConfig
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.errors import ConfigError, DamagedError, nearest, reason, shorten
from bigtrain.inference.generation import set_generation
from bigtrain.inference.places import RunPlace, locate
from bigtrain.models.architecture import (
    empty_model,
    kept_config,
    model_config,
    parameter_shapes,
    persistent_buffers,
    with_task,
)
from bigtrain.models.kinds import CAUSAL_LM
from bigtrain.models.weights import load_whole
from bigtrain.optim import EMA
from bigtrain.parallel.engine import PRECISIONS
from bigtrain.state import BUFFER, WEIGHT, Shape
from bigtrain.tasks import Task, parse_task

METADATA = "bigtrain.json"  # in an export: what `TrainedAs` says


@dataclass(frozen=True)
class TrainedAs:
    """How bigtrain has trained a model last, which decides what its prompts and windows look like; an export knows."""

    task: Task
    sequence_length: int

    def to_json(self) -> str:
        """What `of_export` reads."""
        return json.dumps({"task": self.task.model_dump(), "sequence_length": self.sequence_length}) + "\n"

    @classmethod
    def of_export(cls, folder: Path) -> TrainedAs | None:
        """None for a model that bigtrain has not exported."""
        file = folder / METADATA
        if not file.is_file():
            return None
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
            return cls(parse_task(metadata["task"]), int(metadata["sequence_length"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} does not say how the model was trained ({reason(error)}); export it again."
            ) from None


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be used.

    model: in eval mode, without gradients, on `device`. what: where it came from, in words. trained: None for a model
    of others. run, stage, step: of the checkpoint that it came from; None for a pretrained model. changes: what of the
    base model's settings had to be changed, a sentence each.
    """

    model: Any
    tokenizer: Any
    what: str
    device: torch.device
    trained: TrainedAs | None = None
    run: RunConfig | None = None
    stage: StageConfig | None = None
    step: int | None = None
    changes: tuple[str, ...] = ()


def load_model(
    where: str | Path, *, dtype: str | None = None, device: str | torch.device = "auto", ema: bool = False
) -> LoadedModel:
    """Open what `where` names (see `locate`); there is never more than one model in memory.

    dtype: fp32, bf16 or fp16; None: the run's precision, or that of the pretrained model's file.
    device: `auto` is a GPU if there is one. ema: the moving average of the weights instead of the weights.

    Raises ConfigError for names that lead nowhere, CheckpointError for a checkpoint that does not fit its run.
    """
    place = locate(where)
    there = pick_device(device)
    if isinstance(place, RunPlace):
        model, tokenizer, changes = _from_checkpoint(place, _dtype(dtype or place.run.precision), there, ema)
        trained: TrainedAs | None = TrainedAs(place.stage.task, place.stage.sequence_length)
        return LoadedModel(
            model, tokenizer, str(place), there, trained, place.run, place.stage, place.step, tuple(changes)
        )
    tokenizer = load_tokenizer(place.source)
    trained = TrainedAs.of_export(Path(place.source))
    model = load_whole(place.source, "model", _dtype(dtype) if dtype else "auto", _like(place.source, trained))
    model = model.eval().requires_grad_(False).to(there)
    return LoadedModel(model, tokenizer, str(place), there, trained)


def _like(source: str, trained: TrainedAs | None) -> Any:
    """The empty model of an export of another kind than a causal language model."""
    if trained is None or trained.task.model_kind == CAUSAL_LM:
        return None
    config = kept_config(Path(source))
    options: dict[str, Any] = {"attention": "sdpa", "activation_checkpointing": "none", "meta": True}
    return empty_model(config, kind=trained.task.model_kind, **options)


def pick_device(device: str | torch.device) -> torch.device:
    """`auto`: a GPU if there is one. Raises ConfigError for a GPU that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but this machine shows no GPU; use auto or cpu.")
    return chosen


def _dtype(name: str) -> torch.dtype:
    if name not in PRECISIONS:
        raise ConfigError(f"dtype: there is no {literal(name)}; {nearest(name, PRECISIONS)}")
    return PRECISIONS[name]


def _from_checkpoint(
    place: RunPlace, dtype: torch.dtype, device: torch.device, ema: bool
) -> tuple[Any, Any, list[str]]:
    run, task = place.run, place.stage.task
    tokenizer = load_tokenizer(place.folder / "tokenizer")
    if run.model.from_run is None:
        config = model_config(run.model, tokenizer, run.adds_tokens, task.model_kind)
    else:  # the other run may be gone
        config = kept_config(place.folder / "architecture")
    attention = "eager" if run.attention == "eager" else "sdpa"  # the others need not be there any more
    config = with_task(config, task.model_values)
    options: dict[str, Any] = {"activation_checkpointing": "none", "meta": True, "kind": task.model_kind}
    model: Any = empty_model(config, attention=attention, **options)
    reader = Checkpoint(place.checkpoint, weights_only=not ema)
    if ema and not any(EMA in reader.slots_of(name) for name in parameter_shapes(model)):
        raise ConfigError(
            f"{place.checkpoint} holds no moving average: its stage was trained without optimizer.ema, or only its "
            "weights were kept."
        )
    reader.check_fit(model)
    _fill(model, reader, EMA if ema else WEIGHT, dtype, device)
    model.config.dtype = dtype
    changes = set_generation(run, place.stage, model, tokenizer) if task.generates else []
    return model.eval().requires_grad_(False), tokenizer, changes


@torch.no_grad()
def _fill(model: Any, reader: Checkpoint, slot: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the parameters on meta one by one. Buffers keep their own dtype: rotary frequencies are not cast.

    Raises DamagedError for weights that are not finite, ConfigError for those that `dtype` cannot hold.
    """
    bad, large = [], []
    for name, parameter in list(model.named_parameters()):
        there = slot if slot in reader.slots_of(name) else WEIGHT  # one that does not train is its own average
        tensor = reader.read(name, there, _zeros(parameter), tuple(parameter.shape))
        largest = torch.stack(tensor.aminmax()).abs().max().item()  # nan if any is
        if not math.isfinite(largest):
            bad.append(name)
        elif largest > torch.finfo(dtype).max:
            large.append(name)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
    if bad:
        raise DamagedError(reader.folder, f"{reader.folder}: there are numbers that are not finite in {shorten(bad)}")
    if large:
        raise ConfigError(
            f"dtype: {str(dtype).removeprefix('torch.')} cannot hold the numbers of {shorten(large)}; use fp32."
        )
    model.tie_weights()
    for name, buffer in persistent_buffers(model):
        if BUFFER in reader.slots_of(name):
            buffer.copy_(reader.read(name, BUFFER, _zeros(buffer), tuple(buffer.shape)))
    model.to(device)


def _zeros(tensor: torch.Tensor) -> Shape:
    return (0,) * tensor.dim()
