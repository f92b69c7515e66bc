"""Conversations as text that a tokenizer's chat template makes, and which characters of it are learned.

The rule, for every template: what the model meets before its answer is the template of the turns before, with its
generation prompt; what it learns is the rest of the template of the turns up to and with the answer, through the token
that ends it. Answers whose texts continue one another share one document. Where a template rewrites earlier turns once
more follow (it takes their reasoning out, say), a new document begins: each answer is learned after what the model will
meet when it is asked.

Where a template has generation marks, they narrow that down: only what they enclose is learned.

To follow the rule to the letter, a conversation is rendered twice for each of its answers. That is done once for each
kind of answer, and what comes before it is remembered; the next conversations are rendered once. Of a template that
looks ahead it is done with characters that stand for the texts (stand_ins.py, frames.py), and what stands around an
answer is remembered where more that follow change it. Texts that the template may look into are rendered for each
answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from bigtrain.config.files import literal
from bigtrain.data.answers import Answer, Border, Conversation, answer_in, form_of
from bigtrain.data.call_arguments import CALL, takes_text, with_arguments
from bigtrain.data.conversations import Message
from bigtrain.data.frames import WatchedTemplate
from bigtrain.data.marks import ANSWER, MARK, QUESTION, any_of, check_marks, marked, texts_of
from bigtrain.data.stand_ins import TIME, Cut, cut, shape_of, tool_stand_ins
from bigtrain.data.templates import REASONING, Rendering, Span, Template
from bigtrain.errors import DataError

REMEMBERED = 100_000  # kinds of answers


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
        self._watched: dict[Template, WatchedTemplate] = {}
        self._before: dict[Hashable, Border | None] = {}  # kind of an answer -> what is known; None: look at each
        self._met: set[Hashable] = set()  # kinds of answers that have come once
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
        chains: list[list[Answer]] = []
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

    def _conversation(self, messages: list[Message], tools: Any, template: Template) -> Conversation:
        plain = [message if len(message) == 2 else self._for_template(message, template) for message in messages]
        joined = "\0".join(texts_of(plain))
        guarded, has_tokens = plain, self._of_template.search(joined) is not None
        if has_tokens:
            guarded = marked(plain, self._of_turns, self._of_template)
        whole = template.render(guarded, tools=tools)
        if guarded is not plain:
            check_marks(whole.text, template.render(plain, tools=tools).text)
        self._check_roles(plain, whole.text, template)
        found = None
        if whole.ahead and not has_tokens and self._can_stand_in(plain, tools):
            watched = self._watched.get(template)
            found = cut(plain, [piece for piece in watched.pieces if piece in joined] if watched else ())
        numbers = self._forms
        forms = [numbers.setdefault(form_of(message), len(numbers)) for message in plain]
        seen = [0]
        for form in forms:
            seen.append(seen[-1] | 1 << form)
        is_opaque = found is not None if whole.ahead else not any(literal in joined for literal in template.literals)
        return Conversation(guarded, plain, tools, whole, forms, seen, found, is_opaque)

    def _can_stand_in(self, messages: list[Message], tools: Any) -> bool:
        """Whether characters can stand for all that messages and tools say."""
        calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
        if not all(shape_of(call) is not None for held in calls for call in held):
            return False
        if not (calls or tools):
            return True
        if tools and not (isinstance(tools, list) and all(tool and isinstance(tool, dict) for tool in tools)):
            return False
        return self._of_template.search(json.dumps([tools, calls], ensure_ascii=False)) is None

    def _answer(self, conversation: Conversation, number: int, template: Template) -> Answer:
        kind = (template, conversation.kind(number))
        border, message = self._before.get(kind), conversation.messages[number]
        if border is not None and conversation.is_opaque:
            known = self._bordered(conversation, number, border, template)
            if known is not None:
                return self._checked(known, message) if "tool_calls" in message else known
        answer, more = self._alone(conversation, number, template)
        self._checked(answer, message)
        if conversation.is_opaque and kind not in self._before and self._is_worth_it(kind, conversation.cut):
            if conversation.cut:
                self._before[kind] = self._watched_border(conversation, conversation.cut, number, template)
            else:
                self._before[kind] = self._lead(conversation.whole, number, answer, more, template)
        return answer

    def _is_worth_it(self, kind: Hashable, cut: Cut | None) -> bool:
        """Whether more answers of a kind may come; where texts are cut in many ways, when it comes again."""
        if len(self._before) + len(self._met) >= REMEMBERED:
            return False
        if cut is None or cut.is_whole or kind in self._met:
            return True
        self._met.add(kind)
        return False

    def _bordered(self, conversation: Conversation, number: int, border: Border, template: Template) -> Answer | None:
        """An answer by what is known of its kind; None if that does not hold for it."""
        whole, before, more, rest = conversation.whole, *border
        if conversation.cut:
            before, more, rest = map(conversation.cut.filled, (before, more, rest or ""))
        if border.rest is None:
            answer = self._within_whole(whole, number, before, template)
        else:
            begin = whole.turns[number]
            text, start = whole.text[:begin] + before + (rest or ""), begin + len(before)
            stop = self._end(text, start, len(text))
            answer = None if stop is None else answer_in(text, start, stop, None)
        if answer is not None and more and answer.text.startswith(more, answer.start):
            return None
        return answer

    def _within_whole(self, whole: Rendering, number: int, before: str, template: Template) -> Answer | None:
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
            return Answer(text, start, stop, ((start, stop),))
        answer = answer_in(text, start, stop, whole.generated)
        return None if answer.learned and answer.learned[-1][1] != stop else answer

    def _lead(self, whole: Rendering, number: int, answer: Answer, more: str, template: Template) -> Border | None:
        """What is known of an answer if the text of all messages has it too."""
        begin = whole.turns.get(number, answer.start + 1)
        if begin > answer.start or not whole.text.startswith(answer.text[: answer.stop]):
            return None
        before = answer.text[begin : answer.start]
        same = self._within_whole(whole, number, before, template)
        return Border(before, more) if same is not None and same[1:] == answer[1:] else None

    def _watched_border(self, conversation: Conversation, cut: Cut, number: int, template: Template) -> Border | None:
        """What is known of answers in conversations that are cut alike, whatever their texts, if anything is."""
        messages = cut.stand_ins(conversation.plain)
        try:
            watched = self._watched.get(template) or WatchedTemplate(*template.given)
            self._watched[template] = watched
            watched.watch(cut)
            tools = tool_stand_ins(conversation.tools)
            whole = watched.render(messages, tools=tools)
            stood_in = replace(conversation, messages=messages, plain=messages, tools=tools)
            answer, more = self._alone(stood_in, number, watched)
        except DataError:  # it says nothing of the conversation: the answers of its kind are looked at one by one
            return None
        begin = whole.turns.get(number, answer.start + 1)
        if watched.looked or begin > answer.start or whole.text[:begin] != answer.text[:begin]:
            return None
        border = self._lead(whole, number, answer, more, watched)
        if border is None and not template.has_marks:
            border = Border(answer.text[begin : answer.start], more, answer.text[answer.start :])
        return None if border is None or any(TIME in (part or "") for part in border) else border

    def _alone(self, conversation: Conversation, number: int, template: Template) -> tuple[Answer, str]:
        """The last turn of the messages up to it: from behind the generation prompt through the token that ends it.
        With what the prompt says beyond it."""
        messages, tools = conversation.messages[: number + 1], conversation.tools
        rendering = template.render(messages, tools=tools)
        text, before = rendering.text, messages[:number]
        if conversation.messages is not conversation.plain:
            check_marks(text, template.render(conversation.plain[: number + 1], tools=tools).text)
        asked = template.render(before, ask=True, tools=tools).text if before else ""
        start, more = len(asked), ""
        if not before or not text.startswith(asked):
            # The prompt says more than answered turns show (DeepSeek's <think>), or there is none to answer to.
            answered = template.render([*before, {"role": "assistant", "content": ANSWER}], tools=tools).text
            start = answered.rfind(ANSWER)
            more = asked[max(start, 0) :]
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
        answer = answer_in(text, start, stop, rendering.generated if template.has_marks else None)
        if answer.learned and answer.learned[-1][1] != stop:
            raise DataError(
                f"the generation marks of the chat template leave out {literal(self.end)}, which ends turn "
                f"{number + 1}, so the model would never learn to stop. Put the token between the marks."
            )
        return answer, more

    def _end(self, text: str, start: int, end: int) -> int | None:
        """Where the last token of a turn ends that starts and ends there, if it has one."""
        if self._is_alone and MARK not in text and (found := text.rfind(self.end, start, end)) >= 0:
            return found + len(self.end)
        ends = [match for match in self._marked_or_not.finditer(text, start, end) if match[1]]
        chosen = [match for match in ends if match[1] == self.end] or ends
        return chosen[-1].end() if chosen else None

    def _checked(self, answer: Answer, message: Message) -> Answer:
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
        if "train" in message:
            message = {key: value for key, value in message.items() if key != "train"}
        if message.get("tool_calls"):
            as_text = self._takes_text[template]
            return message | {"tool_calls": [with_arguments(call, as_text) for call in message["tool_calls"]]}
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


def _document(chain: list[Answer]) -> Rendered:
    """One document of answers that follow one another."""
    last = chain[-1]
    learned = tuple(span for answer in chain for span in answer.learned)
    return Rendered(last.text[: last.stop], tuple(answer.start for answer in chain), learned)


def _says(message: Message, template: Template) -> bool:
    if message["content"] or message.get("tool_calls"):
        return True
    return not template.names.isdisjoint(REASONING) and any(message.get(name) for name in REASONING)
