"""Training states that other programs have saved. Only tensors and plain containers are read: no pickled code runs.

Hugging Face Trainer:   checkpoint-300/          model.safetensors or its shards, optimizer.pt, trainer_state.json
DeepSpeed, universal:   global_step300_universal/ zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt, *_model_states.pt
"""

from __future__ import annotations

import itertools
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bigtrain.checkpoint.load import check_shapes
from bigtrain.config.files import literal
from bigtrain.errors import CheckpointError, ConfigError, reason, shorten
from bigtrain.models.architecture import parameter_shapes, persistent_buffers
from bigtrain.pretrained import arguments, opening, wrong_file
from bigtrain.state import BUFFER, WEIGHT, Box, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch and DeepSpeed name them
CONVERTER = "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"  # ZeRO-1 and 2 need the flag
# Keys of a model's configuration that change nothing of what it computes.
NO_MATHEMATICS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "pad_token_id",
        "transformers_version",
        "use_cache",
    }
)


class ForeignState(NamedTuple):
    """updates: done by the optimizer, fewer than the steps where some were left out (fp16). tensors: name -> slot ->
    whole tensor on the CPU, weights and moments in fp32."""

    updates: int
    tensors: dict[str, dict[str, Tensor]]

    def boxes(self) -> Iterator[Box]:
        for name, slots in self.tensors.items():
            for slot, tensor in slots.items():
                shape = tuple(tensor.shape)
                yield Box(name, slot, shape, (0,) * len(shape), tensor.contiguous())


def find_foreign(folder: Path) -> Trainer | Universal:
    """What lies in a folder. Raises ConfigError if that is nothing that can be imported, and says what can be done."""
    latest = folder / "latest_universal"
    if latest.is_file():
        folder = folder / latest.read_text(encoding="utf-8").strip()
    if (folder / "zero").is_dir():
        return Universal(folder)
    shards = _shards(folder)
    if shards is not None:
        universal = shards.with_name(f"{shards.name}_universal")
        raise ConfigError(
            f"{folder} holds a ZeRO checkpoint as its ranks wrote it. Convert it with `{CONVERTER} --input_folder "
            f"{shards} --output_folder {universal}`, then import {universal}."
        )
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise ConfigError(
            f"{folder} is neither a checkpoint of a Hugging Face Trainer (checkpoint-N with model.safetensors, "
            "optimizer.pt and trainer_state.json) nor a universal checkpoint of DeepSpeed (with a folder `zero`)."
        )
    for name, what in (("optimizer.pt", "Adam's moments"), ("trainer_state.json", "the step")):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder} has no {name}, so {what} cannot be carried over; `model.from_pretrained: {folder}` in the "
                "run's file starts from the weights alone."
            )
    return Trainer(folder)


def _shards(folder: Path) -> Path | None:
    """Where ranks have written their shares of a ZeRO checkpoint: here, or in the folder of a step; the newest."""
    latest = folder / "latest"
    if latest.is_file():
        folder = folder / latest.read_text(encoding="utf-8").strip()
    files = (*folder.glob("*zero_pp_rank_*"), *folder.glob("*/*zero_pp_rank_*"))
    return max((file.parent for file in files), key=lambda place: place.stat().st_mtime, default=None)


class Trainer:
    """A checkpoint of Hugging Face's Trainer."""

    kind = "a Trainer's checkpoint"

    def __init__(self, folder: Path):
        """Raises CheckpointError if trainer_state.json cannot be read."""
        self.folder = folder
        path = folder / "trainer_state.json"
        try:
            self.step = int(json.loads(path.read_bytes())["global_step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} does not say at which step it was written: {reason(error)}") from None

    def read(self, model: PreTrainedModel) -> ForeignState:
        """The state of `model` (on the meta device). Raises CheckpointError if it is another model's, or another
        optimizer's than AdamW."""
        tensors = self._weights(model)
        updates = self._add_moments(model, tensors)
        return ForeignState(updates, tensors)

    def _weights(self, model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
        """Through transformers, which knows how the names and layouts of its files become those of its modules."""
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        name, options = arguments(str(self.folder))
        with opening(str(self.folder), "import"):
            loaded, info = auto.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        saved: dict[str, Shape] = {n: s for n, s in parameter_shapes(loaded).items() if n not in info["missing_keys"]}
        saved |= {name: tuple(shape) for name, shape, _ in info["mismatched_keys"]}
        saved |= dict.fromkeys(info["unexpected_keys"], ())
        check_shapes(str(self.folder), saved, parameter_shapes(model))
        self._check_config(loaded.config.to_dict(), model.config.to_dict())
        tensors = {name: {WEIGHT: parameter.detach()} for name, parameter in loaded.named_parameters()}
        return tensors | {name: {BUFFER: buffer} for name, buffer in persistent_buffers(loaded)}

    def _check_config(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        keys = sorted((theirs.keys() | ours.keys()) - NO_MATHEMATICS)
        pairs = [(key, theirs.get(key), ours.get(key)) for key in keys]
        told = [f"{key}: {literal(there)} there, {literal(here)} here" for key, there, here in pairs if there != here]
        if told:
            raise CheckpointError(
                f"{self.folder / 'config.json'} describes another model than the run's file; {shorten(told)}. Set "
                f"these in model.from_config, or take them all with `model.from_pretrained: {self.folder}`."
            )

    def _add_moments(self, model: PreTrainedModel, tensors: dict[str, dict[str, Tensor]]) -> int:
        """Read optimizer.pt, which numbers the parameters in the order of the Trainer's two groups."""
        path = self.folder / "optimizer.pt"
        saved = _load(path)
        try:
            groups, state = [group["params"] for group in saved["param_groups"]], saved["state"]
        except (KeyError, TypeError):
            raise CheckpointError(f"{path} is no state of an optimizer of torch.") from None
        expected = _trainer_groups(model)
        if [len(group) for group in groups] != [len(group) for group in expected]:
            raise CheckpointError(
                f"{path} has groups of {[len(group) for group in groups]} parameters, and the Trainer would make "
                f"groups of {[len(group) for group in expected]} of this model: it trained other parameters, or in "
                "groups of its own, whose order is not known."
            )
        steps = {}
        for number, name in zip(itertools.chain(*groups), itertools.chain(*expected), strict=True):
            slots = state.get(number, {})
            if slots.keys() != {*MOMENTS, "step"}:
                kept = ", ".join(sorted(slots)) or "nothing"
                raise CheckpointError(f"{path} keeps {kept} of {name}; AdamW keeps exp_avg, exp_avg_sq and step.")
            steps[name] = int(slots["step"])
            tensors[name] |= {slot: slots[slot].to(torch.float32) for slot in MOMENTS}
        _check_moments(str(path), tensors, model)
        return _same_step(str(path), steps)


def _trainer_groups(model: PreTrainedModel) -> list[list[str]]:
    """Names of the parameters that decay and of the others, as `Trainer.create_optimizer` puts them into groups."""
    from transformers import Trainer as TransformersTrainer

    itself: Any = None  # the method asks nothing of it
    decaying = set(TransformersTrainer.get_decay_parameter_names(itself, model))
    names = [name for name, _ in model.named_parameters()]
    return [[name for name in names if (name in decaying) is decays] for decays in (True, False)]


class Universal:
    """A universal checkpoint, as DeepSpeed's ds_to_universal.py writes it."""

    kind = "a universal checkpoint of DeepSpeed"

    def __init__(self, folder: Path):
        """Raises CheckpointError if nothing says at which step it was written."""
        self.folder = folder
        self._facts = self._model_states()
        named = re.search(r"global_step(\d+)", folder.name)
        if "global_steps" in self._facts:
            self.step = int(self._facts["global_steps"])
        elif named is not None:
            self.step = int(named[1])
        else:
            raise CheckpointError(
                f"{folder}: its *_model_states.pt does not say at which step it was written; a name like "
                "global_step300_universal would."
            )

    def read(self, model: PreTrainedModel) -> ForeignState:
        """The state of `model` (on the meta device). Raises CheckpointError if it is another model's, or lacks the
        moments of a parameter."""
        shapes = parameter_shapes(model)
        self._check_no_buffers(model)
        where = {folder.name: folder for folder in (self.folder / "zero").iterdir() if (folder / "fp32.pt").is_file()}
        prefix = _common_prefix(where, shapes)
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - shapes.keys()
        there = {name.removeprefix(prefix): folder for name, folder in where.items()}
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, folder in there.items():
            if name not in tied:
                known = self._shape(folder.name) or shapes.get(name)
                tensors[name] = {
                    slot: _tensor(folder / f"{file}.pt", known)
                    for slot, file in ((WEIGHT, "fp32"), *((moment, moment) for moment in MOMENTS))
                    if (folder / f"{file}.pt").is_file()
                }
        saved = {name: tuple(slots[WEIGHT].shape) for name, slots in tensors.items()}
        check_shapes(str(self.folder), saved, shapes)
        _check_moments(str(self.folder), tensors, model)
        steps = {name: int(_load(file)) for name in shapes if (file := there[name] / "step.pt").is_file()}
        left_out = int(self._facts.get("skipped_steps", 0))
        return ForeignState(_same_step(str(self.folder), steps) if steps else self.step - left_out, tensors)

    def _model_states(self) -> dict[str, Any]:
        """What DeepSpeed's engine says of itself; nothing where a program has put other things than tensors beside."""
        for path in sorted(self.folder.glob("*_model_states.pt")):
            try:
                return _load(path)
            except CheckpointError:
                continue
        return {}

    def _shape(self, name: str) -> Shape | None:
        """Of a parameter, by their name, as the engine knew it: ZeRO-3's tensors are flat."""
        groups = self._facts.get("param_shapes") or []
        return next((tuple(group[name]) for group in groups if name in group), None)

    def _check_no_buffers(self, model: PreTrainedModel) -> None:
        buffers = [name for name, _ in persistent_buffers(model)]
        if buffers:
            raise CheckpointError(
                f"{self.folder}: {model.config.model_type} has buffers that belong to its state "
                f"({shorten(buffers)}), and a universal checkpoint has none; it cannot be imported."
            )


def _common_prefix(theirs: dict[str, Path], ours: dict[str, Shape]) -> str:
    """What stands before our names in all of theirs, as `module.` does; nothing where no such thing fits better."""
    found = {name[: -len(own)] for own in ours for name in theirs if name.endswith(f".{own}")} | {""}
    return max(sorted(found, key=len), key=lambda prefix: sum(prefix + own in theirs for own in ours))


def _tensor(path: Path, shape: Shape | None) -> Tensor:
    """The tensor of a file of `zero`, in fp32; a flat one gets `shape` where it has as many elements."""
    value = _load(path)
    value = value["param"] if isinstance(value, dict) and "param" in value else value
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path} holds no tensor.")
    value = value.detach().to(torch.float32)
    flat = value.dim() == 1 and shape is not None and value.numel() == torch.Size(shape).numel()
    return value.view(shape) if flat and shape is not None else value


def _check_moments(where: str, tensors: dict[str, dict[str, Tensor]], model: PreTrainedModel) -> None:
    """Raises CheckpointError where a moment is missing or has another shape than its parameter."""
    for moment in MOMENTS:
        saved = {name: tuple(slots[moment].shape) for name, slots in tensors.items() if moment in slots}
        check_shapes(f"{where} ({moment})", saved, parameter_shapes(model))


def _same_step(where: str, steps: dict[str, int]) -> int:
    if len(set(steps.values())) > 1:
        some = [f"{name} {step}" for name, step in steps.items()]
        raise CheckpointError(f"{where}: parameters were updated differently often ({shorten(some)}).")
    return next(iter(steps.values()))


def _load(path: Path) -> Any:
    """What torch.save has put into a file, if it is tensors and plain containers; the tensors stay on the disk until
    they are used. Raises CheckpointError."""
    if (wrong := wrong_file(path)) is not None:
        raise CheckpointError(wrong)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as tensors alone: {reason}") from None
