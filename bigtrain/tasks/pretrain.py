"""Pretraining: every token of every document is learned."""

from __future__ import annotations

from typing import Any

from bigtrain.data.sources import COLUMNS
from bigtrain.data.tokenizer import encode_texts
from bigtrain.data.types import Answer, Document, Layout
from bigtrain.tasks.causal_lm import CausalLM


class Pretrain(CausalLM):
    """Documents of column `text`, cut into windows of one stream."""

    layout = "windows"
    encoding = "pretrain-1"
    columns = COLUMNS["pretrain"]

    def encode(self, rows: list[dict[str, str]], tokenizer: Any, _: Layout | None = None) -> list[Answer]:
        """bos + text + eos, where the tokenizer has them; no document of a row without text."""
        before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = encode_texts(tokenizer, [row["text"] for row in rows])
        return [[Document([*before, *ids, *after])] if ids else [] for ids in texts]
