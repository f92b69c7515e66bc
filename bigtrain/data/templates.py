"""Runs a chat template within bounds, and tells which part of its text comes from which message.

The template is compiled as transformers does it, with three additions. Each loop says which message it begins with,
loops and calls are counted, and the list of messages notes whether the template looks at later ones than the message
that it writes: if not, what it has written is what it would have written had the conversation ended there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from bigtrain.errors import DataError

Span = tuple[int, int]

STEPS = 2_000_000  # items of loops of a rendering, at most; a call counts as CALL of them
CALL = 10
CHARACTERS = 100_000_000  # of its text, at most
AHEAD = frozenset({"last", "length", "revindex", "revindex0", "nextitem"})  # of `loop`: what depends on later messages
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same, as in transformers


class Unbounded(Exception):
    """A template does more than any conversation needs."""


@dataclass
class Rendering:
    """What a template makes of messages.

    turns: number of a message -> where in the text the template begins to write it, as far as a loop tells.
    generated: the characters that its generation marks enclose. ahead: whether what stands before a turn may depend on
    that turn or on later ones.
    """

    text: str = ""
    turns: dict[int, int] = field(default_factory=dict)
    generated: list[Span] = field(default_factory=list)
    ahead: bool = False


class Template:
    """A chat template, compiled.

    literals: texts that it looks for in messages. names: all attributes and keys that it reads. takes_tools: whether it
    reads descriptions of tools. has_marks: whether generation marks say what an assistant generates.
    """

    def __init__(self, source: str, variables: dict[str, Any], sandbox: Sandbox | None = None):
        """variables: those of every rendering. Raises DataError for what is no template."""
        self.given = source, variables
        self._environment = sandbox or Sandbox()
        try:
            tree = self._environment.parse(source)
            self._template = self._environment.from_string(source)
            self._variables = {**self._template.globals, **variables}
        except Exception as error:  # nested too deeply, for one
            raise DataError(f"the tokenizer's chat template is not valid: {_told(error)}.") from error
        reads: list[nodes.Getattr | nodes.Getitem] = [*tree.find_all(nodes.Getattr), *tree.find_all(nodes.Getitem)]
        self.names = frozenset(name for node in reads if isinstance(name := _name(node), str))
        self.takes_tools = any(variable.name == "tools" for variable in tree.find_all(nodes.Name))
        self.literals = _literals(tree) - self.names
        self.has_marks = any(made.name == "__generated" for made in tree.find_all(nodes.Filter))
        self._ahead = any(_is_loop(node.node) and _name(node) in AHEAD for node in reads)

    def render(self, messages: list[dict[str, Any]], ask: bool = False, tools: Any = None) -> Rendering:
        """What it makes of them, with the generation prompt if `ask`. Raises DataError for whatever it raises, and
        for more than STEPS and CHARACTERS."""
        run = _Run([{**message} if len(message) == 2 else _with_reasoning(message) for message in messages])
        self._environment.run = run
        self._environment.filters["__turn"] = run.at
        given = {"messages": run.messages, "tools": tools, "documents": None, "add_generation_prompt": ask}
        context = Context(self._environment, self._variables | given, None, self._template.blocks)
        try:
            run.rendering.text = run.text(self._template.root_render_func(context))
        except TemplateError as error:
            raise DataError(f"the tokenizer's chat template refuses it: {error}") from error
        except Unbounded as error:
            raise DataError(f"the tokenizer's chat template does not come to an end: {error}") from error
        except Exception as error:  # a template is a program, and may raise anything
            raise DataError(f"the tokenizer's chat template fails on it: {_told(error)}.") from error
        run.rendering.ahead = run.looked_ahead or self._ahead
        return run.rendering


class _Mark(str):
    """An empty piece of a text that says what comes next: a message's number, or whether it is generated."""

    what: int | bool

    def __str__(self) -> str:
        return self


class _Run:
    """One rendering: its messages, what has been told about them, and what it has cost."""

    def __init__(self, messages: list[dict[str, Any]]):
        self.rendering = Rendering()
        self.messages = _Messages(messages)
        self.messages.run = self
        self.numbers = {id(message): number for number, message in enumerate(messages)}
        self.current = -1  # the message that a loop has come to
        self.looked_ahead = False
        self.steps = 0

    def text(self, template: Iterable[str]) -> str:
        length, generated, pieces = 0, 0, []
        for piece in template:
            if type(piece) is not _Mark:
                length += len(piece)
                pieces.append(piece)
                if length > CHARACTERS:
                    raise Unbounded(f"it has written more than {CHARACTERS:,} characters.")
            elif piece.what is True:
                generated = length
            elif piece.what is False:
                self.rendering.generated.append((generated, length))
            else:
                self.rendering.turns[piece.what] = length
        return "".join(pieces)

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > STEPS:
            raise Unbounded(f"its loops and calls take more than {STEPS:,} steps.")

    def at(self, item: Any) -> str:
        """A filter: a mark, if a loop has come to a message."""
        number = self.numbers.get(id(item))
        if number is None:
            return ""
        if number <= self.current:  # an earlier loop has seen it
            self.looked_ahead = True
        else:
            self.current = number
        return _mark(number)


class _Messages(list[dict[str, Any]]):
    """Notes what depends on messages behind the current one. `for` loops do not; they are given a plain list."""

    run: _Run

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            from_start = index.stop is None and index.step in (None, 1) and (index.start or 0) >= 0
            found = _Messages(list.__getitem__(self, index))
            found.run = self.run
        else:
            found = list.__getitem__(self, index)
            from_start = index >= 0 and self.run.numbers[id(found)] <= max(self.run.current, 0)
        self.run.looked_ahead |= not from_start
        return found

    def __bool__(self) -> bool:
        return list.__len__(self) > 0

    def __radd__(self, before: list[Any]) -> list[Any]:
        self.run.looked_ahead = True
        return before + self.plain()

    def plain(self) -> list[dict[str, Any]]:
        return [*list.__iter__(self)]


def _noted(name: str) -> Any:
    def method(self: _Messages, *arguments: Any) -> Any:
        self.run.looked_ahead = True
        return getattr(list, name)(self, *arguments)

    return method


for _of_the_whole in ("len", "iter", "reversed", "contains", "eq", "ne", "add", "mul", "rmul"):
    setattr(_Messages, f"__{_of_the_whole}__", _noted(f"__{_of_the_whole}__"))


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox, with its filters, globals and white space; the rendering at hand is `run`."""

    intercepted_binops = frozenset({"*", "**"})
    run: _Run

    def __init__(self) -> None:
        theirs = _theirs()
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.filters |= theirs.filters
        self.globals |= theirs.globals
        self.filters |= {
            "__counted": self.counted,
            "__generated": _generated,
            "__turn": str,
        }  # a rendering sets the last

    def getattr(self, obj: Any, attribute: str) -> Any:
        """The same as the sandbox's, without an exception for each key of a dict."""
        if type(obj) is dict and attribute not in _DICT:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute in _SAFE.get(type(obj), ()):
            return getattr(obj, attribute)
        if issubclass(type(obj), Namespace) and not attribute.startswith("_"):
            found = getattr(obj, attribute, self)
            return found if found is not self else self.undefined(obj=obj, name=attribute)
        if type(obj) is _Messages:  # its methods are about the whole list
            self.run.looked_ahead = True
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.run.spend(CALL)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [abs(value) if isinstance(value, int) else len(value) for value in (left, right) if _counts(value)]
        if len(sizes) == 2 and sizes[0] * sizes[1] > STEPS and not (operator == "*" and _are_numbers(left, right)):
            raise Unbounded(f"`{operator}` makes something larger than {STEPS:,}.")
        return super().call_binop(context, operator, left, right)

    def counted(self, items: Any) -> Any:
        """A filter: what a loop goes through, counted."""
        run = self.run
        if type(items) is _Messages:
            run.spend(list.__len__(items) + 1)
            return items.plain()
        if hasattr(items, "__len__"):
            run.spend(len(items) + 1)
            return items
        return _each_counted(run, items)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in [*tree.find_all(nodes.For)]:
            loop.iter = filtered(loop.iter, "__counted")
            if isinstance(loop.target, nodes.Name):
                item = nodes.Name(loop.target.name, "load", lineno=loop.lineno)
                loop.body.insert(0, nodes.Output([filtered(item, "__turn")], lineno=loop.lineno))
        return tree


class _Generation(Extension):
    """`{% generation %}`: its text with a mark before and one behind."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, behind = (
            nodes.Output([filtered(nodes.Const(edge, lineno=line), "__generated")], lineno=line)
            for edge in (True, False)
        )
        return [before, nodes.Scope(body, lineno=line), behind]


_DICT = frozenset(dir(dict))
_SAFE: dict[type, frozenset[str]] = {
    LoopContext: frozenset({"first", "last", "index", "index0", "previtem", "nextitem", "length"}),
    str: frozenset({"startswith", "endswith", "split", "strip", "lstrip", "rstrip", "upper", "lower", "replace"}),
}


@lru_cache
def _theirs() -> Environment:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment


def _each_counted(run: _Run, items: Iterable[Any]) -> Iterator[Any]:
    run.spend(1)
    for item in items:
        run.spend(1)
        yield item


@pass_context
def _generated(_: Context, edge: bool) -> str:
    return _mark(edge)


@lru_cache(4096, typed=True)
def _mark(what: int | bool) -> _Mark:
    mark = _Mark()
    mark.what = what
    return mark


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A copy, with the model's reasoning under all names that templates read, as transformers gives it."""
    if message.keys().isdisjoint(REASONING):
        return {**message}
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return {**message} if found is None else {"thinking": found, **message, "reasoning_content": found}


def filtered(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    """An expression with a filter on it."""
    return nodes.Filter(node, name, [*arguments], [], None, None, lineno=node.lineno)


def _name(node: nodes.Getattr | nodes.Getitem) -> Any:
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) else None


def _is_loop(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _literals(tree: nodes.Template) -> frozenset[str]:
    """Texts that are looked for: `'x' in ...`, and what methods, filters and tests are given."""
    places: list[nodes.Node] = []
    for compare in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            places.append(compare.expr)
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Name):  # raise_exception, namespace
            places += call.args
    for applied in (*tree.find_all(nodes.Filter), *tree.find_all(nodes.Test)):
        places += applied.args
    found = (node.value for place in places for node in _constants(place))
    return frozenset(text for text in found if isinstance(text, str) and len(text.strip()) > 1)


def _constants(node: nodes.Node) -> Iterator[nodes.Const]:
    if isinstance(node, nodes.Const):
        yield node
    yield from node.find_all(nodes.Const)


def _counts(value: Any) -> bool:
    return isinstance(value, int | str | list | tuple)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int) for value in values)
