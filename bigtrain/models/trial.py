"""Whether a model can be built and trained as its run's file says, found out before anything is loaded or written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtrain.config.schema import Model
from bigtrain.errors import ConfigError
from bigtrain.models.causal_lm import check_isolated, empty_model, model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def try_architecture(
    model: Model, entries: int, *, attention: str, isolates: bool, added_tokens: bool = False
) -> PreTrainedModel:
    """The model on the meta device, as it would be for a tokenizer of `entries` ids. Loads and writes nothing.

    isolates: whether it has to keep the documents of a sequence apart.
    Raises ConfigError for keys and values that transformers refuses, if it cannot keep documents apart, and for a
    pretrained model on this disk that is not whole.
    """
    from huggingface_hub.errors import StrictDataclassError

    from bigtrain.models.weights import check_folder

    stands_in: Any = _Tokenizer(entries)
    try:
        config = model_config(model, stands_in, added_tokens)
        if isolates:
            check_isolated(config)
        attention = "eager" if attention == "flash" else attention  # its package need not be where one only looks
        empty = empty_model(config, attention=attention, activation_checkpointing="none", meta=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        key = next(name for name, value in model if value is not None)
        reason = f"KeyError: {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ConfigError(f"model.{key}: transformers cannot build this architecture: {reason}") from error
    if model.from_pretrained is not None:
        check_folder(model.from_pretrained, empty)
    return empty


class _Tokenizer:
    """As much of a tokenizer as an architecture asks for: its length."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, entries: int):
        self.entries = entries

    def __len__(self) -> int:
        return self.entries
