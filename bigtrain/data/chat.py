"""Conversations as text that a tokenizer's chat template makes, and which characters of it are learned.

The rule, for every template: what the model meets before its answer is the template of the turns before, with its
generation prompt; what it learns is the rest of the template of the turns up to and with the answer, through the token
that ends it. Answers whose texts continue one another share one document. Where a template rewrites earlier turns once
more follow (it takes their reasoning out, say), a new document begins: each answer is learned after what the model will
meet when it is asked.

Where a template has generation marks, they narrow that down: only what they enclose is learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bigtrain.data.conversations import Message, every_text
from bigtrain.errors import DataError

Span = tuple[int, int]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION, ANSWER = (
    "\ue001",
    "\ue002",
)  # contents whose place a template cannot hide: no text has them, nothing trims them
MARK = "\U000fffff"  # around what only looks like a token of the template
PRIVATE = re.compile("[\U000f0000-\U000fffff]")


@dataclass(frozen=True)
class Rendered:
    """One document. text: with a MARK on both sides of what is not to become a token. answers: where in it each answer
    begins. learned: the characters of the answers, each with the token that ends it. Both in order."""

    text: str = ""
    answers: tuple[int, ...] = ()
    learned: tuple[Span, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer (a PreTrainedTokenizerFast).

    end: the token that ends an answer, which is learned with it: where generation must stop.
    """

    def __init__(self, tokenizer: Any):
        """Raises DataError for a template that ends answers without a token: the model would never learn to stop."""
        self._template = tokenizer.get_chat_template()
        self._variables = dict(tokenizer.special_tokens_map)
        self._has_marks = GENERATION.search(self._template) is not None
        names = {str(token): token.special for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
        self._token = _any_of(names)
        question = [{"role": "user", "content": QUESTION}]
        asked = self._text(question, ask=True)
        answered = self._text([*question, {"role": "assistant", "content": ANSWER}])
        end = self._token.search(answered.partition(ANSWER)[2])
        if end is None:
            raise DataError(
                "the tokenizer's chat template ends answers without a special token, "
                "so the model would never learn to stop."
            )
        self.end = end[0]
        turns = {*self._token.findall(asked), self.end}
        self._of_turns = _any_of(turns)
        self.tokens = frozenset(turns | {name for name, special in names.items() if special})
        self._of_template = _any_of(self.tokens)
        self._marked_or_not = re.compile(f"{MARK}(?:{self._of_template.pattern}){MARK}|({self._of_template.pattern})")

    def documents(self, messages: list[Message], read_only: int = 0) -> list[Rendered]:
        """The documents of a conversation; none if nothing in it is to be learned.

        Learned are the turns of the role `assistant` that say something, from message `read_only` on.

        A text that looks like a special token of the template, or like any other special token in what the assistant
        does not say, is marked and stays text.

        Raises DataError for a template that refuses the conversation, or whose answers cannot be told from the rest.
        """
        guarded = self._guarded(messages)
        found: list[Rendered] = []
        for i, message in enumerate(guarded):
            says = message["content"] or message.get("tool_calls") or message.get("reasoning_content")
            if message["role"] != "assistant" or not says or i < read_only:
                continue
            text, marks = self._render(guarded[: i + 1])
            if guarded is not messages:
                _check_guard(text, self._text(messages[: i + 1]))
            answer = self._answer(guarded[:i], text)
            learned = _within(marks, answer) if self._has_marks else (answer,)
            if not learned:
                continue
            if learned[-1][1] != answer[1]:
                raise DataError(
                    f"the generation marks of the chat template leave out {self.end!r}, which ends turn {i + 1}, "
                    "so the model would never learn to stop. Put the token between the marks."
                )
            continues = bool(found) and text[: answer[0]].startswith(found[-1].text)
            before = found.pop() if continues else Rendered()
            found.append(Rendered(text[: answer[1]], (*before.answers, answer[0]), (*before.learned, *learned)))
        return found

    def _answer(self, before: list[Message], text: str) -> Span:
        """The last turn of `text`: from behind the generation prompt through the token that ends it."""
        asked = self._text(before, ask=True) if before else ""
        start = len(asked)
        if not before or not text.startswith(asked):
            # The prompt says more than answered turns show (DeepSeek's <think>), or there is none to answer to.
            start = self._text([*before, {"role": "assistant", "content": ANSWER}]).rindex(ANSWER)
            if before and not asked.startswith(text[:start]):
                raise DataError(
                    f"the chat template writes what comes before turn {len(before) + 1} differently once that turn is "
                    "answered, so the model would learn after what it never meets. Use another template."
                )
        ends = [match for match in self._marked_or_not.finditer(text, start) if match[1]]
        chosen = [match for match in ends if match[1] == self.end] or ends
        if not chosen:
            raise DataError(
                f"the chat template ends turn {len(before) + 1} without a special token, "
                "so the model would never learn to stop."
            )
        return start, chosen[-1].end()

    def _guarded(self, messages: list[Message]) -> list[Message]:
        """The same list, or one where what only looks like a token stands between two MARKs."""

        def guard(message: Message) -> Message:
            tokens = self._of_turns if message["role"] == "assistant" else self._of_template
            return {key: every_text(value, lambda text: _marked(tokens, text)) for key, value in message.items()}

        guarded = [guard(message) for message in messages]
        return messages if guarded == messages else guarded

    def _text(self, messages: list[Message], ask: bool = False) -> str:
        return self._render(messages, ask)[0]

    def _render(self, messages: list[Message], ask: bool = False) -> tuple[str, list[Span]]:
        """What the template makes of messages, and the characters that its generation marks enclose."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._has_marks,
                add_generation_prompt=ask,
                **self._variables,
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"the tokenizer's chat template refuses it: {error}") from error
        (text,), marks = rendered
        return text, marks[0] if marks else []


def _check_guard(text: str, unguarded: str) -> None:
    """Raises DataError if the marks in a text have changed what the template makes, or could not be told from it."""
    if PRIVATE.search(unguarded):
        raise DataError(
            "it has a text that looks like a special token, and a private-use character (U+F0000 to U+FFFFF); "
            "take one of them out."
        )
    if text.replace(MARK, "") != unguarded:
        raise DataError(
            "it has a text that looks like a special token, and the chat template reads it as such. Take it out; "
            "give the answers of tools the role `tool`."
        )


def _any_of(names: Any) -> re.Pattern[str]:
    """Matches each of the names, the longest where several do."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _marked(tokens: re.Pattern[str], text: str) -> str:
    return tokens.sub(lambda match: f"{MARK}{match[0]}{MARK}", text)


def _within(marks: list[Span], answer: Span) -> tuple[Span, ...]:
    """The parts of the answer that the marks enclose."""
    parts = ((max(start, answer[0]), min(stop, answer[1])) for start, stop in marks)
    return tuple((start, stop) for start, stop in parts if start < stop)
