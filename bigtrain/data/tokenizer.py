"""The tokenizer: trained here on the run's own documents, or opened from a folder or the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.errors import ConfigError
from bigtrain.pretrained import arguments, opening

if TYPE_CHECKING:
    from tokenizers import Encoding

BEGIN, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"

# Of tokenizers that are trained here: whoever is not the assistant is read as the user.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int, sample_bytes: int, folder: Path) -> None:
    """Learn a byte-level BPE from the first `sample_bytes` of the texts, in a form that AutoTokenizer opens.

    Any text comes back from its tokens unchanged. A text encoded with special tokens starts with `<|begin|>`,
    as the documents of a token store do. A small sample may give fewer than `vocab_size` entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, sample_bytes), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B:1",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def load_tokenizer(source: str | Path, add_tokens: Sequence[str] = ()) -> Any:
    """Open a transformers PreTrainedTokenizerFast and add special tokens to it.

    Raises ConfigError if there is none, or none of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    name, options = arguments(str(source))
    with opening(str(source), "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer: {source} has no fast (tokenizers) version, which bigtrain needs.")
    if add_tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": list(add_tokens)}, replace_extra_special_tokens=False)
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what turns text into ids: tokenizer.json, the ids of the special tokens, the chat template."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for left_by_calls in ("truncation", "padding"):
        content.pop(left_by_calls, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([content, special, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()


def encode_rendered(tokenizer: Any, texts: list[str]) -> list[Encoding]:
    """Ids and character offsets of what a chat template made: special tokens in it are obeyed, none is added."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend.encode_batch(texts, add_special_tokens=False)


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text, whole: no special token is added, and one that is spelt out is not obeyed."""
    backend = tokenizer.backend_tokenizer  # twice as fast as calling the tokenizer itself
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    left = limit
    for text in texts:
        data = text.encode()
        yield data[:left].decode(errors="ignore")
        left -= len(data)
        if left <= 0:
            return
