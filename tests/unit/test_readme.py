"""The commands of both READMEs are there after the READMEs' own set-up, `make quickstart`: programs, files, options."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bigtrain.cli import app

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README.zh-CN.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMAND = re.compile(r"^(?:\$ )?((?:\.venv/bin/)?(?:bigtrain|python|pytest|make)(?= [a-z.-]|$)[^#|`]*)")


def commands(readme: str) -> Iterator[list[str]]:
    """Of fenced blocks line by line, and of code in a line; what is to be filled in stays as it stands."""
    text = (ROOT / readme).read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*"\n".join(fenced).splitlines(), *spans]:
        found = COMMAND.match(line.strip())
        if found is not None:
            try:
                yield shlex.split(re.sub(r"[\[\]]", "", found[1]))
            except ValueError:  # a prompt that goes on in the next line
                yield found[1].split()


def distributions(*extras: str) -> set[str]:
    """What `pip install '.[EXTRAS]'` brings, with all that it needs."""
    have = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    wanted += [Requirement(text) for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    found: set[str] = set()
    while wanted:
        name = canonicalize_name(wanted.pop().name)
        if name in found or name not in have:
            continue
        found.add(name)
        needs = map(Requirement, have[name].requires or [])
        wanted += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def imported(file: Path, seen: set[Path]) -> Iterator[str]:
    """The modules of others that a file of the repository imports where it begins, and those that its own import."""
    seen.add(file)
    for node in ast.parse(file.read_text()).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            own = [ROOT / f"{name.replace('.', '/')}.py", file.parent / f"{name}.py"]
            mine = next((path for path in own if path.is_file() and "bigtrain" not in path.parts[-2:]), None)
            if mine is None:
                yield name.partition(".")[0]
            elif mine not in seen:
                yield from imported(mine, seen)


@pytest.mark.parametrize("readme", READMES)
def test_every_command_is_there_after_the_set_up(readme: str) -> None:
    setup = (ROOT / "Makefile").read_text().partition("$(VENV)/.ready:")[2].partition("$(VENV)/.dev:")[0]
    [extras] = re.findall(r"-e '\.\[(\w+)\]'", setup)
    there = distributions(extras)
    programs = {entry.name for name in there for entry in importlib.metadata.distribution(name).entry_points}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    providers = importlib.metadata.packages_distributions()
    checked = 0
    for words in commands(readme):
        program, *rest = words
        name = program.removeprefix(".venv/bin/")
        checked += 1
        if name == "make":
            assert {word for word in rest if word.isalpha()} <= targets, words
            continue
        assert name in programs | {"python", "bigtrain"}, words
        files = [ROOT / word for word in rest if word.startswith(("tests/", "benchmarks/", "configs/"))]
        assert [file for file in files if not file.exists()] == [], words
        scripts = [file for file in files if file.suffix == ".py"]
        if name == "pytest":
            scripts.append(ROOT / "tests" / "conftest.py")
        needed = {module for script in scripts for module in imported(script, set())}
        missing = {
            module
            for module in needed - set(sys.stdlib_module_names) - {"bigtrain", "tests"}
            if not there & {canonicalize_name(d) for d in providers.get(module, [])}
        }
        assert missing == set(), f"{' '.join(words)} needs {missing}, which `make setup` does not install"
    assert checked > 30


@pytest.mark.parametrize("readme", READMES)
def test_every_command_of_bigtrain_has_the_options_that_are_named(readme: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(readme):
        if words[0].removeprefix(".venv/bin/") != "bigtrain" or len(words) == 1 or words[1].startswith("-"):
            continue
        assert words[1] in known, words
        options = {option for parameter in known[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words
