"""Whether a model can be built, initialised and trained as its run's file says, found out on the meta device before
anything is loaded or written."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bigtrain.config.schema import ModelConfig
from bigtrain.errors import BigtrainError, ConfigError, shorten
from bigtrain.models.architecture import empty_model, model_config, repeated_layers, with_task
from bigtrain.models.families import check_document_mask
from bigtrain.models.kinds import CAUSAL_LM
from bigtrain.pretrained import silenced

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from bigtrain.tasks import Task

TRIED_TOKENS = 4  # of the sequence that is tried


def try_architecture(
    model: ModelConfig,
    entries: int,
    *,
    attention: str,
    needs_document_mask: bool,
    added_tokens: bool = False,
    longest: int = 0,
    task: Task | None = None,
) -> PreTrainedModel:
    """The model on the meta device, as it would be for a tokenizer of ids below `entries`. Loads and writes nothing.

    needs_document_mask: whether documents of a sequence must not attend to each other. longest: tokens of the longest
    sequence. task: whose kind of model it is; None: a causal language model.
    Raises ConfigError for keys and values that transformers or torch refuses when it is built, initialised or run, if
    it cannot keep documents apart, and for a pretrained model on this disk that is not whole.
    """
    from bigtrain.models.weights import check_folder

    attention = "eager" if attention == "flash" else attention  # its package need not be where one only looks
    with silenced():
        empty = _Trial(model, entries, attention, needs_document_mask, added_tokens, task).tried()
    _check_positions(model, empty, longest)
    if model.from_pretrained is not None:
        check_folder(model.from_pretrained, empty, grows=added_tokens)
    return empty


@dataclass(frozen=True)
class _Trial:
    model: ModelConfig
    entries: int
    attention: str
    needs_document_mask: bool
    added_tokens: bool
    task: Task | None

    @property
    def _kind(self) -> str:
        return CAUSAL_LM if self.task is None else self.task.model_kind

    def tried(self) -> PreTrainedModel:
        try:
            empty = self._built()
        except BigtrainError:
            raise
        except Exception as error:
            raise ConfigError(_refusal(self.model, error, self._to_blame(error))) from error
        try:
            if self.model.from_config is not None:
                _try_step(empty.config, self._kind)
        except Exception as error:
            # with nothing to blame it may be the meta device, on which not every architecture runs
            if keys := self._to_blame(error):
                raise ConfigError(_refusal(self.model, error, keys)) from error
        return empty

    def _built(self) -> PreTrainedModel:
        stands_in: Any = _Tokenizer(self.entries)
        config = model_config(self.model, stands_in, self.added_tokens, self._kind)
        if self.needs_document_mask:
            check_document_mask(config)
        _check_values(config, self.model.from_config or {})
        config = with_task(config, {} if self.task is None else self.task.model_values)
        options: dict[str, Any] = {"activation_checkpointing": "none", "meta": True, "kind": self._kind}
        empty = empty_model(config, attention=self.attention, **options)
        broken = [name for name, buffer in empty.named_buffers() if buffer.is_floating_point() and buffer.isnan().any()]
        if broken:
            raise ValueError(f"{shorten(broken)} would hold numbers that are not finite")
        if not repeated_layers(empty):
            raise ValueError("the model would have no layers")
        return empty

    def _to_blame(self, error: Exception) -> list[str]:
        """The keys of `from_config` that an error names, or else each one without which, or with 1, there would be
        none."""
        given = self.model.from_config or {}
        field = re.search(r"error for field '(\w+)'", str(error))
        if field is not None and field[1] in given:
            return [field[1]]

        def works(values: dict[str, Any]) -> bool:
            other = replace(self, model=ModelConfig(from_config=values), needs_document_mask=False)
            try:
                _try_step(other._built().config, self._kind)
            except Exception:  # noqa: BLE001 - whatever it is, this key alone is not to blame
                return False
            return True

        keys = [key for key in given if key != "model_type"]
        without = {key: {name: value for name, value in given.items() if name != key} for key in keys}
        blamed = [key for key in keys if works(without[key])] or [key for key in keys if works(given | {key: 1})]
        return sorted(blamed, key=lambda key: not _is_negative(given[key]))  # the likelier ones first


def _check_positions(model: ModelConfig, empty: PreTrainedModel, longest: int) -> None:
    positions = getattr(empty.config, "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        key = "model.from_config.max_position_embeddings" if model.from_config else "sequence_length"
        raise ConfigError(f"{key}: the model has {positions} positions, and a stage has sequences of {longest} tokens.")


def _check_values(config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """Raises ConfigError for values with which everything runs and nothing is right."""
    for key, value in given.items():
        at = f"model.from_config.{key}"
        if key in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            for token in value if isinstance(value, list) else [value]:
                if type(token) is not int or not 0 <= token < config.vocab_size:
                    raise ConfigError(f"{at}: {token} is no id of the vocabulary, 0 to {config.vocab_size - 1}.")
        if re.search(r"(^|_)(eps|epsilon)$", key) and isinstance(value, int | float) and value < 0:
            raise ConfigError(f"{at}: must be at least 0, got {value}.")
        dtype: Any = config.dtype
        if key in ("dtype", "torch_dtype") and dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"{at}: {value} is no floating-point type, like float32 or bfloat16.")


def _try_step(config: PreTrainedConfig, kind: str) -> None:
    """Initialise and run a model once, forward and backward, of each kind of its layers one."""
    import torch
    from transformers.initialization import guard_torch_init_functions

    config = copy.deepcopy(config)
    model: Any = empty_model(config, attention="eager", activation_checkpointing="none", meta=True, kind=kind)
    model.to("meta", torch.bfloat16)  # there experts are computed together in no other type
    with torch.no_grad(), guard_torch_init_functions():
        for module in {_kind(module): module for module in model.modules()}.values():
            model._init_weights(module)
    ids = torch.zeros(1, TRIED_TOKENS, dtype=torch.long, device="meta")
    mask = torch.zeros(
        1, 1, TRIED_TOKENS, TRIED_TOKENS, dtype=torch.bfloat16, device="meta"
    )  # without one values are looked at
    _run_each_kind_once(repeated_layers(model))
    model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()


def _run_each_kind_once(layers: list[nn.Module]) -> None:
    """Let layers give what the first of their kind has given, so that a deep model takes as long as a flat one."""
    given: dict[Any, Any] = {}

    def first_or_same(forward: Any, kind: Any, *args: Any, **kwargs: Any) -> Any:
        if kind not in given:
            given[kind] = forward(*args, **kwargs)
        return given[kind]

    for layer in layers:
        layer.forward = partial(first_or_same, layer.forward, _kind(layer))


def _kind(module: nn.Module) -> Any:
    """The same of modules that compute the same with other parameters."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    return type(module), shapes, getattr(module, "attention_type", None)


def _refusal(model: ModelConfig, error: Exception, keys: list[str]) -> str:
    """What transformers or torch refuses, and the keys that are to blame."""
    reason = " ".join(str(error).split()).removeprefix(f"Validation error for field '{keys[0] if keys else ''}': ")
    reason = f"{type(error).__name__}: {reason}" if isinstance(error, KeyError | AssertionError) else reason
    given = model.from_config
    if given is None or not keys:
        key = next(name for name, value in model if value is not None)
        return f"model.{key}: transformers cannot build this architecture: {reason}"
    others = ", ".join(f"{key} ({given.get(key)})" for key in keys[1:])
    also = f" Or change {others}." if others else ""
    value = given.get(keys[0])
    return f"model.from_config.{keys[0]}: no model can be built and trained with {value}: {reason.rstrip('.')}.{also}"


def _is_negative(value: Any) -> bool:
    return isinstance(value, int | float) and value < 0


class _Tokenizer:
    """As much of a tokenizer as an architecture asks for: its ids."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, entries: int):
        self.entries = entries

    def get_vocab(self) -> dict[str, int]:
        return {"": self.entries - 1}
