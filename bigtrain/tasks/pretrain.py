"""Pretraining: every token of every document is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from bigtrain.config.core import mathematics
from bigtrain.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from bigtrain.data.files import Row
    from bigtrain.data.types import Answer, Layout


class Pretrain(CausalLM):
    """Documents of column `text`, cut into windows of one stream."""

    name: Literal["pretrain"] = mathematics("Next token of every document (column `text`).", "pretrain")
    layout = "windows"
    encoding = "pretrain-1"
    columns = (("text",),)

    def encode(self, rows: list[Row], tokenizer: Any, layout: Layout | None = None) -> list[Answer]:  # noqa: ARG002
        """bos + text + eos, where the tokenizer has them; no document of a row without text."""
        from bigtrain.data.tokenizer import encode_texts
        from bigtrain.data.types import Document

        before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = encode_texts(tokenizer, [row["text"] for row in rows])
        return [[Document([*before, *ids, *after])] if ids else [] for ids in texts]
