"""The shapes that finetuning data comes in, made one of two: `messages`, or `prompt` and `completion` as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigtrain.errors import DataError

Message = dict[str, Any]
Shape = dict[str, Any]

# Of these sets of columns the first that a row has all of is read.
SHAPES = (
    ("messages",),
    ("conversations",),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("prompt", "completion"),
)
LISTS = frozenset({"messages", "conversations"})  # columns of turns
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}  # ShareGPT's `from` -> role


def turns(value: Any, where: str) -> list[Message]:
    """A list of {role, content}, or of ShareGPT's {from, value}, as dicts with at least `role` and `content`, both str.

    Other keys (`tool_calls`, `reasoning_content`, `name`) stay; those without a value go. Only a turn that calls tools
    may lack its content. Raises DataError, which begins with `where`.
    """
    wrong = f"{where} must be a list of {{role, content}}, both of them text"
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{wrong}.")
    messages = []
    for number, turn in enumerate(value, 1):
        message = {key: given for key, given in turn.items() if given is not None}
        if "from" in message and "role" not in message:
            speaker, content = message.pop("from"), message.pop("value", None)
            if speaker not in SPEAKERS:
                raise DataError(f"{where}: turn {number} is from {speaker!r}; known are {', '.join(SPEAKERS)}.")
            message |= {"role": SPEAKERS[speaker]} | ({} if content is None else {"content": content})
        if message.get("tool_calls"):
            message.setdefault("content", "")
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"{wrong}; turn {number} is not.")
        try:
            messages.append(every_text(message, _whole))
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: turn {number} holds half of a surrogate pair, which is no text.") from error
    return messages


def one_shape(row: Shape, where: str) -> Shape:
    """A row of one of SHAPES, its values read already, as `messages` or as `prompt` and `completion`; of other
    columns as it is.

    prompt: an instruction, an empty line and its input. With prompt and completion both given as turns, `read_only`
    says how many of the messages are the prompt's: of those nothing is learned.
    Raises DataError if only one of prompt and completion is text.
    """
    if "conversations" in row:
        return {"messages": row["conversations"]}
    if "instruction" in row:
        parts = (row["instruction"], row.get("input", ""))
        return {"prompt": "\n\n".join(part for part in parts if part), "completion": row["output"]}
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(f"{where}: `prompt` and `completion` must both be text, or both be lists of messages.")
        if not isinstance(prompt, str):
            return {"messages": [*prompt, *completion], "read_only": len(prompt)}
    return row


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """A message, or what it holds, with each str in it changed, keys of what it holds included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): every_text(held, change) for key, held in value.items()}
    if isinstance(value, list):
        return [every_text(held, change) for held in value]
    return value


def _whole(text: str) -> str:
    text.encode()
    return text
