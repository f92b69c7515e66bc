"""What transformers makes of the files of a pretrained model, told from the names and shapes in them: no weights are
read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch

from bigtrain.state import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def converted_shapes(files: list[Path], empty: PreTrainedModel) -> dict[str, Shape]:
    """The shape that each tensor of `empty` would have, by its name, of those that .safetensors or .bin files give it.

    Raises what transformers or torch raises for a file that cannot be read.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= _on_meta(file)
    model: Any = copy.deepcopy(empty)
    mapping: Any = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.float32, weight_mapping=mapping)
    info, _ = convert_and_load_state_dict_in_model(model, tensors, how)
    model._adjust_missing_and_unexpected_keys(info)  # private: takes away what an architecture ignores
    there = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items() if name not in info.missing_keys}
    return there | {name: tuple(shape) for name, shape, _ in info.mismatched_keys}


def _on_meta(file: Path) -> dict[str, Any]:
    from transformers.modeling_utils import load_state_dict

    if file.suffix == ".safetensors":
        return load_state_dict(file, map_location="meta")
    # what is not mapped is read, to be thrown away; files of before torch 1.6 cannot be mapped
    return torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))


def gguf_shapes(file: Path, empty: PreTrainedModel) -> dict[str, Shape]:
    """As `converted_shapes`, for a .gguf file, by its names alone: a tensor is there unless the name that it has in
    such files is known and is none of this one's."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.integrations.gguf.reader import read_gguf_metadata
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    metadata, names = read_gguf_metadata(str(file))
    found = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    architecture = metadata["general.architecture"]
    architectures = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    if is_gguf_arch_supported(architecture) or architecture not in architectures:  # transformers has names of its own
        return found
    known = get_tensor_name_map(architectures[architecture], empty.config.num_hidden_layers)
    wanted = {name: known.get_name(name, (".weight", ".bias")) for name in found if name.endswith((".weight", ".bias"))}
    return {name: shape for name, shape in found.items() if wanted.get(name) in {None, *names}}
