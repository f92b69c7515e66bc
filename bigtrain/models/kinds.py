"""Kinds of models: which class of transformers builds one, and which head it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Kind(NamedTuple):
    """auto: transformers' class. families: transformers' table of the model types that it builds. pipeline: the Hub's
    name for what it does. what: in messages."""

    auto: str
    families: str
    pipeline: str
    what: str


CAUSAL_LM = "causal_lm"
KINDS = {
    CAUSAL_LM: Kind(
        "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation", "causal language model"
    ),
    "sequence_classification": Kind(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "text-classification",
        "text classifier",
    ),
}


def auto_class(kind: str) -> Any:
    """The class of transformers that builds models of a kind."""
    import transformers

    return getattr(transformers, KINDS[kind].auto)


def families(kind: str) -> dict[str, str]:
    """The model types that a kind can be built of."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, KINDS[kind].families)


def kind_of(model: PreTrainedModel) -> str:
    """The kind that a model was built as."""
    for kind in KINDS:
        if type(model).__name__ in families(kind).values():
            return kind
    raise ValueError(f"{type(model).__name__} is of no known kind")


def new_head(model: PreTrainedModel) -> frozenset[str]:
    """The parameters of a task's head, which may be drawn at random: those outside of the base model, unless they
    predict tokens."""
    base = f"{model.base_model_prefix}."
    if model.get_output_embeddings() is not None or model.base_model is model:
        return frozenset()
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(base))
