"""Conversations as text that a tokenizer's chat template makes, and which characters of it are learned.

The rule, for every template: what the model meets before its answer is the template of the turns before, with its
generation prompt; what it learns is the rest of the template of the turns up to and with the answer, through the token
that ends it. Answers whose texts continue one another share one document. Where a template rewrites earlier turns once
more follow (it takes their reasoning out, say), a new document begins: each answer is learned after what the model will
meet when it is asked.

Where a template has generation marks, they narrow that down: only what they enclose is learned.

To follow the rule to the letter, a conversation is rendered twice for each of its answers. That is done once for each
kind of answer, and what comes before it is remembered, or what stands around it where a template writes it
differently once more follow (`_Frame`); the next conversations are rendered once.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from bigtrain.config.files import literal
from bigtrain.data.call_arguments import CALL, takes_text, with_arguments
from bigtrain.data.conversations import Message
from bigtrain.data.marks import ANSWER, MARK, QUESTION, any_of, check_marks, marked, texts_of
from bigtrain.data.templates import REASONING, Rendering, Span, Template
from bigtrain.errors import DataError

SLOT = re.compile(f"[{QUESTION}{ANSWER}]")
OTHER = "\ue003"  # content of the messages before
PLAIN = {"role", "content", *REASONING}
REMEMBERED = 100_000  # kinds of answers


@dataclass(frozen=True)
class Rendered:
    """One document. text: with a MARK on both sides of what is not to become a token. answers: where in it each answer
    begins. learned: the characters of the answers, each with the token that ends it. Both in order."""

    text: str = ""
    answers: tuple[int, ...] = ()
    learned: tuple[Span, ...] = ()


class _Answer(NamedTuple):
    """An answer is `text[start:stop]`, after all before. learned: what of it is."""

    text: str
    start: int
    stop: int
    learned: tuple[Span, ...]

    def follows(self, other: _Answer) -> bool:
        """Whether all up to the other's end stands before it, word for word."""
        if other.stop > self.start:
            return False
        return self.text is other.text or self.text.startswith(other.text[: other.stop])


class _Frame(NamedTuple):
    """An answer that no turn follows, from where its turn begins: what leads over to it, and the rest, where QUESTION
    stands for its reasoning and ANSWER for its content."""

    before: str
    rest: str


@dataclass
class _Conversation:
    """messages: with MARKs (`marked`); plain: without. whole: the rendering of all of them. is_special: some text of
    them is one that the template looks for. is_opaque: a template can but copy texts, as there is nothing to trim,
    to part them at or to compare them with. forms: those of the messages, numbered; seen: of those before each, a set
    as bits."""

    messages: list[Message]
    plain: list[Message]
    tools: Any
    whole: Rendering
    is_special: bool
    is_opaque: bool
    forms: list[int]
    seen: list[int]

    def kind(self, number: int) -> Hashable:
        """What decides how a template leads over to an answer, if no text does: all messages where it looks ahead, else
        the two at hand, and which forms have come before."""
        if self.whole.ahead:
            return number, bool(self.tools), *self.forms
        before = self.forms[number - 1] if number else None
        return min(number, 2), bool(self.tools), before, self.forms[number], self.seen[number]


class ChatTemplate:
    """The chat template of a tokenizer (a PreTrainedTokenizerFast).

    end: the token that ends an answer, which is learned with it: where generation must stop.
    tokens: what is a token in the template's text, unless between two MARKs.
    """

    def __init__(self, tokenizer: Any):
        """Raises DataError for a template that ends answers without a token: the model would never learn to stop; for
        one that cannot be run, and for named templates of which none is the default."""
        sources = _sources(tokenizer)
        templates = {source: Template(source, dict(tokenizer.special_tokens_map)) for source in {*sources}}
        self._plain, self._with_tools = (templates[source] for source in sources)
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
        self._any_token = any_of(added)
        turns: set[str] = set()
        for template in templates.values():
            turns |= self._probed(template)
        self.tokens = frozenset(turns | {name for name, special in added.items() if special})
        self._of_turns = any_of(turns)
        self._of_template = any_of(self.tokens)
        self._marked_or_not = re.compile(f"{MARK}(?:{self._of_template.pattern}){MARK}|({self._of_template.pattern})")
        self._is_alone = not any(self.end in token for token in self.tokens - {self.end})
        self._takes_text = {template: takes_text(template) for template in templates.values()}
        self._before: dict[
            Hashable, str | _Frame | None
        ] = {}  # kind of an answer -> what leads over; None: look at each
        self._forms: dict[Hashable, int] = {}  # of messages
        self._silent: dict[Hashable, bool] = {}  # role -> whether the template leaves out what it says

    @staticmethod
    def of(tokenizer: Any) -> ChatTemplate:
        """That of a tokenizer, which remembers what it has met until the tokenizer changes."""
        now = (len(tokenizer), str(tokenizer.chat_template), str(tokenizer.special_tokens_map))
        state, template = _KNOWN.get(tokenizer, (None, None))
        if template is None or state != now:
            template = ChatTemplate(tokenizer)
            _KNOWN[tokenizer] = now, template
        return template

    def documents(self, messages: list[Message], tools: Any = None) -> list[Rendered]:
        """The documents of a conversation; none if nothing in it is to be learned.

        Learned are the turns of the role `assistant` that say something and have no `train: False`.

        A text that looks like a special token of the template, or like any other special token in what the assistant
        does not say, is marked and stays text.

        Raises DataError for a template that refuses the conversation, or leaves out of an answer what it says, or whose
        answers cannot be told from the rest.
        """
        learned = self.answers(messages, tools)
        if not learned:
            return []
        template = self._with_tools if tools else self._plain
        conversation = self._conversation(messages[: learned[-1] + 1], tools, template)
        chains: list[list[_Answer]] = []
        for number in learned:
            answer = self._answer(conversation, number, template)
            if answer.learned and chains and answer.follows(chains[-1][-1]):
                chains[-1].append(answer)
            elif answer.learned:
                chains.append([answer])
        return [_document(chain) for chain in chains]

    def answers(self, messages: list[Message], tools: Any = None) -> list[int]:
        """Numbers of the messages that are learned."""
        template = self._with_tools if tools else self._plain
        said = ((i, message) for i, message in enumerate(messages) if message["role"] == "assistant")
        return [i for i, message in said if message.get("train", True) and _says(message, template)]

    def unread(self, messages: list[Message], tools: Any = None) -> tuple[str, ...]:
        """What of a conversation the template has no place for: `tools`, or the assistant's reasoning."""
        template = self._with_tools if tools else self._plain
        reasons = not all(message.keys().isdisjoint(REASONING) for message in messages)
        return (("tools",) if tools and not template.takes_tools else ()) + (
            ("reasoning_content",) if reasons and template.names.isdisjoint(REASONING) else ()
        )

    def _probed(self, template: Template) -> set[str]:
        """The tokens that part turns; finds `end`."""
        question = [{"role": "user", "content": QUESTION}]
        asked = template.render(question, ask=True).text
        answered = template.render([*question, {"role": "assistant", "content": ANSWER}]).text
        end = self._any_token.search(answered.partition(ANSWER)[2])
        if end is None:
            raise DataError(
                "the tokenizer's chat template ends answers without a special token, "
                "so the model would never learn to stop."
            )
        if template is self._plain:
            self.end = end[0]
        return {*self._any_token.findall(asked), end[0]}

    def _conversation(self, messages: list[Message], tools: Any, template: Template) -> _Conversation:
        plain = [message if len(message) == 2 else self._for_template(message, template) for message in messages]
        held = [*texts_of(plain)]
        texts = "\0".join(held)
        guarded = plain
        if self._of_template.search(texts):
            guarded = marked(plain, self._of_turns, self._of_template)
        whole = template.render(guarded, tools=tools)
        if guarded is not plain:
            check_marks(whole.text, template.render(plain, tools=tools).text)
        self._check_roles(plain, whole.text, template)
        is_special = any(literal in texts for literal in template.literals)
        is_special |= whole.ahead and not template.constants.isdisjoint(held)
        is_opaque = not is_special
        if whole.ahead and is_opaque:
            is_opaque = guarded is plain and not tools and all(said.keys() <= PLAIN for said in plain)
            is_opaque &= not any(piece in texts for piece in template.pieces)
            is_opaque &= not template.trims or all(text == text.strip() for text in held)
        numbers = self._forms
        forms = [numbers.setdefault(_form(message), len(numbers)) for message in plain]
        seen = [0]
        for form in forms:
            seen.append(seen[-1] | 1 << form)
        return _Conversation(guarded, plain, tools, whole, is_special, is_opaque, forms, seen)

    def _answer(self, conversation: _Conversation, number: int, template: Template) -> _Answer:
        whole, kind = conversation.whole, conversation.kind(number)
        before = self._before.get((template, kind))
        answer = None
        if isinstance(before, _Frame):
            answer = self._framed(conversation, number, before)
        elif before is not None and not conversation.is_special:
            answer = self._within_whole(whole, number, before, template)
        if answer is not None:
            message = conversation.messages[number]
            return self._checked(answer, message) if "tool_calls" in message else answer
        answer = self._checked(self._alone(conversation, number, template), conversation.messages[number])
        is_new = (template, kind) not in self._before and len(self._before) < REMEMBERED
        if is_new and not conversation.is_special:
            lead: str | _Frame | None = self._lead(whole, number, answer, template)
            if lead is None and whole.ahead and conversation.is_opaque and not template.has_marks:
                lead = self._frame(conversation, number, answer, template)
            if lead is not None or conversation.is_opaque:
                self._before[template, kind] = lead
        return answer

    def _within_whole(self, whole: Rendering, number: int, before: str, template: Template) -> _Answer | None:
        """An answer as it stands in the text of all messages, behind what leads over to it; None if it does not."""
        text, turns = whole.text, whole.turns
        begin = turns.get(number)
        if begin is None or not text.startswith(before, begin):
            return None
        start = begin + len(before)
        stop = self._end(text, start, turns.get(number + 1, len(text)))
        if stop is None:
            return None
        if not template.has_marks:
            return _Answer(text, start, stop, ((start, stop),))
        answer = _learned(text, start, stop, whole.generated)
        return None if answer.learned and answer.learned[-1][1] != stop else answer

    def _lead(self, whole: Rendering, number: int, answer: _Answer, template: Template) -> str | None:
        """What leads over to an answer from where its turn begins, if the text of all messages has the answer too."""
        begin = whole.turns.get(number, answer.start + 1)
        if begin > answer.start or not whole.text.startswith(answer.text[: answer.stop]):
            return None
        before = answer.text[begin : answer.start]
        same = self._within_whole(whole, number, before, template)
        return before if same is not None and same[1:] == answer[1:] else None

    def _framed(self, conversation: _Conversation, number: int, frame: _Frame) -> _Answer | None:
        """An answer within a frame, behind what all messages have before it; None if the texts may matter."""
        begin = conversation.whole.turns.get(number)
        if begin is None or not conversation.is_opaque:
            return None
        message = conversation.messages[number]
        slots = {
            QUESTION: next((message[name] for name in REASONING if message.get(name)), ""),
            ANSWER: message["content"],
        }
        rest = SLOT.sub(lambda slot: slots[slot[0]], frame.rest)
        text, start = conversation.whole.text[:begin] + frame.before + rest, begin + len(frame.before)
        stop = self._end(text, start, len(text))
        return None if stop is None else _learned(text, start, stop, None)

    def _frame(self, conversation: _Conversation, number: int, answer: _Answer, template: Template) -> _Frame | None:
        """What stands around an answer, if all messages have the same before it and its texts stand as they are."""
        begin = conversation.whole.turns.get(number, answer.start + 1)
        if begin > answer.start:
            return None
        stand_ins = [_filled(message, OTHER, OTHER) for message in conversation.messages[:number]]
        stand_ins.append(_filled(conversation.messages[number], QUESTION, ANSWER))
        try:
            rendering = template.render(stand_ins)
        except DataError:  # it says nothing of the conversation: the answers of its kind are looked at one by one
            return None
        text = rendering.text[rendering.turns.get(number, 0) :]
        start = answer.start - begin
        frame = _Frame(text[:start], text[start:])
        return frame if self._framed(conversation, number, frame) == answer else None

    def _alone(self, conversation: _Conversation, number: int, template: Template) -> _Answer:
        """The last turn of the messages up to it: from behind the generation prompt through the token that ends it."""
        messages, tools = conversation.messages[: number + 1], conversation.tools
        rendering = template.render(messages, tools=tools)
        text, before = rendering.text, messages[:number]
        if conversation.messages is not conversation.plain:
            check_marks(text, template.render(conversation.plain[: number + 1], tools=tools).text)
        asked = template.render(before, ask=True, tools=tools).text if before else ""
        start = len(asked)
        if not before or not text.startswith(asked):
            # The prompt says more than answered turns show (DeepSeek's <think>), or there is none to answer to.
            answered = template.render([*before, {"role": "assistant", "content": ANSWER}], tools=tools).text
            start = answered.rfind(ANSWER)
            if start < 0 or (before and not asked.startswith(text[:start])):
                raise DataError(
                    f"the chat template writes what comes before turn {number + 1} differently once that turn is "
                    "answered, so the model would learn after what it never meets. Use another template."
                )
        stop = self._end(text, start, len(text))
        if stop is None:
            raise DataError(
                f"the chat template ends turn {number + 1} without a special token, "
                "so the model would never learn to stop."
            )
        answer = _learned(text, start, stop, rendering.generated if template.has_marks else None)
        if answer.learned and answer.learned[-1][1] != stop:
            raise DataError(
                f"the generation marks of the chat template leave out {literal(self.end)}, which ends turn "
                f"{number + 1}, so the model would never learn to stop. Put the token between the marks."
            )
        return answer

    def _end(self, text: str, start: int, end: int) -> int | None:
        """Where the last token of a turn ends that starts and ends there, if it has one."""
        if self._is_alone and MARK not in text and (found := text.rfind(self.end, start, end)) >= 0:
            return found + len(self.end)
        ends = [match for match in self._marked_or_not.finditer(text, start, end) if match[1]]
        chosen = [match for match in ends if match[1] == self.end] or ends
        return chosen[-1].end() if chosen else None

    def _checked(self, answer: _Answer, message: Message) -> _Answer:
        for call in message.get("tool_calls") or ():
            name = call.get("function", call).get("name", "")
            if answer.text.find(name, answer.start, answer.stop) < 0:
                raise DataError(
                    f"the chat template leaves out the tool call `{name}` of an answer. Use a template that writes "
                    "calls of tools, or give the call as the answer's content."
                )
        return answer

    def _check_roles(self, messages: list[Message], text: str, template: Template) -> None:
        """Raises DataError for a template that leaves out what a role says."""
        roles = {message["role"] for message in messages} - {"assistant"}
        silent = {role for role in roles if self._leaves_out(template, role)}
        for role, content in ((m["role"], m["content"].strip()) for m in messages if silent):
            if role in silent and content not in text:
                raise DataError(
                    f"the chat template leaves out what the role `{role}` says. Use a template that writes it, or "
                    "leave these turns out of the data."
                )

    def _leaves_out(self, template: Template, role: str) -> bool:
        if (template, role) not in self._silent:
            said = {"role": role, "content": QUESTION}
            answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            called = [answered[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
            shown = [said, *answered] if role == "system" else [*(called if role == "tool" else answered), said]
            try:
                self._silent[template, role] = QUESTION not in template.render(shown).text
            except DataError:
                self._silent[template, role] = False
        return self._silent[template, role]

    def _for_template(self, message: Message, template: Template) -> Message:
        """As the template takes it: arguments of tool calls are decoded, or text where it writes them as they are."""
        message = {key: value for key, value in message.items() if key != "train"}
        if message.get("tool_calls"):
            as_text = self._takes_text[template]
            message["tool_calls"] = [with_arguments(call, as_text) for call in message["tool_calls"]]
        return message


_KNOWN: WeakKeyDictionary[Any, tuple[Hashable, ChatTemplate]] = WeakKeyDictionary()


def _sources(tokenizer: Any) -> tuple[str, str]:
    """The templates for conversations without tools and with them."""
    given = tokenizer.chat_template
    if not isinstance(given, dict):
        return given, given
    if "default" not in given:
        raise DataError(
            f"the tokenizer has the chat templates {', '.join(map(literal, sorted(given)))}, and none is the "
            "`default`. Rename one of them in the tokenizer's folder."
        )
    default: str = given["default"]
    return default, given.get("tool_use", default)


def _filled(message: Message, reasoning: str, content: str) -> Message:
    """A message with other texts where it has some."""
    texts = {"content": content} | dict.fromkeys(REASONING, reasoning)
    return message | {name: text for name, text in texts.items() if message.get(name)}


def _learned(text: str, start: int, stop: int, generated: list[Span] | None) -> _Answer:
    """The answer in text[start:stop], with what of it generation marks enclose; without marks all of it."""
    if generated is None:
        return _Answer(text, start, stop, ((start, stop),))
    parts = ((max(begin, start), min(end, stop)) for begin, end in generated)
    return _Answer(text, start, stop, tuple((begin, end) for begin, end in parts if begin < end))


def _document(chain: list[_Answer]) -> Rendered:
    """One document of answers that follow one another."""
    last = chain[-1]
    learned = tuple(span for answer in chain for span in answer.learned)
    return Rendered(last.text[: last.stop], tuple(answer.start for answer in chain), learned)


def _says(message: Message, template: Template) -> bool:
    if message["content"] or message.get("tool_calls"):
        return True
    return not template.names.isdisjoint(REASONING) and any(message.get(name) for name in REASONING)


def _form(message: Message) -> Hashable:
    """What a template may look at in a message but for its texts."""
    content = message["content"]
    says = bool(content) and not content.isspace()
    if len(message) == 2:
        return message["role"], says
    others = tuple(sorted(key for key, value in message.items() if value and key not in ("role", "content")))
    return message["role"], says, others, len(message.get("tool_calls", ()))
