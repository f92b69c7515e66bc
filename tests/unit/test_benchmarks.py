"""The benchmarks stand on what is there: each file can be imported, and has what it imports from the package."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_can_be_imported(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.syspath_prepend(str(file.parents[1]))
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[spec.name])
