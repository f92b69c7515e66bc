"""The shapes that finetuning data comes in, made one of two: `messages`, or `prompt` and `completion` as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from bigtrain.data.files import Unusable

Message = dict[str, Any]
Shape = dict[str, Any]

# Of these sets of columns the first that a row has all of is read. A column that ends in ? may be missing or empty.
SHAPES = (
    ("messages", "system?", "tools?", "functions?"),
    ("conversations", "system?", "tools?"),
    ("instruction", "input?", "output", "system?", "history?", "tools?"),
    ("prompt", "completion", "system?", "tools?"),
)
# Of these columns nothing is read, as far as the shapes are known to have them.
PARTS = ("images", "image", "videos", "video", "audios", "audio")  # without them the texts mean something else
UNREAD = (*PARTS, "parallel_tool_calls", "chat_template_kwargs", "documents", "chosen", "rejected", "kto_tag", "label")
TOOLS = frozenset({"tools", "functions"})
LISTS = TOOLS | {"messages", "conversations", "history"}  # columns that are no text
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "ai", "chatgpt", "function_call", "tool_call"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
CALLS = frozenset({"function_call", "tool_call"})  # whose content is a call in JSON, as LLaMA-Factory's ShareGPT has it
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def read_column(row: Mapping[str, Any], ours: str, theirs: str, where: str) -> Any:
    """A column of a shape that is no plain text: turns, pairs of turns, or tools. Raises Unusable."""
    named = f"{where}: column `{theirs}`"
    try:
        if ours == "history":
            return _pairs(row[theirs], named)
        return _tools(row[theirs], named) if ours in TOOLS else turns(row[theirs], named)
    except RecursionError as error:
        raise Unusable("without usable turns", f"{named} is nested too deeply.") from error


def unread(row: Mapping[str, Any], read: Collection[str], where: str) -> tuple[str, ...]:
    """Columns with a value that shapes are known to have, of which nothing is used; `read` are used. Raises Unusable
    for pictures and sounds."""
    found = tuple(name for name in UNREAD if name not in read and row.get(name) not in (None, "", []))
    for name in found:
        if name in PARTS:
            text = f"{where}: has the column `{name}`; this task reads text alone. Take it out if the texts do without."
            raise Unusable("with parts that are no text", text)
    return found


def turns(value: Any, where: str) -> list[Message]:
    """A list of {role, content}, or of ShareGPT's {from, value}, as dicts with at least `role` (one of ROLES) and
    `content`, both str; `train: False` stands where a turn is only to be read.

    It may be given as JSON, or as a dict of lists; a content as parts of text, joined as they are, or as null, which is
    an empty one. Calls of tools become `tool_calls`. Other keys (`reasoning_content`, `name`) stay; what has no value
    goes, at every depth, since tables fill up with nulls what one row has and another has not.
    Raises Unusable, which begins with `where`.
    """
    messages = []
    for number, turn in enumerate(_dicts(value, where, "{role, content}, both of them text"), 1):
        here = f"{where}: turn {number}"
        message, content_of = _with_values(turn, here), "content"
        if "from" in message and "role" not in message:
            message["role"], content_of = message.pop("from"), "value"
        speaker, content = message.pop("role", None), message.pop(content_of, None)
        if not isinstance(speaker, str):
            raise _wrong(where, "{role, content}, both of them text", f"turn {number} is not")
        name = speaker.strip().lower()
        if name not in ROLE_OF:
            raise Unusable(
                "with a role that is not known",
                f"{here} has the role {_shown(speaker)}; known are {', '.join(ROLE_OF)}. Name it as one of them.",
            )
        calls = _calls(message, content if name in CALLS else None, here)
        if content_of not in turn and not calls:
            raise _wrong(where, "{role, content}, both of them text", f"turn {number} is not")
        text = "" if name in CALLS else _text(content, here)
        trained = _trained(message, ROLE_OF[name], here)
        message = {"role": ROLE_OF[name], "content": text, **message, **trained}
        messages.append(message | ({"tool_calls": calls} if calls else {}))
    return messages


def one_shape(row: Shape, where: str) -> Shape:
    """A row of one of SHAPES, its values read already, as `messages` (and `tools`, if it has some), or as `prompt` and
    `completion`, if it has nothing but these; of other columns as it is.

    prompt: an instruction, an empty line and its input. Of a prompt that is given as turns nothing is learned; the
    answers of a `history` are.
    Raises Unusable if only one of prompt and completion is text, and for two system turns.
    """
    messages = row.get("messages", row.get("conversations"))
    if "instruction" in row:
        parts = (row["instruction"], row.get("input", ""))
        row = row | {"prompt": "\n\n".join(part for part in parts if part), "completion": row["output"]}
    if messages is None and "prompt" not in row:
        return row
    tools = row.get("tools", row.get("functions"))
    if messages is None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise Unusable(
                "without usable turns",
                f"{where}: `prompt` and `completion` must both be text, or both be lists of messages.",
            )
        if isinstance(prompt, str):
            if not tools and "system" not in row and "history" not in row:
                return {"prompt": prompt, "completion": completion}
            pairs = [*row.get("history", ()), (prompt, completion)]
            messages = [turn for asked, said in pairs for turn in (_turn("user", asked), _turn("assistant", said))]
        else:
            messages = [*(turn | {"train": False} for turn in prompt), *completion]
    if (system := _turn("system", row.get("system"))) not in (_turn("system", None), *messages[:1]):
        if messages and messages[0]["role"] == "system":
            raise Unusable("with two system turns", f"{where}: has a system turn, and another in its column `system`.")
        messages = [system, *messages]
    return {"messages": messages} | ({"tools": tools} if tools else {})


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """A message, or what it holds, with each str in it changed, keys of what it holds included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): every_text(held, change) for key, held in value.items()}
    if isinstance(value, list):
        return [every_text(held, change) for held in value]
    return value


def _turn(role: str, content: str | None) -> Message:
    return {"role": role, "content": content}


def _decoded(value: Any, where: str) -> Any:
    """JSON that is given as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise Unusable("without usable turns", f"{where} is text, but no JSON: {error}.") from error


def _dicts(value: Any, where: str, wanted: str) -> list[dict[str, Any]]:
    """A list of dicts, which may be given as JSON, or as a dict of lists, as `datasets` gives it."""
    try:
        value = _decoded(value, where)
    except Unusable:
        value = None
    if isinstance(value, dict):
        lists = {name: held for name, held in value.items() if held is not None}
        if not all(isinstance(held, list) for held in lists.values()) or len({*map(len, lists.values())}) > 1:
            raise _wrong(where, wanted, "it is a dict")
        value = [dict(zip(lists, held, strict=True)) for held in zip(*lists.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(held, dict) for held in value):
        raise _wrong(where, wanted)
    return value


def _with_values(value: Any, where: str) -> Any:
    """What is left of a value without the nulls in its dicts. Raises Unusable for what is no JSON, and no text."""
    if isinstance(value, dict):
        held_by = {_with_values(name, where): held for name, held in value.items() if held is not None}
        return {name: _with_values(held, where) for name, held in held_by.items()}
    if isinstance(value, list):
        return [_with_values(held, where) for held in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            text = f"{where} holds half of a surrogate pair, which is no text."
            raise Unusable("with half of a surrogate pair", text) from error
    elif value is not None and not isinstance(value, bool | int | float):
        raise Unusable("without usable turns", f"{where} holds a {type(value).__name__}; give it as text.")
    return value


def _text(content: Any, where: str) -> str:
    """A content: text, parts of text, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _wrong(where, "{role, content}, both of them text", f"its content is a {type(content).__name__}")
    return "".join(_text_of_part(part, where) for part in content)


def _text_of_part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text", "") if isinstance(part, dict) and kind in TEXT_PARTS else part
    if not isinstance(text, str):
        raise Unusable(
            "with parts that are no text",
            f"{where} has a part of the type {_shown(str(kind))}; this task reads text alone.",
        )
    return text


def _calls(message: Message, said: Any, where: str) -> list[Message]:
    """The calls of tools in a turn, taken out of it: OpenAI's new and old way, and what is said, if that is one."""
    wanted = "{name, arguments}"
    calls = _dicts(message.pop("tool_calls", []), f"{where}: `tool_calls`", wanted)
    for given in (message.pop("function_call", None), said):
        decoded = _decoded(given, f"{where}: its call of a tool")
        calls = [*calls, *(decoded if isinstance(decoded, list) else [decoded] if decoded is not None else [])]
    return [_call(call, f"{where}: call {number} of a tool") for number, call in enumerate(calls, 1)]


def _call(call: Any, where: str) -> Message:
    """As OpenAI has it. Raises Unusable for arguments that are no JSON object, given as such or as text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("without usable turns", f"{where} is not {{name, arguments}}.")
    given = function.get("arguments", function.get("parameters", {}))
    decoded = _decoded(given or {}, f"{where}: `arguments`")
    if not isinstance(decoded, dict):
        raise Unusable("without usable turns", f"{where}: its `arguments` are no JSON object.")
    function = {"name": function["name"], "arguments": given or {}}
    about = {key: value for key, value in call.items() if key == "id"}
    return {"type": "function", **about, "function": function}


def _trained(message: Message, role: str, where: str) -> Message:
    """Whether a turn is learned, from its `weight` and `train`, which are taken out of it."""
    weight, train = message.pop("weight", 1), message.pop("train", None)
    reason = "with a weight that is not known"
    if weight not in (0, 1):
        raise Unusable(reason, f"{where} has the weight {weight}; known are 1, and 0 for what is read, not learned.")
    if train is not None and not isinstance(train, bool):
        raise Unusable(reason, f"{where}: `train` must be true, or false for what is read, not learned.")
    if train and role != "assistant":
        raise Unusable(reason, f"{where} has `train: true`; only what the assistant says is learned. Take it out.")
    return {"train": False} if weight == 0 or train is False else {}


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Descriptions of tools as templates take them: OpenAI's new way, whose old one is the inner part alone."""
    tools = []
    for number, tool in enumerate(_dicts(value, where, "descriptions of tools"), 1):
        given = _with_values(tool, where)
        function = given if "function" in given else {"type": "function", "function": given}
        if not isinstance(function["function"], dict) or not isinstance(function["function"].get("name"), str):
            raise _wrong(where, "descriptions of tools", f"description {number} has no name")
        tools.append(function)
    return tools


def _pairs(value: Any, where: str) -> list[tuple[str, str]]:
    pairs = _decoded(value, where)
    if not isinstance(pairs, list):
        raise _wrong(where, "[question, answer], both of them text")
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise _wrong(where, "[question, answer], both of them text", f"pair {number} is not")
        _with_values(pair, where)
    return [(asked, said) for asked, said in pairs]


def _wrong(where: str, wanted: str, what: str = "") -> Unusable:
    return Unusable("without usable turns", f"{where} must be a list of {wanted}{what and '; '}{what}.")


def _shown(name: str) -> str:
    line = " ".join(name.split())[:40]
    return f"`{''.join(letter if letter.isprintable() else '?' for letter in line)}`"
