"""Conversations as documents of which the assistant's answers are learned, and all else is only read."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from bigtrain.data.chat import ChatTemplate, Rendered
from bigtrain.data.conversations import Message
from bigtrain.data.files import Row, Unusable
from bigtrain.data.tokenizer import encode_rendered, encode_texts
from bigtrain.data.types import Answer, Document, Documents, Layout, LeftOut
from bigtrain.errors import DataError


def encode(rows: list[Row], tokenizer: Any, layout: Layout | None = None) -> list[Answer]:
    """Ids and which of them are learned: the assistant's turns and the token that ends each.

    One or more documents for each row (`ChatTemplate.documents`), none of a row without an answer; Unusable for a
    row that the template refuses, LeftOut for a conversation that is too long if the layout says `drop`. Raises
    DataError for a tokenizer that cannot end an answer, and for conversations without a chat template.
    """
    if tokenizer.chat_template is None:
        return _joined(rows, tokenizer)
    template = ChatTemplate.of(tokenizer)
    conversations = [_conversation(row) for row in rows]
    rendered = [_rendered(*it, row, template) for it, row in zip(conversations, rows, strict=True)]
    together = [document for answer in rendered if not isinstance(answer, Unusable) for document in answer]
    encoded = iter(encode_rendered(tokenizer, template.tokens, together))
    answers: list[Answer] = []
    for row, (messages, tools), found in zip(rows, conversations, rendered, strict=True):
        if isinstance(found, Unusable):
            answers.append(found)
            continue
        documents: list[Document] = [next(encoded) for _ in found]
        way = None if layout is None or _fit(documents, layout) else layout.long_conversations
        if way == "drop":
            answers.append(LeftOut("longer than sequence_length"))
        elif way == "split" and layout is not None:
            answers.append(_parts(messages, tools, row, template, tokenizer, layout))
        else:
            answers.append(Documents(documents, template.unread(messages, tools)))
    return answers


def _parts(
    messages: list[Message], tools: Any, row: Row, template: ChatTemplate, tokenizer: Any, layout: Layout
) -> Answer:
    """Documents of a conversation that is longer than a sequence."""
    try:
        parts = _Split(messages, tools, template, tokenizer, layout).documents()
    except DataError as error:
        return Unusable("refused by the chat template", f"{row['where']}: of a part of it, {error}")
    return Documents(parts, template.unread(messages, tools), is_split=len(parts) > 1)


def _fit(documents: Sequence[Document], layout: Layout) -> bool:
    """Whether none of them would be cut."""
    assert layout.longest is not None
    return all(len(document.ids) <= layout.longest for document in documents)


class _Split:
    """A conversation that is longer than a sequence, as several documents that are not.

    Each has the system turn, begins with a turn of the user and learns the answers that no earlier one has. It begins
    early enough that the first of them has half a sequence of its conversation before it, and ends before the first
    answer that would be cut. Only an answer that does not fit behind its own question is cut.
    """

    def __init__(self, messages: list[Message], tools: Any, template: ChatTemplate, tokenizer: Any, layout: Layout):
        self._system = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
        self._turns = messages[len(self._system) :]
        self._tools, self._template, self._tokenizer, self._layout = tools, template, tokenizer, layout
        self._answers = [n - len(self._system) for n in template.answers(messages, tools)]
        self._starts = [n for n, turn in enumerate(self._turns) if turn["role"] == "user"]

    def documents(self) -> list[Document]:
        found: list[Document] = []
        start, first = 0, 0
        while first < len(self._answers):
            if first or not self._fits(start, first, first):
                start = self._start(first)
            last = self._last(start, first)
            found += self._encoded(start, first, last)
            first = last + 1
        return found

    def _start(self, answer: int) -> int:
        """The first turn of the document that begins with an answer to be learned."""
        assert self._layout.sequence_length is not None
        half = self._layout.sequence_length // 2
        starts = [n for n in self._starts if n < self._answers[answer]]

        def is_late(start: int) -> bool:
            """Whether at most half of the sequence is taken by what stands before the answer."""
            masks = [document.loss_mask for document in self._encoded(start, answer, answer)]
            before = [mask.index(True) for mask in masks if mask and True in mask]
            return not before or before[-1] <= half

        early = bisect.bisect_left(starts, True, key=is_late)
        fitting = bisect.bisect_left(starts, True, key=lambda start: self._fits(start, answer, answer), lo=early)
        return starts[min(fitting, len(starts) - 1)] if starts else 0

    def _last(self, start: int, first: int) -> int:
        """The last answer that a document with a first one can learn."""
        more = range(first + 1, len(self._answers))
        return first + bisect.bisect_left(more, True, key=lambda last: not self._fits(start, first, last))

    def _fits(self, start: int, first: int, last: int) -> bool:
        return _fit(self._encoded(start, first, last), self._layout)

    def _encoded(self, start: int, first: int, last: int) -> list[Document]:
        """From turn `start`, with answers `first` to `last` learned."""
        begin, end = self._answers[first], self._answers[last]
        turns = [turn | {"train": False} for turn in self._turns[start:begin]] + self._turns[begin : end + 1]
        rendered = self._template.documents([*self._system, *turns], self._tools)
        return list(encode_rendered(self._tokenizer, self._template.tokens, rendered))


def _conversation(row: Row) -> tuple[list[Message], Any]:
    """Messages and tools of a row."""
    if "messages" in row:
        return row["messages"], row.get("tools")
    asked, said = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})
    return [asked, said], None


def _rendered(messages: list[Message], tools: Any, row: Row, template: ChatTemplate) -> list[Rendered] | Unusable:
    try:
        return template.documents(messages, tools)
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
        loss_mask = [False] * len(read) + [True] * len(learned)
        encoded.append([Document([*read, *learned], loss_mask)] if learned else [])
    return encoded
