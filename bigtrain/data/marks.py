"""Marks around what a text of a conversation only spells like a token of the chat template, so that it stays text."""

from __future__ import annotations

import re
from typing import Any

from bigtrain.data.conversations import Message, every_text
from bigtrain.errors import DataError

MARK = "\U000fffff"
# Contents whose place a template cannot hide: no text has them, nothing trims them.
QUESTION, ANSWER = "\ue001", "\ue002"
PRIVATE = re.compile("[\U000f0000-\U000fffff]")


def marked(messages: list[Message], of_turns: re.Pattern[str], of_template: re.Pattern[str]) -> list[Message]:
    """The same list, or one where what looks like a token stands between two MARKs: in what the assistant says only the
    tokens that part turns, as it may use the others."""

    def mark(message: Message) -> Message:
        tokens = of_turns if message["role"] == "assistant" else of_template
        return {key: every_text(value, lambda text: _marked(tokens, text)) for key, value in message.items()}

    changed = [mark(message) for message in messages]
    return messages if changed == messages else changed


def check_marks(text: str, unguarded: str) -> None:
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


def texts_of(messages: list[Message]) -> list[str]:
    """All texts in messages but their roles, with the names of what they hold."""
    texts: list[str] = []
    for message in messages:
        texts.append(message["content"])
        if len(message) > 2:
            for key, value in message.items():
                if key not in ("role", "content"):
                    _gather(value, texts)
    return texts


def _gather(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        texts.extend(value)
        for held in value.values():
            _gather(held, texts)
    elif isinstance(value, list):
        for held in value:
            _gather(held, texts)


def any_of(names: Any) -> re.Pattern[str]:
    """Matches each of the names, the longest where several do."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _marked(tokens: re.Pattern[str], text: str) -> str:
    return tokens.sub(lambda match: f"{MARK}{match[0]}{MARK}", text)
