"""The tokenizer: trained here on the run's own documents, or opened from a folder or the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.errors import DataError

BEGIN, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"


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
    ).save_pretrained(folder)


def load_tokenizer(folder_or_id: str | Path) -> Any:
    """Open a transformers PreTrainedTokenizerFast. Raises DataError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder_or_id))
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer {folder_or_id} cannot be opened: {error}") from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {folder_or_id} has no fast (tokenizers) version, which bigtrain needs.")
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what turns text into ids: the content of tokenizer.json and the ids of the special tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for left_by_calls in ("truncation", "padding"):
        content.pop(left_by_calls, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


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
