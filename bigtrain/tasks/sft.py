"""Supervised finetuning: the assistant's answers are learned, all else is only read."""

from __future__ import annotations

from typing import Any

from bigtrain.data.chat import ChatTemplate, Rendered
from bigtrain.data.files import Row, Unusable
from bigtrain.data.sources import COLUMNS
from bigtrain.data.tokenizer import encode_rendered, encode_texts
from bigtrain.data.writing import Answer
from bigtrain.errors import DataError
from bigtrain.tasks.causal_lm import CausalLM


class Sft(CausalLM):
    """Conversations (`messages`, or `prompt` and `completion` as a user's and the assistant's), packed whole into bins.

    They are spelt by the tokenizer's chat template. With a tokenizer that has none, prompt and completion are joined.
    """

    layout = "bins"
    encoding = "sft-3"
    columns = COLUMNS["sft"]

    def encode(self, rows: list[Row], tokenizer: Any) -> list[Answer]:
        """Ids and which of them are learned: the assistant's turns and the token that ends each.

        One or more documents for each row (`ChatTemplate.documents`), none of a row without an answer; Unusable for a
        row that the template refuses. Raises DataError for a tokenizer that cannot end an answer, and for conversations
        without a chat template.
        """
        if tokenizer.chat_template is None:
            return _joined(rows, tokenizer)
        template = ChatTemplate(tokenizer)
        rendered = [_documents(row, template) for row in rows]
        together = [document for answer in rendered if not isinstance(answer, Unusable) for document in answer]
        encoded = iter(encode_rendered(tokenizer, template.tokens, together))
        return [a if isinstance(a, Unusable) else [next(encoded) for _ in a] for a in rendered]


def _documents(row: Row, template: ChatTemplate) -> list[Rendered] | Unusable:
    messages = row.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    try:
        return template.documents(messages, row.get("read_only", 0))
    except DataError as error:
        return Unusable("refused by the chat template", f"{row['where']}: {error}")


def _joined(rows: list[Row], tokenizer: Any) -> list[Answer]:
    """bos (where the tokenizer has one) + prompt, then completion + eos, tokenized apart."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token (eos_token), so a completion could not be ended.")
    if any("messages" in row for row in rows):
        raise DataError(
            "the tokenizer has no chat template, which conversations need. Use a tokenizer that has one, or give "
            "`prompt` and `completion` as texts."
        )
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = encode_texts(tokenizer, [row["prompt"] for row in rows])
    completions = encode_texts(tokenizer, [row["completion"] for row in rows])
    encoded: list[Answer] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        read = [*begin, *prompt]
        learned = [*completion, tokenizer.eos_token_id] if completion else []
        trained = [False] * len(read) + [True] * len(learned)
        encoded.append([([*read, *learned], trained)] if learned else [])
    return encoded
