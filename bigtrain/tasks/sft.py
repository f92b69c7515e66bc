"""Supervised finetuning: the assistant's answers are learned, all else is only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from bigtrain.config.core import Broken, mathematics
from bigtrain.data.conversations import SHAPES
from bigtrain.tasks import LongDocuments
from bigtrain.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig, StageConfig
    from bigtrain.data.files import Row
    from bigtrain.data.types import Answer, Layout


class Sft(CausalLM):
    """Conversations (`messages`, or `prompt` and `completion` as a user's and the assistant's), packed whole.

    They are spelt by the tokenizer's chat template. With a tokenizer that has none, prompt and completion are joined.
    """

    name: Literal["sft"] = mathematics(
        "Conversations through the tokenizer's chat template, with the loss on the assistant's turns and the token "
        "that ends each. Columns: `messages` (role, content); `conversations` (ShareGPT's from, value); `instruction`, "
        "`input` if there is one, and `output`; or `prompt` and `completion`, as texts or as messages.",
        "sft",
    )
    long_conversations: Literal["cut", "split", "drop"] = mathematics(
        "What becomes of a conversation that is longer than sequence_length. cut: it loses its end. split: it becomes "
        "several documents, each with the system turn and from a user's turn on; an answer is learned in one of them, "
        "with half a sequence of its conversation before it, or all if that is less. drop: it is left out.",
        "cut",
    )
    max_cut_answers: float = mathematics(
        "The part of a source's answers that may lose their end because their conversation is longer than "
        "sequence_length; with more the run is refused, since the model would not learn where they end.",
        0.1,
        ge=0,
        le=1,
    )
    layout = "packed"
    encoding = "sft-4"
    columns = SHAPES
    chats = True

    @property
    def long_documents(self) -> LongDocuments:
        return LongDocuments(self.long_conversations, self.max_cut_answers)

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:
        yield from super().check(run, stage)
        if self.long_conversations == "drop" and self.max_cut_answers != type(self)().max_cut_answers:
            told = "has no effect with `long_conversations: drop`, which cuts no answer; remove it."
            yield ("max_cut_answers",), told

    def encode(self, rows: list[Row], tokenizer: Any, layout: Layout | None = None) -> list[Answer]:
        from bigtrain.data.supervised import encode

        return encode(rows, tokenizer, layout)
