"""Answers of conversations, and what decides how a chat template leads over to one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigtrain.data.conversations import Message
from bigtrain.data.stand_ins import Cut, shape_of
from bigtrain.data.templates import Rendering, Span


class Answer(NamedTuple):
    """An answer is `text[start:stop]`, after all before. learned: what of it is."""

    text: str
    start: int
    stop: int
    learned: tuple[Span, ...]

    def follows(self, other: Answer) -> bool:
        """Whether all up to the other's end stands before it, word for word."""
        if other.stop > self.start:
            return False
        return self.text is other.text or self.text.startswith(other.text[: other.stop])


class Border(NamedTuple):
    """What is known of a kind of answer. before: what leads over to it from where its turn begins. more: what the
    prompt says behind that and answered turns do not. rest: all from the answer on, if what follows changes it."""

    before: str
    more: str
    rest: str | None = None


@dataclass
class Conversation:
    """messages: with MARKs (`marked`); plain: without. whole: the rendering of all of them. forms: those of the
    messages, numbered; seen: of those before each, a set as bits. cut: its texts, if the template looks ahead,
    characters can stand for all that they say, and nothing looks like a token. is_opaque: whether answers of its kind
    are alike."""

    messages: list[Message]
    plain: list[Message]
    tools: Any
    whole: Rendering
    forms: list[int]
    seen: list[int]
    cut: Cut | None
    is_opaque: bool

    def kind(self, number: int) -> Hashable:
        """What decides how a template leads over to an answer, if no text does: all messages where it looks ahead, else
        the two at hand, and which forms have come before."""
        if self.whole.ahead:
            return True, number, len(self.tools or ()), *self.forms, self.cut and self.cut.form
        before = self.forms[number - 1] if number else None
        return False, min(number, 2), bool(self.tools), before, self.forms[number], self.seen[number]


def answer_in(text: str, start: int, stop: int, generated: list[Span] | None) -> Answer:
    """The answer in text[start:stop], with what of it generation marks enclose; without marks all of it."""
    if generated is None:
        return Answer(text, start, stop, ((start, stop),))
    parts = ((max(begin, start), min(end, stop)) for begin, end in generated)
    return Answer(text, start, stop, tuple((begin, end) for begin, end in parts if begin < end))


def form_of(message: Message) -> Hashable:
    """What a template may look at in a message but for its texts."""
    content = message["content"]
    says = not content.isspace() if content else None
    if len(message) == 2:
        return message["role"], says
    others = tuple(
        (key, type(held), bool(held)) for key, held in sorted(message.items()) if key not in ("role", "content")
    )
    return message["role"], says, others, *map(shape_of, message.get("tool_calls") or ())
