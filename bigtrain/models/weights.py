"""Where the first weights come from: drawn from (seed, module name), or a pretrained model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigtrain.errors import CheckpointError
from bigtrain.pretrained import arguments, opening
from bigtrain.state import WEIGHT, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelWeights:
    """Reads the parameters of a model in memory."""

    slots = (WEIGHT,)

    def __init__(self, model: nn.Module):
        self._parameters = dict(model.named_parameters())

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> Tensor:
        if slot != WEIGHT or name not in self._parameters:
            raise CheckpointError(f"{name}: the pretrained model has no such {slot}.")
        return cut(self._parameters[name].detach(), offsets, lengths)


class RandomWeights:
    """Initial weights as transformers draws them, one module at a time and each from (seed, module name).

    Every layout of processes reads the same values, and only one module's parameters are in memory at once.

    `model` has its parameters on the meta device. Raises CheckpointError for a parameter that the architecture's
    `_init_weights` leaves untouched.
    """

    slots = (WEIGHT,)

    def __init__(self, model: PreTrainedModel, seed: int):
        self._model = model
        self._seed = seed
        self._drawn = ""  # the module that _values belongs to
        self._values: dict[str, Tensor] = {}

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> Tensor:
        assert slot == WEIGHT, slot
        module_name, _, parameter_name = name.rpartition(".")
        if module_name != self._drawn or not self._values:
            self._values = self._draw(module_name)
            self._drawn = module_name
        return cut(self._values[parameter_name], offsets, lengths)

    @torch.no_grad()
    def _draw(self, module_name: str) -> dict[str, Tensor]:
        """Make this module's own parameters real and let it and all modules around it initialise them: a
        parent may overwrite what its child drew. What they do to other parameters happens on meta, to nobody."""
        from transformers.initialization import guard_torch_init_functions

        module = self._model.get_submodule(module_name)
        meta = dict(module._parameters)
        real = {
            name: nn.Parameter(torch.full(parameter.shape, torch.nan))
            for name, parameter in meta.items()
            if parameter is not None
        }
        module._parameters.update(real)
        try:
            with guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
                for ancestor, initialise in _ancestors(self._model, module_name):
                    torch.manual_seed(_hash(self._seed, module_name, ancestor))
                    initialise(self._model.get_submodule(ancestor))
        finally:
            module._parameters.update(meta)
        for name, value in real.items():
            if value.isnan().any():
                raise CheckpointError(
                    f"{module_name}.{name}: {type(self._model).__name__} does not say how to initialise it; "
                    "start from a pretrained model."
                )
        return {name: value.detach() for name, value in real.items()}


def cut(tensor: Tensor, offsets: Shape, lengths: Shape) -> Tensor:
    """The box of a tensor that begins at `offsets`; CheckpointError where it lies outside."""
    if len(offsets) != tensor.dim() or any(
        o + n > size for o, n, size in zip(offsets, lengths, tensor.shape, strict=True)
    ):
        raise CheckpointError(f"the box {offsets} + {lengths} does not fit a tensor of shape {tuple(tensor.shape)}")
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dimension, offset, length)
    return tensor


def _ancestors(model: PreTrainedModel, name: str) -> list[tuple[str, Callable[[nn.Module], None]]]:
    """(module name, its initialising function) from the module itself up to the root; the function is that
    of the nearest PreTrainedModel at or above it, as transformers dispatches it."""
    from transformers import PreTrainedModel

    parts = name.split(".") if name else []
    owner, path = model, []
    for i in range(len(parts) + 1):
        prefix = ".".join(parts[:i])
        module = model.get_submodule(prefix)
        if isinstance(module, PreTrainedModel):
            owner = module
        path.append((prefix, owner._init_weights))
    return path[::-1]


def _hash(seed: int, *names: str) -> int:
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def pretrained_weights(source: str, vocab_size: int, seed: int) -> ModelWeights:
    """The weights of a folder, Hub id or .gguf file, read by transformers into host memory in fp32.

    An embedding with fewer than `vocab_size` rows grows; the new rows are drawn around the mean of the old ones
    (Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021).
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    name, options = arguments(source)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with opening(source, "model.from_pretrained"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_hash(seed, "added tokens"))
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
        if model.get_input_embeddings().num_embeddings < vocab_size:
            model.resize_token_embeddings(vocab_size)
    return ModelWeights(model)
