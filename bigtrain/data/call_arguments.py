"""Arguments of tool calls as a chat template takes them: decoded, or as text."""

from __future__ import annotations

import json
from typing import Any

from bigtrain.data.conversations import Message
from bigtrain.data.marks import ANSWER, QUESTION
from bigtrain.data.templates import Template
from bigtrain.errors import DataError

CALL: Message = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {QUESTION: ANSWER}}}


def takes_text(template: Template) -> bool:
    """Whether it writes the arguments of tool calls as they are, so that only their text comes out as JSON."""

    def shown(arguments: Any) -> str | None:
        call = CALL | {"function": {"name": "f", "arguments": arguments}}
        called: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        asked: list[Message] = [{"role": "user", "content": "a"}, called]
        try:
            return template.render(asked).text
        except DataError:
            return None

    decoded = shown({QUESTION: ANSWER})
    return (decoded is None and shown("{}") is not None) or (decoded is not None and f"{{'{QUESTION}'" in decoded)


def with_arguments(call: Message, as_text: bool) -> Message:
    """A tool call with its arguments as text or decoded. Raises DataError for arguments that are no JSON."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and not as_text:
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:  # `clean` may have changed the text
            raise DataError(f"the arguments of the tool call `{function.get('name')}` are no JSON: {error}.") from error
    elif not isinstance(arguments, str) and as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function
