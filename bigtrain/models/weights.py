"""Where the first weights come from: drawn from (seed, module name), or a pretrained model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from bigtrain.disk import check_free, make_once
from bigtrain.errors import CheckpointError, ConfigError, shorten
from bigtrain.models.converted import converted_shapes, gguf_shapes
from bigtrain.models.kinds import CAUSAL_LM, auto_class, kind_of, new_head
from bigtrain.pretrained import (
    WEIGHT_FILES,
    arguments,
    files_of,
    find_file,
    opening,
    silenced,
    weight_files,
    wrong_file,
)
from bigtrain.state import BUFFER, WEIGHT, Overlay, Shape, StateReader, lies_inside
from bigtrain.tensor_files import Stored, UnknownDtype, read_header
from bigtrain.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PRETRAINED = "model.from_pretrained"  # the key of the run's file that most messages are about
Found = TypeVar("Found", Stored, Tensor)


class PretrainedFiles:
    """Reads the parameters and buffers of a pretrained model from its safetensors files, and no more than is asked for.

    `stored`: where each of them lies; `dtypes`: what each is to be.
    """

    def __init__(self, stored: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype]):
        self._stored = stored
        self._dtypes = dtypes

    def slots_of(self, name: str) -> tuple[str, ...]:  # noqa: ARG002
        return (WEIGHT, BUFFER)

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> Tensor:
        if slot not in (WEIGHT, BUFFER) or name not in self._stored:
            raise CheckpointError(f"{name}: the pretrained model has no such {slot}.")
        try:
            return self._stored[name].read(offsets, lengths).to(self._dtypes[name])
        except OSError as error:
            raise CheckpointError(f"{self._stored[name].path} cannot be read: {error}") from None


class RandomWeights:
    """Initial weights as transformers draws them, one module at a time and each from (seed, module name).

    Every layout of processes reads the same values, and only one module's parameters are in memory at once.

    `model` has its parameters on the meta device. Raises CheckpointError for a parameter that the architecture's
    `_init_weights` leaves untouched.
    """

    def __init__(self, model: PreTrainedModel, seed: int):
        self._model = model
        self._seed = seed
        self._drawn = ""  # the module that _values belongs to
        self._values: dict[str, Tensor] = {}

    def slots_of(self, name: str) -> tuple[str, ...]:  # noqa: ARG002
        return (WEIGHT,)

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
    if not lies_inside(tensor.shape, offsets, lengths):
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


def pretrained_weights(
    source: str, empty: PreTrainedModel, seed: int, folder: Path, tell: Callable[[str], None]
) -> StateReader:
    """The weights of a model's folder, Hub id or .gguf file, read no further than they are asked for.

    `empty` is the model that they are for. Where its names and shapes are those of the safetensors files, the reader
    takes from these what it is asked for. Else the reason is told, and the first of all processes has transformers
    read the whole model into host memory, in fp32, and writes it to `folder` for all of them.
    An embedding with fewer rows than that of `empty` grows; the new rows are drawn around the mean of the old ones
    (Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021). What the files lack of a task's
    head (`new_head`) is drawn as RandomWeights does. Nothing else is ever drawn.

    Raises ConfigError for a model that cannot be opened, lacks a tensor or has one of another shape; DataError for a
    disk without room for `folder`.
    """
    try:
        found = _for_all(_published(source, empty), empty)
    except _OnlyWhole as reason:
        tell(str(reason))
        make_once(folder, partial(_write_whole, source, empty, seed))
        found = _for_all(dict(read_header(folder / "model.safetensors")), empty)
    dtypes = {name: tensor.dtype for name, tensor in empty.state_dict(keep_vars=True).items()}
    files = PretrainedFiles(found, dtypes)
    drawn = new_head(empty) - found.keys()
    return Overlay(files, RandomWeights(empty, seed), drawn) if drawn else files


def check_folder(source: str, empty: PreTrainedModel, grows: bool) -> None:
    """Look at the names and shapes in a pretrained model's files, where these are on this disk.

    grows: whether the vocabulary of `empty` may have more rows than theirs. Raises ConfigError for a file that is
    missing or not whole, and for a parameter that they lack or have in another shape. Of quantized models, and of those
    that are put together from several ones, only reading them tells.
    """
    if not Path(source).expanduser().exists():
        return
    try:
        _for_all(_published(source, empty), empty)
    except _OnlyWhole:
        files = [file for file in files_of(source) if file.suffix in WEIGHT_FILES]
        told = [wrong for file in files if (wrong := wrong_file(file))] if files else [f"no weights are in {source}."]
        if told:
            raise ConfigError(f"{PRETRAINED}: {source} cannot be opened: {told[0]}") from None
        with opening(source, PRETRAINED):
            shapes = gguf_shapes(files[0], empty) if "gguf_file" in arguments(source)[1] else _converted(source, empty)
        if shapes is not None:
            _check_parameters(source, shapes, empty, grows)


def _converted(source: str, empty: PreTrainedModel) -> dict[str, Shape] | None:
    try:
        return converted_shapes(_files(source, empty), empty)
    except _OnlyWhole:
        return None


def load_whole(source: str, key: str, dtype: torch.dtype | str, like: PreTrainedModel | None = None) -> Any:
    """A pretrained model as transformers reads and converts it. What its files hold too much of is told.

    like: a model of the same kind and configuration; None: a causal language model, by its own config.json.

    Raises ConfigError, about `key`, for a model that cannot be opened, or lacks a parameter or has one of another
    shape: transformers would draw it at random.
    """
    from transformers import GgufConfig

    name, options = arguments(source)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        weight_files(source, key)  # transformers would follow an index out of its folder
    auto = auto_class(CAUSAL_LM if like is None else kind_of(like))
    if like is not None and new_head(like):
        options["config"] = like.config
    with opening(source, key), silenced():  # its table of what was drawn, left out and renamed
        model, info = auto.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    parameters = {name for name, _ in model.named_parameters()}
    _refuse_lacking(source, sorted(parameters & info["missing_keys"] - new_head(model)), key)
    for name, there, wanted in sorted(info["mismatched_keys"]):
        _refuse_shape(source, name, tuple(there), tuple(wanted), key)
    if info["unexpected_keys"]:
        left_out = shorten(sorted(info["unexpected_keys"]))
        say(f"{source}: {model.config.model_type} has no use for {left_out}; left out.", error=True)
    return model


def _refuse_lacking(source: str, names: list[str], key: str = PRETRAINED) -> None:
    if names:
        raise ConfigError(
            f"{key}: the files of {source} lack {shorten(names)}, which its config.json asks for, and nothing is drawn "
            "at random in their place. Fetch the model again, or mend its config.json."
        )


def _refuse_shape(source: str, name: str, there: Shape, wanted: Shape, key: str = PRETRAINED) -> NoReturn:
    raise ConfigError(
        f"{key}: {name} has shape {there} in the files of {source}, and {wanted} by its config.json. Fetch the model "
        "again, or mend its config.json."
    )


class _OnlyWhole(Exception):
    """A pretrained model cannot be read in parts; the message says why."""


def _write_whole(source: str, empty: PreTrainedModel, seed: int, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    vocab_size = empty.config.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_hash(seed, "added tokens"))
        model = load_whole(source, PRETRAINED, torch.float32, empty)
        if model.get_input_embeddings().num_embeddings < vocab_size:
            model.resize_token_embeddings(vocab_size)
    unique = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in unique.values()}
    try:
        _for_all(tensors, empty)
        check_free(folder, sum(tensor.nbytes for tensor in tensors.values()), f"{source}, as transformers converts it,")
        save_file(tensors, folder / "model.safetensors")
    except _OnlyWhole as reason:
        raise ConfigError(f"{PRETRAINED}: {source} does not fit the model: {reason}.") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{source}, as transformers converts it, cannot be written to {folder}: {error}"
        ) from None
    (folder / "manifest.json").write_text(json.dumps({"from": source}) + "\n", encoding="utf-8")


def _published(source: str, empty: PreTrainedModel) -> dict[str, Stored]:
    """Where the files of a model have each tensor of `empty`.

    Raises _OnlyWhole where transformers does more than to give each tensor of the files to the parameter or buffer
    of its name, or would have something to say about them.
    """
    stored: dict[str, Stored] = {}
    files = _files(source, empty)
    if not files or files[0].suffix != ".safetensors":
        raise _OnlyWhole("it has no model.safetensors")
    for path in files:
        try:
            stored.update(read_header(path))
        except UnknownDtype as error:
            raise _OnlyWhole(str(error)) from None
        except (CheckpointError, OSError) as error:
            raise ConfigError(f"{PRETRAINED}: {source} cannot be opened: {error}") from None
    return _by_parameter(source, stored, empty, empty.state_dict(keep_vars=True))


def _for_all(found_by_name: Mapping[str, Found], empty: PreTrainedModel) -> dict[str, Found]:
    """What was found, by each of the names that a tensor has in `empty`. Raises _OnlyWhole where one lacks, or is
    another there."""
    tensors: dict[str, Tensor] = empty.state_dict(keep_vars=True)
    named, head = dict(found_by_name), new_head(empty)
    for names in _aliases(tensors):
        there = [name for name in names if name in named]
        if not there and names[0] in head:
            continue
        if not there:
            raise _OnlyWhole(f"its files lack {names[0]}")
        for name in names:
            found = named.setdefault(name, named[there[0]])
            if found.shape != tuple(tensors[name].shape):
                raise _OnlyWhole(
                    f"{name} has shape {tuple(found.shape)} there and {tuple(tensors[name].shape)} in the model"
                )
            if tensors[name].is_floating_point() and not found.dtype.is_floating_point:
                raise _OnlyWhole(f"{name} is stored as {found.dtype}")
    return named


def _aliases(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """The names of each tensor: tied parameters have several, and are stored once."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    return aliases.values()


def _check_parameters(source: str, shapes: Mapping[str, Shape], empty: PreTrainedModel, grows: bool) -> None:
    """Raises ConfigError for a parameter that the files lack or have in another shape; a vocabulary may grow if it
    `grows`."""
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    lacking = {names[0] for names in _aliases(parameters) if not any(name in shapes for name in names)}
    _refuse_lacking(source, sorted(lacking - new_head(empty)))
    embeddings = (empty.get_input_embeddings(), empty.get_output_embeddings())
    vocabulary = {id(parameter) for module in embeddings if module is not None for parameter in module.parameters()}
    for name, parameter in parameters.items():
        wanted = tuple(parameter.shape)
        there = shapes.get(name, wanted)
        grown = grows and id(parameter) in vocabulary and there[1:] == wanted[1:] and there[:1] < wanted[:1]
        if there != wanted and not grown:
            _refuse_shape(source, name, there, wanted)


def _files(source: str, empty: PreTrainedModel) -> list[Path]:
    """The files of weights that transformers would read. Raises _OnlyWhole where it reads more than these."""
    from transformers.utils import is_peft_available

    name, options = arguments(source)
    config: Any = empty.config
    if "gguf_file" in options:
        raise _OnlyWhole("it is a .gguf file")
    if getattr(config, "quantization_config", None) is not None:
        raise _OnlyWhole("it is quantized")
    changed = [key for key in ("transformers_weights", "fusion_config") if getattr(config, key, None) is not None]
    if changed or config.extra_files or (is_peft_available() and find_file(name, "adapter_config.json")):
        raise _OnlyWhole("it is put together from other files than its model.safetensors")
    return weight_files(source, PRETRAINED)


def _by_parameter(
    source: str, stored: dict[str, Stored], empty: PreTrainedModel, tensors: dict[str, Tensor]
) -> dict[str, Stored]:
    """The tensors of the files by the names that transformers gives them in the model; each parameter is there.

    Raises ConfigError for one that is not, _OnlyWhole if it makes other tensors of one of them, or knows no use for it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(empty)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    prefix = empty.base_model_prefix
    named: dict[str, Stored] = {}
    others = set()
    for key in sorted(stored, key=dot_natural_key):  # a renaming may remember what it has seen
        name, converted = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:
            name, converted = rename_source_key(key, [], [], prefix, tensors)
        if converted is not None:
            raise _OnlyWhole(f"transformers converts {key} for {empty.config.model_type}")
        if name in named:
            raise _OnlyWhole(f"its files have {name} more than once")
        if name in tensors:
            named[name] = stored[key]
        else:
            others.add(name)
    _check_parameters(source, {name: found.shape for name, found in named.items()}, empty, grows=True)
    keys: Any = SimpleNamespace(missing_keys=set(), unexpected_keys=others)
    empty._adjust_missing_and_unexpected_keys(keys)  # private: takes away what an architecture ignores
    if keys.unexpected_keys:
        raise _OnlyWhole(f"its files hold what {empty.config.model_type} has no use for: {shorten(sorted(others))}")
    return named
