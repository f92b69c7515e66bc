"""Characters that stand for the texts of messages.

A text is cut at the pieces that a template looks for. These stay as they are, with the white space around them and at
the edges; a character stands for each part between. The same characters stand for other texts that are cut alike, and a
template that strips them, or looks for its pieces, finds the same. What identifies a call has the same characters
wherever it is the same. Arguments of tool calls and descriptions of tools stand in as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple

from bigtrain.data.conversations import Message

FIRST, FIRST_OPAQUE, TIME = "\U00100000", "\U00108000", "\U0010ffff"
SLOTS = ord(FIRST_OPAQUE) - ord(FIRST)
SLOT = re.compile(f"[{FIRST}-\U0010fffe]")
OPAQUE = re.compile(f"[{FIRST_OPAQUE}-{TIME}]")
LONGEST = 64  # characters of a text that is cut
IDS = ("id", "tool_call_id")


class Opaque(dict[str, str]):
    """A dict of which a template knows nothing but that it is one, and not empty. It has the character for its JSON."""


class Cut(NamedTuple):
    """texts: those of messages, cut, in the order of their places. ids: those that identify a call. held: what the
    characters in them stand for. form: all texts; those of other messages that have the same are cut alike."""

    texts: list[str]
    ids: Collection[str]
    held: list[Any]
    form: str

    @property
    def is_whole(self) -> bool:
        """Whether one character stands for each text."""
        return all(len(text) < 2 for text in self.texts)

    def stand_ins(self, messages: list[Message]) -> list[Message]:
        """The messages, with what stands for their texts."""
        messages = deepcopy(messages)
        for (holder, key), text in zip(_places(messages), self.texts, strict=True):
            if holder[key]:
                holder[key] = text if isinstance(holder[key], str) else Opaque({text: text})
        return messages

    def filled(self, text: str) -> str:
        """A text of characters that stand in, with what they stand for."""

        def held(slot: re.Match[str]) -> str:
            found = self.held[(ord(slot[0]) - ord(FIRST)) % SLOTS]
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

        return SLOT.sub(held, text)


def cut(messages: list[Message], pieces: Collection[str]) -> Cut | None:
    """The texts of messages whose calls have a `shape_of`; None if one is cut too often, or is none."""
    texts: list[str] = []
    ids: dict[str, str] = {}
    held: list[Any] = []
    for holder, key in _places(messages):
        value, is_id = holder[key], key in IDS
        if not value:
            text = ""
        elif key == "arguments":
            if isinstance(value, str) and value != value.strip():
                return None
            text = chr(ord(FIRST_OPAQUE) + len(held))
            held.append(value)
        elif not isinstance(value, str):
            return None
        elif is_id and value in ids:
            text = ids[value]
        elif value != value.strip() or any(piece in value for piece in pieces):
            text = _cut(value, pieces, held)
            if len(text) > LONGEST:
                return None
        else:
            text = chr(ord(FIRST) + len(held))
            held.append(value)
        if is_id and value:
            ids[value] = text
        texts.append(text)
    return Cut(texts, ids.values(), held, TIME.join(texts)) if len(held) < SLOTS else None


def tool_stand_ins(tools: Any) -> Any:
    """As many tools, of which nothing is known."""
    return [Opaque({TIME: TIME}) for _ in tools] if tools else tools


def shape_of(call: Message) -> Hashable:
    """All of a tool call but its texts and its arguments; None if it has anything that cannot stand in."""
    function = call.get("function", call)
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        return None
    keys, name, arguments = {*call} - {"type", "id"}, function.get("name"), function.get("arguments")
    known = keys == {"function"} and function.keys() == {"name", "arguments"} if "function" in call else len(keys) == 2
    if not known or not (name and isinstance(name, str) and isinstance(arguments, str | dict)):
        return None
    return "function" in call, "type" in call, type(call.get("id")), isinstance(arguments, str)


def _places(messages: list[Message]) -> Iterator[tuple[Message, str]]:
    """Where texts are, and arguments: what has them, and under which key."""
    for message in messages:
        yield message, "content"
        if len(message) == 2:
            continue
        for key in sorted(message.keys() - {"role", "content", "tool_calls"}):
            yield message, key
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if "id" in call:
                yield call, "id"
            yield function, "name"
            yield function, "arguments"


def _cut(text: str, pieces: Collection[str], held: list[Any]) -> str:
    """A text with characters for its parts between pieces, which are added to what is held."""
    spans = sorted(span for piece in pieces for span in islice(_spans(text, piece), LONGEST + 1))
    cut, behind = "", 0
    for begin, end in (*spans, (len(text), len(text))):
        part = text[behind:begin]
        if inner := part.strip():
            at = len(part) - len(part.lstrip())
            part = f"{part[:at]}{chr(ord(FIRST) + len(held))}{part[at + len(inner) :]}"
            held.append(inner)
        cut += part + text[max(begin, behind) : end]
        behind = max(end, behind)
    return cut


def _spans(text: str, piece: str) -> Iterator[tuple[int, int]]:
    """Where it has a piece; two may share characters."""
    at = text.find(piece)
    while at >= 0:
        yield at, at + len(piece)
        at = text.find(piece, at + 1)
