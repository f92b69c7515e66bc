"""Architectures of transformers: their configuration, and models built empty, whose weights a StateReader gives."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config.files import literal
from bigtrain.config.origin import Origin
from bigtrain.config.schema import ModelConfig
from bigtrain.data.tokenizer import num_ids
from bigtrain.errors import ConfigError, nearest
from bigtrain.models.freeze import freeze as freeze_parameters
from bigtrain.models.kinds import CAUSAL_LM, KINDS, auto_class, families
from bigtrain.pretrained import arguments, opening
from bigtrain.state import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Keys of a published config.json that are about the file, or that no model is built from.
ABOUT_THE_FILE = frozenset(
    {"auto_map", "is_llama_config", "n_ctx", "task_specific_params", "transformers.js_config", "transformers_version"}
)
# (key of a configuration, a key of published ones that transformers reads too where it has the first)
PUBLISHED = (
    ("rope_parameters", "rope_theta"),
    ("rope_parameters", "rope_scaling"),
    ("rope_parameters", "partial_rotary_factor"),
    ("num_attention_heads", "head_dim"),
)
ATTENTION = {"flash": "flash_attention_2", "flex": "flex_attention"}  # where transformers' names are not ours


def model_config(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, added_tokens: bool = False, kind: str = CAUSAL_LM
) -> PreTrainedConfig:
    """The transformers configuration that the run's file asks for; with `added_tokens` a pretrained model's
    vocabulary grows to the tokenizer's.

    Raises ConfigError for an unknown architecture or key, and when the tokenizer has ids that the embedding lacks.
    """
    from transformers import AutoConfig

    if model.from_run is not None:
        config = kept_config(Origin.of(model.from_run).architecture)
    elif model.from_pretrained is not None:
        name, options = arguments(model.from_pretrained)
        with opening(model.from_pretrained, "model.from_pretrained"):
            config = AutoConfig.from_pretrained(name, **options)
        if added_tokens:
            config.vocab_size = max(config.vocab_size, num_ids(tokenizer))
    else:
        config = _from_dict(model.from_config or {}, tokenizer, kind)
    if (needed := num_ids(tokenizer)) > config.vocab_size:
        raise ConfigError(
            f"model: the tokenizer's largest id is {needed - 1}, and the model's embedding has only "
            f"{config.vocab_size} rows; raise model.from_config.vocab_size or use the tokenizer that belongs to the "
            "model."
        )
    return config


def with_task(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a configuration with what a task says of it (`Task.model_values`)."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        setattr(config, name, value)
    return config


def keep_config(model: ModelConfig, config: PreTrainedConfig, folder: Path) -> None:
    """Save a configuration where `kept_config` finds it, and beside it what the model says of its generation."""
    from transformers.utils import cached_file

    config.to_json_file(folder / "config.json")
    source = str(Origin.of(model.from_run).architecture) if model.from_run is not None else model.from_pretrained
    if source is not None and not source.endswith(".gguf"):
        with suppress(OSError):  # how transformers says that the model has none
            shutil.copy(str(cached_file(arguments(source)[0], "generation_config.json")), folder)


def kept_config(folder: Path) -> PreTrainedConfig:
    """The configuration that a run keeps. Raises ConfigError if it cannot be read."""
    from transformers import AutoConfig

    with opening(str(folder), "model.from_run"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _from_dict(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, kind: str) -> PreTrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = copy.deepcopy(
        {key: value for key, value in values.items() if key not in ABOUT_THE_FILE}
    )  # it changes them
    architecture = values.pop("model_type")
    if architecture not in families(kind):
        hint = nearest(architecture, families(kind))
        what = KINDS[kind].what
        raise ConfigError(f"model.from_config.model_type: no {what} {literal(architecture)} in transformers; {hint}")
    configuration = CONFIG_MAPPING[architecture]
    known = {*configuration().to_dict(), *configuration.attribute_map, "torch_dtype"}
    known |= {new for old, new in PUBLISHED if old in known}
    for key in values:
        if key not in known and not _converts(configuration, key, values[key]):
            raise ConfigError(f"model.from_config.{key}: {architecture} has no such key; {nearest(key, known)}")
    values.setdefault("vocab_size", num_ids(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(name, getattr(tokenizer, name))
    return configuration(**values)


def _converts(kind: type[PreTrainedConfig], key: str, value: Any) -> bool:
    """Whether a configuration class makes something else of a key that it does not have: one that it has no use for it
    keeps as it is."""
    try:
        return key not in vars(kind(**{key: copy.deepcopy(value)}))
    except Exception:  # noqa: BLE001 - it looks at the value: building the model will tell what is wrong
        return True


def dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """The probabilities of dropout that are above 0, by their key."""
    known = config.to_dict().items()
    named = {k: v for k, v in known if "dropout" in k or k.endswith("pdrop")}
    other_heads = ("summary_", "classifier_")  # of other tasks than a causal language model
    return {k: v for k, v in named.items() if not k.startswith(other_heads) and isinstance(v, float) and v > 0}


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer in place, as one graph; layers that are alike share it. Names stay as they are."""
    import torch

    for module in repeated_layers(model):
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that an architecture is made of, as transformers names them."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def empty_model(
    config: PreTrainedConfig,
    *,
    attention: str,
    activation_checkpointing: str,
    freeze: Sequence[str] = (),
    meta: bool = False,
    kind: str = CAUSAL_LM,
) -> PreTrainedModel:
    """The model of a kind (`bigtrain.models.kinds`) in fp32, in training mode, its parameters not initialised; with
    `meta` they take no memory at all. `attention` is sdpa, eager, flash or flex; `freeze` names what does not
    train.

    Buffers are real either way: they hold what the architecture computes (rotary frequencies).
    """
    import torch
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False) if meta else nullcontext(), no_init_weights():
        model = auto_class(kind).from_config(
            config, attn_implementation=ATTENTION.get(attention, attention), dtype=torch.float32
        )
    model.tie_weights()  # both contexts leave it undone
    if activation_checkpointing == "full":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    freeze_parameters(model, freeze)
    return model.train()


def parameter_shapes(model: nn.Module) -> dict[str, Shape]:
    """Of each parameter by its name, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the state: those that the model's state dict has.

    Found without asking for that dict, which would make FSDP reshard on the rank that asks.
    """
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
