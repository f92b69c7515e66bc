"""What stands around the texts of messages in a template's text: the same for all texts that it does not look into.

A template that is watched is given characters that stand for texts (stand_ins.py). Whatever it does with them is held
against lists of what comes out alike for all texts that are cut alike: writing, joining and storing them, asking
whether they are there, and looking in them for constants, which are noted. Anything else with a text in it says
`looked`, and nothing is known of other texts. Arguments of tool calls and descriptions of tools stand in as a whole: a
template may write them as JSON, and no more.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context, Macro, Undefined
from jinja2.visitor import NodeTransformer

from bigtrain.data.marks import ANSWER
from bigtrain.data.stand_ins import OPAQUE, TIME, Cut, Opaque
from bigtrain.data.templates import Sandbox, Template, filtered

SCOPES = frozenset({"_loop_vars", "_block_vars"})  # that jinja gives to each call
HELD = re.compile("[\ue000-\uf8ff\U00100000-\U0010ffff]")
CALCULATIONS = (nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Sub, nodes.Mod, nodes.Pow)
KINDS = frozenset({"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number", "boolean"})
DEFAULTS = frozenset({"default", "d"})
FILTERS = {"trim": "__trimmed", "string": "__shown"}
FILTERS |= dict.fromkeys(("length", "count", "first", "last", "list"), "__listed")
TRIMS = frozenset({"strip", "lstrip", "rstrip"})
LOOKS = frozenset({"startswith", "endswith", "split", "replace"})
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    **{"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt},
    **{"gteq": operator.ge, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b},
}


class WatchedTemplate(Template):
    """A template that is given stand-ins. looked: whether what it has made of them is no rule for other texts. pieces:
    the constants that it has looked for; texts are to be cut at them."""

    def __init__(self, source: str, variables: dict[str, Any]):
        self._watching = _Watching()
        super().__init__(source, variables, self._watching)
        self._variables["strftime_now"] = lambda _: TIME
        self._is_blind = bool(HELD.search(source + str(variables)))

    @property
    def pieces(self) -> set[str]:
        return self._watching.pieces

    @property
    def looked(self) -> bool:
        return self._is_blind or self._watching.is_blind or self._watching.looked

    def watch(self, cut: Cut) -> None:
        """It is given what stands for these from here on."""
        self._watching.looked, self._watching.ids = False, cut.ids
        self._watching.given = f"{cut.form}{TIME}{ANSWER}"


class _Watching(Sandbox):
    looked = is_blind = False
    given = ""  # all texts
    ids: Collection[str] = ()

    def __init__(self) -> None:
        super().__init__()
        self.pieces: set[str] = set()
        ours = (self.plain, self.whole, self.listed, self.shown, self.trimmed, self.pairs, self.compared, self.json)
        self.filters |= {f"__{method.__name__}": method for method in ours}

    def plain(self, value: Any) -> Any:
        """A filter: no text may be in it."""
        self.looked |= _holds(value)
        return value

    def whole(self, value: Any) -> Any:
        """A filter: it may hold texts, and is none."""
        self.looked |= isinstance(value, str) and _holds(value)
        return value

    def listed(self, value: Any) -> Any:
        """A filter: it is no text, and has no keys."""
        return self.plain(value) if isinstance(value, str | dict) else value

    def shown(self, value: Any) -> Any:
        """A filter: it is a text, or holds none, as Python would write it in another way."""
        return value if isinstance(value, str) else self.plain(value)

    def trimmed(self, value: Any, *characters: Any) -> Any:
        """A filter: the edges of texts are not among the characters."""
        for given in characters:
            self.plain(given)
            self.looked |= not _has_texts_alone(value)
            if isinstance(given, str):
                self.pieces.update(character for character in given if not character.isspace())
        return self.shown(value)

    def pairs(self, items: Any) -> Any:
        """A filter: its items are taken apart."""
        return items if isinstance(items, type({}.items())) else self.plain(items)

    def json(self, value: Any) -> Any:
        """A filter: what `tojson` makes of it."""
        return next(iter(value)) if isinstance(value, Opaque) else self.filters["tojson"](self.plain(value))

    def counted(self, items: Any) -> Any:
        return super().counted(self.listed(items))

    def compared(self, left: Any, how: str, right: Any) -> Any:
        """A filter: a comparison."""
        if _holds(left) or _holds(right):
            self.looked |= not self._is_known(left, how, right)
        return COMPARE[how](left, right)

    def _is_known(self, left: Any, how: str, right: Any) -> bool:
        if how in ("eq", "ne"):
            if left in self.ids and right in self.ids:
                return True
            text, other = (left, right) if self._is_text(left) else (right, left)
            return self._is_text(text) and not _holds(other) and self._noted([other])
        if how in ("in", "notin") and not _holds(left):
            return type(right) is dict or (self._is_text(right) and self._noted([left]))
        among = how in ("in", "notin") and isinstance(right, list | tuple | dict) and not _holds([*right])
        return among and self._is_text(left) and self._noted([*right])

    def _is_text(self, value: Any) -> bool:
        """Whether it is what stands for a text or for a part of it, and nothing else with it."""
        return isinstance(value, str) and _holds(value) and _has_texts_alone(value) and value in self.given

    def _noted(self, constants: list[Any]) -> bool:
        self.pieces.update(constant for constant in constants if isinstance(constant, str) and constant)
        return True

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.looked |= isinstance(obj, str) and attribute not in LOOKS | TRIMS and _holds(obj)
        self.looked |= isinstance(obj, Opaque)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.whole(obj)
        self.plain(argument)
        self.looked |= isinstance(obj, Opaque)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if not isinstance(__obj, Macro):
            given = {name: value for name, value in kwargs.items() if name not in SCOPES}
            __self.plain([*args, *given.values()])
            __self._watch_method(__obj, args, given)
        return super().call(__context, __obj, *args, **kwargs)

    def _watch_method(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if not _holds(owner):
            return
        if isinstance(owner, dict) and name == "get":
            return
        if isinstance(owner, str) and name in TRIMS:
            self.trimmed(owner, *args)
        elif not kwargs and self._is_text(owner) and name in LOOKS and args and isinstance(args[0], str) and args[0]:
            self.looked |= len(args) > 1 + (name in ("replace", "split"))
            self.pieces.add(args[0])
        else:
            self.looked = True

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        blocks = tree.find_all((nodes.FilterBlock, nodes.AssignBlock, nodes.EvalContextModifier))
        self.is_blind = any(getattr(block, "filter", block) is not None for block in blocks)
        if not self.is_blind:
            _Watcher().visit(tree)
        return tree


class _Watcher(NodeTransformer):
    """Puts a filter of `_Watching` on what may be a text, wherever a template does something with it."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, CALCULATIONS):
            node.left, node.right = filtered(node.left, "__plain"), filtered(node.right, "__plain")
        elif isinstance(node, nodes.Neg | nodes.Pos):
            node.node = filtered(node.node, "__plain")
        elif isinstance(node, nodes.Call):
            node.dyn_args, node.dyn_kwargs = (
                given and filtered(given, "__plain") for given in (node.dyn_args, node.dyn_kwargs)
            )
        elif isinstance(node, nodes.Concat):
            node.nodes = [filtered(part, "__shown") for part in node.nodes]
        elif isinstance(node, nodes.Output):
            node.nodes = [part if _is_ours(part) else filtered(part, "__shown") for part in node.nodes]
        elif isinstance(node, nodes.Pair):
            node.key = filtered(node.key, "__plain")
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node.node, node.arg = filtered(node.node, "__whole"), _all(node.arg, "__plain")
        elif isinstance(node, nodes.For) and isinstance(node.target, nodes.Tuple):
            node.iter = filtered(node.iter, "__pairs")
        elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Tuple):
            node.node = filtered(node.node, "__plain")
        elif isinstance(node, nodes.With):
            node.values = [filtered(value, "__shown") for value in node.values]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if len(node.ops) > 1:
            node.expr = filtered(node.expr, "__plain")
            for operand in node.ops:
                operand.expr = filtered(operand.expr, "__plain")
            return node
        return filtered(node.expr, "__compared", nodes.Const(node.ops[0].op), node.ops[0].expr)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if _is_ours(node) or node.name in DEFAULTS:
            return node
        way = FILTERS.get(node.name)
        bare = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if node.name == "tojson" and bare and isinstance(node.node, nodes.Expr):
            return filtered(node.node, "__json")
        return _all(node, way if way and bare else "__plain")

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.name in KINDS else _all(node, "__plain")


def _all(node: Any, way: str) -> Any:
    """The same node, with a filter on all that it is given."""
    for field in ("node", "start", "stop", "step", "dyn_args", "dyn_kwargs"):
        if isinstance(value := getattr(node, field, None), nodes.Expr):
            setattr(node, field, filtered(value, way))
    if hasattr(node, "args"):
        node.args = [filtered(value, way) for value in node.args]
        for given in node.kwargs:
            given.value = filtered(given.value, way)
    return node


def _is_ours(node: nodes.Node) -> bool:
    return isinstance(node, nodes.TemplateData) or (isinstance(node, nodes.Filter) and node.name.startswith("__"))


def _has_texts_alone(value: Any) -> bool:
    """Whether no character in it stands for arguments or a tool."""
    return not isinstance(value, str) or OPAQUE.search(value) is None


def _holds(value: Any) -> bool:
    """Whether a text may be in it."""
    if isinstance(value, str):
        return HELD.search(value) is not None
    if isinstance(value, dict):
        return any(_holds(key) or _holds(held) for key, held in value.items())
    if isinstance(value, list | tuple):
        return any(_holds(held) for held in value)
    return not (value is None or isinstance(value, int | float | Undefined))
