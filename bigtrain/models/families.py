"""What is known of architectures beyond what transformers says, and which test has shown it.

A family gets a fact once its test passes; the tests run over this table:

plain_head      tests/unit/test_loss.py, test_logits_are_the_heads_alone
document_mask   tests/unit/test_isolation.py, test_the_first_document_changes_nothing_of_the_second and the others
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bigtrain.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


class Family(NamedTuple):
    """plain_head: the logits of a causal model are its output head applied to the last hidden states, and nothing else.
    document_mask: positions that begin anew with each document keep the documents of a sequence apart."""

    plain_head: bool = False
    document_mask: bool = False


FAMILIES = {  # by transformers' model_type
    "apertus": Family(plain_head=True, document_mask=True),
    "arcee": Family(plain_head=True, document_mask=True),
    "cohere": Family(document_mask=True),
    "cohere2": Family(document_mask=True),
    "deepseek_v3": Family(document_mask=True),
    "ernie4_5": Family(plain_head=True, document_mask=True),
    "ernie4_5_moe": Family(document_mask=True),
    "exaone4": Family(plain_head=True, document_mask=True),
    "gemma": Family(plain_head=True, document_mask=True),
    "gemma2": Family(document_mask=True),
    "gemma3_text": Family(plain_head=True, document_mask=True),
    "glm": Family(plain_head=True, document_mask=True),
    "glm4": Family(plain_head=True, document_mask=True),
    "glm4_moe": Family(document_mask=True),
    "gpt2": Family(plain_head=True, document_mask=True),
    "gpt_neox": Family(plain_head=True, document_mask=True),
    "gpt_oss": Family(plain_head=True),
    "granite": Family(document_mask=True),
    "granitemoe": Family(document_mask=True),
    "helium": Family(plain_head=True, document_mask=True),
    "hunyuan_v1_dense": Family(document_mask=True),
    "llama": Family(plain_head=True, document_mask=True),
    "ministral": Family(plain_head=True, document_mask=True),
    "mistral": Family(plain_head=True, document_mask=True),
    "mixtral": Family(plain_head=True, document_mask=True),
    "nemotron": Family(plain_head=True, document_mask=True),
    "olmo": Family(plain_head=True, document_mask=True),
    "olmo2": Family(plain_head=True, document_mask=True),
    "olmo3": Family(plain_head=True, document_mask=True),
    "olmoe": Family(document_mask=True),
    "phi": Family(plain_head=True, document_mask=True),
    "phi3": Family(plain_head=True, document_mask=True),
    "qwen2": Family(plain_head=True, document_mask=True),
    "qwen2_moe": Family(plain_head=True, document_mask=True),
    "qwen3": Family(plain_head=True, document_mask=True),
    "qwen3_moe": Family(plain_head=True, document_mask=True),
    "seed_oss": Family(plain_head=True, document_mask=True),
    "smollm3": Family(plain_head=True, document_mask=True),
    "stablelm": Family(plain_head=True, document_mask=True),
    "starcoder2": Family(plain_head=True, document_mask=True),
}
MASKED_LAYERS = frozenset({"full_attention", "sliding_attention"})  # what `layer_types` of these may name


def plain_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that alone makes a causal model's logits from its last hidden states; None where more is done to them
    (caps, scales), or no test has shown it."""
    config = model.config
    scaled = getattr(config, "final_logit_softcapping", None) is not None
    known = FAMILIES.get(config.model_type, Family())
    return model.get_output_embeddings() if known.plain_head and not scaled else None


def check_document_mask(config: PreTrainedConfig) -> None:
    """Raises ConfigError for an architecture that is not shown to keep the documents of a sequence apart."""
    others = set(getattr(config, "layer_types", None) or ()) - MASKED_LAYERS
    if FAMILIES.get(config.model_type, Family()).document_mask and not others:
        return
    why = f"has layers of the kind {', '.join(sorted(others))}" if others else "is none of those that were looked at"
    raise ConfigError(
        f"model: {config.model_type} is not shown to keep the documents of a sequence apart: it {why}. State-space, "
        "convolution and linear-attention layers read on from one document into the next, whatever the positions. "
        "Choose another architecture, or let documents read those before them in their sequence with "
        "`cross_document_attention: true` on every stage."
    )
