"""Python's own standard library as training data: present on every machine, readable, of a useful size."""

from __future__ import annotations

import ast
import functools
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from bigtrain.errors import DataError

VERSION = "1"  # of the selection below; part of every fingerprint
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
TABLE_FOLDERS = {"encodings", "pydoc_data"}
TABLE_FILES = {"_compat_pickle.py", "entities.py", "stringprep.py", "_casefix.py"}
SMALLEST_BODY = 32  # characters; shorter ones are `pass`, `return self._x` and the like


def root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def files() -> list[Path]:
    """The selected files, sorted by their path below `root()`. Raises DataError if there are none."""
    top = root()
    found = [path for path in top.rglob("*.py") if _selected(path.relative_to(top))]
    if not found:
        raise DataError(f"stdlib: this Python has no source files in {top}.")
    return sorted(found, key=lambda path: path.relative_to(top).as_posix())


@functools.cache
def modules() -> tuple[dict[str, str], ...]:
    """One row per file: `key` (its path below `root()`) and `text`. About 10 MB, kept for the next caller."""
    top, rows = root(), []
    for path in files():
        with tokenize.open(path) as file:  # honours a coding cookie
            text = file.read()
        if text.strip():
            rows.append({"key": path.relative_to(top).as_posix(), "text": text})
    return tuple(rows)


@functools.cache
def functions() -> tuple[dict[str, str], ...]:
    """One row per documented function or method: `key` (of its file), `prompt` (decorators, signature and
    docstring) and `completion` (the rest of the body), dedented. Inner functions stay in their bodies."""
    rows = []
    for module in modules():
        lines = module["text"].split("\n")  # not splitlines, for which a form feed ends a line too
        for node in _functions(ast.parse(module["text"])):
            split = _split(node, lines)
            if split is not None:
                prompt, completion = split
                rows.append({"key": module["key"], "prompt": prompt, "completion": completion})
    return tuple(rows)


def _selected(path: Path) -> bool:
    """`path` is relative to the library: no tests, no installed packages, no files that are mostly tables."""
    folders = set(path.parts[:-1])
    if folders & (SKIPPED_FOLDERS | TABLE_FOLDERS):
        return False
    return path.name not in TABLE_FILES and not path.name.startswith("_sysconfigdata")


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        elif isinstance(node, (ast.stmt, ast.excepthandler)):
            yield from _functions(node)


def _split(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """(prompt, completion), or None for a function without a docstring or with next to nothing after it."""
    if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    middle, last = node.body[0].end_lineno, node.end_lineno
    assert middle is not None and last is not None  # for trees that were not parsed
    if node.body[1].lineno == middle:  # `"""doc"""; statement` on one line
        return None
    indent = lines[node.lineno - 1][: node.col_offset]
    dedented = [line.removeprefix(indent) + "\n" for line in lines[first:last]]
    prompt, completion = "".join(dedented[: middle - first]), "".join(dedented[middle - first :])
    return (prompt, completion) if len(completion.strip()) >= SMALLEST_BODY else None
