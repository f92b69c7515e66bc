"""Supervised finetuning: the assistant's answers are learned, all else is only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtrain.data.sources import COLUMNS
from bigtrain.data.tokenizer import encode_rendered, encode_texts
from bigtrain.data.writing import Document
from bigtrain.errors import DataError
from bigtrain.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from tokenizers import Encoding

Message = dict[str, str]


class Sft(CausalLM):
    """Conversations (`messages`, or `prompt` and `completion` as a user's and the assistant's), packed whole into bins.

    They are spelt by the tokenizer's chat template. With a tokenizer that has none, prompt and completion are joined.
    """

    layout = "bins"
    encoding = "sft-2"
    columns = COLUMNS["sft"]

    def encode(self, rows: list[dict[str, Any]], tokenizer: Any) -> list[Document]:
        """Ids and which of them are learned: the assistant's turns and the token that ends each.

        A row without an answer becomes an empty document. Raises DataError for a tokenizer that cannot end an answer,
        for conversations without a chat template, and for a template that rewrites earlier turns.
        """
        if tokenizer.chat_template is None:
            return _joined(rows, tokenizer)
        rendered = [_render(_messages(row), tokenizer) for row in rows]
        encodings = encode_rendered(tokenizer, [text for text, _ in rendered])
        specials = set(tokenizer.added_tokens_decoder)
        return [_document(e, spans, specials) for e, (_, spans) in zip(encodings, rendered, strict=True)]


def _messages(row: dict[str, Any]) -> list[Message]:
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _render(messages: list[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and the spans of the assistant's turns in it, each with what ends it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"]:
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (text.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"the tokenizer's chat template writes turn {i + 1} of {len(messages)} differently once more "
                    "turns follow, so the answers cannot be marked. Split such conversations into single turns."
                )
            spans.append((len(before), len(after)))
    return text, spans


def _document(encoding: Encoding, spans: list[tuple[int, int]], specials: set[int]) -> Document:
    if not spans:
        return [], []
    trained = [False] * len(encoding.ids)
    at = 0
    for start, stop in spans:
        ends = False
        while at < len(trained) and encoding.offsets[at][0] < stop:
            if encoding.offsets[at][0] >= start:
                trained[at] = True
                ends = ends or encoding.ids[at] in specials
            at += 1
        if not ends:
            raise DataError(
                "the tokenizer's chat template ends answers without a special token, "
                "so the model would never learn to stop."
            )
    return encoding.ids, trained


def _joined(rows: list[dict[str, Any]], tokenizer: Any) -> list[Document]:
    """bos (where the tokenizer has one) + prompt, then completion + eos, tokenized apart."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token (eos_token), so a completion could not be ended.")
    if any("messages" in row for row in rows):
        raise DataError("the tokenizer has no chat template, which conversations (`messages`) need.")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = encode_texts(tokenizer, [row["prompt"] for row in rows])
    completions = encode_texts(tokenizer, [row["completion"] for row in rows])
    encoded: list[Document] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        read = [*begin, *prompt]
        learned = [*completion, tokenizer.eos_token_id] if completion else []
        trained = [False] * len(read) + [True] * len(learned)
        encoded.append(([*read, *learned], trained) if learned else ([], []))
    return encoded
