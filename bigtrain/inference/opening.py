"""Open a model to use it: of a run's checkpoint, filled tensor by tensor, or with transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.checkpoint import Checkpoint
from bigtrain.checkpoint.save import MANIFEST
from bigtrain.config.schema import Run, Stage
from bigtrain.data.prepare import open_tokenizer
from bigtrain.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from bigtrain.errors import CheckpointError, ConfigError, nearest
from bigtrain.inference.places import RunPlace, locate
from bigtrain.models.causal_lm import empty_model, model_config
from bigtrain.parallel.contract import PRECISIONS, persistent_buffers
from bigtrain.pretrained import arguments, opening
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


def open_model(where: str | Path, *, dtype: str | None = None, device: str | torch.device = "auto") -> Opened:
    """Open what `where` names (see `locate`); there is never more than one model in memory.

    dtype: fp32, bf16 or fp16; None: the run's precision, or that of the pretrained model's file.
    device: `auto` is a GPU if there is one.

    Raises ConfigError for names that lead nowhere, CheckpointError for a checkpoint that does not fit its run.
    """
    place = locate(where)
    there = pick_device(device)
    if isinstance(place, RunPlace):
        model, tokenizer = _from_checkpoint(place, _dtype(dtype or place.run.precision), there)
        return Opened(model, tokenizer, str(place), there, place.run, place.stage, place.step)
    model, tokenizer = _from_pretrained(place.source, _dtype(dtype) if dtype else "auto")
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


def _from_pretrained(source: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, GgufConfig

    name, options = arguments(source)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with opening(source, "model"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    return model, load_tokenizer(source)


def _from_checkpoint(place: RunPlace, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    run = place.run
    tokenizer = run_tokenizer(place)
    added = bool(run.tokenizer and run.tokenizer.add_tokens)
    config = model_config(run.model, tokenizer, added)
    model: Any = empty_model(config, attention=run.attention, activation_checkpointing="none", meta=True)
    _check_fit(place.checkpoint, model)
    _fill(model, Checkpoint(place.checkpoint, weights_only=True), dtype, device)
    model.config.dtype = dtype
    model.generation_config = _generation_config(run, model, tokenizer)
    return model.eval().requires_grad_(False), tokenizer


def run_tokenizer(place: RunPlace) -> Any:
    """The tokenizer that the run was trained with: RUN/tokenizer, or the one that its sources lead to.

    Raises CheckpointError when that is another one than its token stores were made with.
    """
    kept = place.folder / "tokenizer"
    if kept.is_dir():
        return load_tokenizer(kept)
    tokenizer = open_tokenizer(place.run)
    found = tokenizer_fingerprint(tokenizer)
    for store in _stores(place):
        if store["tokenizer"] != found:
            raise CheckpointError(
                f"{place.folder}: the tokenizer that it was trained with is not the one that its file leads to now; "
                "the documents, or the pretrained tokenizer, have changed since."
            )
    return tokenizer


def _stores(place: RunPlace) -> list[dict[str, Any]]:
    """The manifests of the stage's token stores, as run.json names them and as far as they still lie there."""
    facts = place.folder / "run.json"
    stages = json.loads(facts.read_text(encoding="utf-8")).get("stages", {}) if facts.is_file() else {}
    names = [Path(store["store"]).name for store in stages.get(place.stage.name, {}).get("data", [])]
    manifests = [Path(place.run.output) / "stores" / name / "manifest.json" for name in names]
    return [json.loads(manifest.read_text(encoding="utf-8")) for manifest in manifests if manifest.is_file()]


def _check_fit(checkpoint: Path, model: nn.Module) -> None:
    """Raises CheckpointError that names every tensor which the model or the checkpoint alone has, that differs in
    shape, or has no elements."""
    state = json.loads((checkpoint / MANIFEST).read_text())["state"]
    saved = {name: tuple(slots[WEIGHT]["shape"]) for name, slots in state.items() if WEIGHT in slots}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    both = sorted(wanted.keys() & saved.keys())
    problems = {
        "missing": sorted(wanted.keys() - saved.keys()),
        "unknown to the model": sorted(saved.keys() - wanted.keys()),
        "without elements": [name for name in both if 0 in saved[name]],
        "of another shape": [
            f"{name} {saved[name]} for {wanted[name]}" for name in both if saved[name] != wanted[name]
        ],
    }
    told = [f"{what}: {shorten(names)}" for what, names in problems.items() if names]
    if told:
        raise CheckpointError(f"{checkpoint} does not fit the model of its run; {'; '.join(told)}.")


def shorten(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def _fill(model: Any, reader: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the parameters on meta one by one. Buffers keep their own dtype: rotary frequencies are not cast."""
    for name, parameter in list(model.named_parameters()):
        tensor = reader.read(name, WEIGHT, _zeros(parameter), tuple(parameter.shape))
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
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
