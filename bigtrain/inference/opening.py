"""Open a model to use it: of a run's checkpoint, filled tensor by tensor, or with transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.checkpoint import Checkpoint
from bigtrain.config.schema import Run, Stage
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.errors import ConfigError, DamagedError, nearest, shorten
from bigtrain.inference.places import RunPlace, locate
from bigtrain.models.causal_lm import empty_model, model_config, parameter_shapes
from bigtrain.models.weights import load_whole
from bigtrain.optim import EMA
from bigtrain.parallel.contract import PRECISIONS, persistent_buffers
from bigtrain.pretrained import arguments
from bigtrain.state import BUFFER, WEIGHT, Shape


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be used.

    model: in eval mode, without gradients, on `device`. what: where it came from, in words.
    run, stage, step: of the checkpoint that it came from; None for a pretrained model.
    """

    model: Any
    tokenizer: Any
    what: str
    device: torch.device
    run: Run | None = None
    stage: Stage | None = None
    step: int | None = None


def open_model(
    where: str | Path, *, dtype: str | None = None, device: str | torch.device = "auto", ema: bool = False
) -> Opened:
    """Open what `where` names (see `locate`); there is never more than one model in memory.

    dtype: fp32, bf16 or fp16; None: the run's precision, or that of the pretrained model's file.
    device: `auto` is a GPU if there is one. ema: the moving average of the weights instead of the weights.

    Raises ConfigError for names that lead nowhere, CheckpointError for a checkpoint that does not fit its run.
    """
    place = locate(where)
    there = pick_device(device)
    if isinstance(place, RunPlace):
        model, tokenizer = _from_checkpoint(place, _dtype(dtype or place.run.precision), there, ema)
        return Opened(model, tokenizer, str(place), there, place.run, place.stage, place.step)
    tokenizer = load_tokenizer(place.source)
    model = load_whole(place.source, "model", _dtype(dtype) if dtype else "auto")
    return Opened(model.eval().requires_grad_(False).to(there), tokenizer, str(place), there)


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
        raise ConfigError(f"dtype: there is no {name!r}; {nearest(name, PRECISIONS)}")
    return PRECISIONS[name]


def _from_checkpoint(place: RunPlace, dtype: torch.dtype, device: torch.device, ema: bool) -> tuple[Any, Any]:
    run = place.run
    tokenizer = load_tokenizer(place.folder / "tokenizer")
    config = model_config(run.model, tokenizer, run.adds_tokens)
    attention = "eager" if run.attention == "eager" else "sdpa"  # the others need not be there any more
    model: Any = empty_model(config, attention=attention, activation_checkpointing="none", meta=True)
    reader = Checkpoint(place.checkpoint, weights_only=not ema)
    if ema and EMA not in reader.slots:
        raise ConfigError(
            f"{place.checkpoint} holds no moving average: its stage was trained without optimizer.ema, or only its "
            "weights were kept."
        )
    reader.check_fit(parameter_shapes(model))
    _fill(model, reader, EMA if ema else WEIGHT, dtype, device)
    model.config.dtype = dtype
    model.generation_config = _generation_config(run, model, tokenizer)
    return model.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def _fill(model: Any, reader: Checkpoint, slot: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the parameters on meta one by one. Buffers keep their own dtype: rotary frequencies are not cast.

    Raises DamagedError for weights that are not finite, ConfigError for those that `dtype` cannot hold.
    """
    bad, large = [], []
    for name, parameter in list(model.named_parameters()):
        tensor = reader.read(name, slot, _zeros(parameter), tuple(parameter.shape))
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
    if BUFFER in reader.slots:
        for name, buffer in persistent_buffers(model):
            buffer.copy_(reader.read(name, BUFFER, _zeros(buffer), tuple(buffer.shape)))
    model.to(device)


def _zeros(tensor: torch.Tensor) -> Shape:
    return (0,) * tensor.dim()


def _generation_config(run: Run, model: Any, tokenizer: Any) -> Any:
    """That of the pretrained model, if it has one; special tokens are the tokenizer's, and all known ends end."""
    from transformers import GenerationConfig

    config = model.generation_config
    if run.model.from_pretrained is not None and not run.model.from_pretrained.endswith(".gguf"):
        name, _ = arguments(run.model.from_pretrained)
        try:
            config = GenerationConfig.from_pretrained(name)
        except OSError:  # how transformers says that the model has none
            config = model.generation_config
    config._from_model_config = False  # what is set here is to last, whatever the model's configuration says
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None]
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
    config.pad_token_id = pad if pad is not None else next(iter(ends), None)
    return config
