"""Documents from files, functions and the standard library; who is held out."""

from __future__ import annotations

import ast
import gzip
import json
import os
import shutil
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import fsspec
import pytest

from bigtrain.config.schema import SourceConfig
from bigtrain.config.sources import wrong_with
from bigtrain.data import fingerprints, stdlib
from bigtrain.data.files import BUFFER, File, _nothing, hidden
from bigtrain.data.fingerprints import fingerprint, is_known
from bigtrain.data.sources import documents, is_held_out
from bigtrain.errors import DataError


def read(source: object, *columns: str, **mapping: str) -> list[dict[str, str]]:
    return list(documents(SourceConfig(source=str(source), columns=mapping), (columns or ("text",),)))


def texts(source: object, **mapping: str) -> list[str]:
    return [row["text"] for row in read(source, **mapping)]


def write_rows(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# Files.


def test_each_file_is_one_document_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", "sub/[x]*.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"one\n\ntwo {name}\n")
    (tmp_path / ".hidden").write_text("no")
    assert texts(tmp_path) == [f"one\n\ntwo {name}\n" for name in ("a.py", "b.txt", "sub/[x]*.txt", "sub/c.md")]
    assert texts(tmp_path / "*.py") == ["one\n\ntwo a.py\n"]
    assert texts(tmp_path / "**" / "*.md") == ["one\n\ntwo sub/c.md\n"]
    assert texts(tmp_path / "sub" / "[x]*.txt") == ["one\n\ntwo sub/[x]*.txt\n"]


def test_what_others_put_beside_data_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """_SUCCESS, .crc and the like: passed over and counted where a folder is read, read where they are named."""
    table = tmp_path / "table"
    for name in ("_SUCCESS", "_metadata", ".part-0.txt.crc", "_temporary/0/a.txt", "year=1/part-0.txt", "b/_c.txt"):
        (table / name).parent.mkdir(parents=True, exist_ok=True)
        (table / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(table), f"/{tmp_path.name}/table", recursive=True)
    for folder in (table, "table", "table/", f"file://{table}", f"memory://{tmp_path.name}/table"):
        assert texts(folder) == ["year=1/part-0.txt"]
    assert hidden("table") == hidden(str(table)) == hidden(f"file://{table}") == 5
    assert hidden(f"memory://{tmp_path.name}/table") == 5
    assert texts(table / "_SUCCESS") == texts(table / "_S*") == ["_SUCCESS"]
    assert sorted(texts(table / "**" / "*.txt")) == ["_temporary/0/a.txt", "b/_c.txt", "year=1/part-0.txt"]
    assert hidden(str(table / "_SUCCESS")) == hidden(str(table / "_*")) == 0


@pytest.mark.parametrize("query", ["", "?token=x", "?a=b.txt&c=/d.txt", "#part"])
def test_the_suffix_of_a_url_is_that_of_its_path(query: str) -> None:
    url = f"https://host/a.jsonl.gz{query}"
    file = File(None, url, url)
    assert (file.kind, file.compression, file.stem) == (".jsonl", "gzip", "a.jsonl")
    assert File(None, "what?.txt", "what?.txt").kind == ".txt"
    with pytest.raises(DataError, match="there is no such file"):  # and no pattern that nothing matches
        _nothing(url, folder=False)


def test_urls_of_the_web_without_their_package_are_refused_before_anything_starts(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    for protocol in ("http", "https"):
        sys.modules["fsspec.registry"]._registry.pop(protocol, None)
        told = wrong_with(SourceConfig(source=f"{protocol}://host/a.jsonl?token=x"))
        assert told is not None and told.endswith("`pip install 'bigtrain[http]'`.")


def test_a_file_in_a_hidden_folder_can_be_named(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "__x").mkdir(parents=True)
    (tmp_path / ".cache" / "__x" / ".a.txt").write_text("found")
    assert texts(tmp_path / ".cache" / "__x" / ".a.txt") == ["found"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert texts("a.txt") == texts("*.txt") == texts(".") == ["here"]


def test_rows_of_json_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", {"text": "é"}, {"text": "two", "other": [1]})
    (tmp_path / "b.json").write_text(json.dumps([{"other": {"x": 1}, "text": "three"}]))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "four"}\n')
    (tmp_path / "d.txt").write_text("five")
    (tmp_path / "e.jsonl").write_text("")
    write_rows(tmp_path / "f.jsonl", {"text": "six"})
    assert texts(tmp_path) == ["é", "two", "three", "four", "five", "six"]


def test_columns_are_mapped_and_others_left_out(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "id": 7, "more": "m"})
    assert read(file, "prompt", "completion", prompt="question", completion="answer", key="id") == [
        {"key": "7", "where": f"{file}:1", "prompt": "q", "completion": "a"}
    ]


def test_keys_are_those_of_the_content(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", *({"text": text} for text in ("x", "y", "x")), {"text": "x", "key": "k"})
    keys = [row["key"] for row in read(file)]
    assert keys[0] == keys[2] != keys[1]
    assert keys[3] == "k"
    (tmp_path / "same.txt").write_text("x")
    assert read(tmp_path / "same.txt")[0]["key"] == keys[0]


def test_nothing_is_copied_to_a_cache(tmp_path: Path) -> None:
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = sorted(cache.rglob("*")) if cache.exists() else []
    write_rows(tmp_path / "a.jsonl", {"text": "x" * 1000})
    (tmp_path / "b.txt").write_text("y")
    assert len(texts(tmp_path)) == 2
    assert (sorted(cache.rglob("*")) if cache.exists() else []) == before


# What can be wrong with them.


@pytest.mark.parametrize("name", ["absent.txt", "absent/", "*.nothing", "empty"])
def test_a_source_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for ask in (texts, lambda source: fingerprint(SourceConfig(source=str(source)))):
        with pytest.raises(DataError, match=r"no such file|no file matches|holds no files"):
            ask(tmp_path / name)


def test_an_empty_source(tmp_path: Path) -> None:
    for content in ("", "  \n"):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"a\.jsonl: holds no documents"):
            texts(tmp_path / "a.jsonl")


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", {"id": 1, "txt": "x"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column `text`.*`id`, `txt`.*columns: \{text: txt\}"):
        texts(tmp_path)
    with pytest.raises(DataError, match=r"no column `tx`.*nearest is `txt`"):
        texts(file, text="tx")
    with pytest.raises(DataError, match=r"maps `texts`.*nearest of its columns is `text`"):
        texts(file, texts="txt")
    with pytest.raises(DataError, match=r"stdlib: .*no column `prompt`"):
        read("stdlib", "prompt", "completion")


@pytest.mark.parametrize("value", [True, 3, ["x"]])
def test_a_column_that_is_no_text(tmp_path: Path, value: object) -> None:
    file = write_rows(tmp_path / "a.jsonl", {"text": "x"}, {"text": value})
    with pytest.raises(DataError, match=r"a\.jsonl:2: column `text` holds \w+ instead of text"):
        texts(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": \n', ":3: is not JSON: Expecting value, in column 1"),
        ('{"text": "a"} {"text": "b"}\n', ":1: is not JSON: Extra data, in column 15"),
        ('["text"]\n', ", row 0: is a JSON str, a row must be an object"),
        ("[1, 2", ", row 0: is a JSON int"),
        ('[{"text": "a"}, {"text": ', ", row 1: is not JSON: the file ends in it. What follows it cannot be read"),
        ("7\n", ":1: is a JSON int, a row must be an object"),
        ("[" * 500, ", row 0: is not JSON"),
        ('{"a": ' * 100_000, ":1: is not JSON: Expecting a name and a value"),
        ('{"text": "\\ud800"}\n', ":1: column `text` holds half of a surrogate pair"),
    ],
)
def test_broken_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "sad.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"sad\.jsonl" + message):
        texts(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "c.txt").write_text("fine")
    with pytest.raises(DataError, match=r"b\.txt: is not UTF-8 text: byte 0 of the file, 0xe9"):
        texts(tmp_path)


# Functions.


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"module_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "value = 3\n"
        "def rows():\n    yield {'text': 'a', 'n': 1}\n    yield {'text': 'b', 'key': 5}\n"
        "def bad():\n    yield 'text'\n"
        "def half():\n    yield {'text': '\\ud800'}\n"
        "def none():\n    return iter(())\n"
        "def nothing():\n    pass\n"
        "def leaves():\n    yield {'text': 'a'}\n    raise SystemExit(0)\n"
        "def breaks():\n    yield {'text': 'a'}\n    yield {'text': 1 / 0}\n"
        "class Own(BaseException):\n    pass\n"
        "def ends():\n    raise Own('mine')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_yields_rows(module: str) -> None:
    rows = read(f"{module}:rows")
    assert [row["text"] for row in rows] == ["a", "b"]
    assert rows[1]["key"] == "5"
    assert set(rows[0]) == {"key", "where", "text"}
    assert rows[1]["where"] == f"{module}:rows: row 1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("row", "has no row; the nearest is rows"),
        ("value", "value: is no function"),
        ("bad", "row 0 is str instead of a dict"),
        ("half", "surrogate"),
        ("none", "holds no documents"),
        ("nothing", r":nothing: gives no row 0: TypeError: 'NoneType' object is not iterable"),
        ("leaves", r":leaves: gives no row 1: SystemExit: 0 \(.*\.py, line 15\)"),
        ("breaks", r":breaks: gives no row 1: ZeroDivisionError: division by zero \(.*\.py, line 18\)"),
        ("ends", r":ends: gives no row 0: Own: mine \(.*\.py, line 22\)"),
    ],
)
def test_a_function_that_is_wrong(module: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(f"{module}:{name}")


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no_such_module cannot be imported"):
        texts("no_such_module:rows")


@pytest.mark.parametrize("content", ["raise SystemExit(3)", "1 / 0", "def"])
def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    name = f"broken_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=rf"{name}:rows: {name} cannot be imported: (Syst|Zero|Syntax)"):
        texts(f"{name}:rows")


# Fingerprints.


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    """And neither names, folders, links nor times."""
    folder, stores = tmp_path / "data", tmp_path / "stores"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")

    def of(source: Path, **fields: Any) -> str:
        plain = fingerprint(SourceConfig(source=str(source), **fields))
        assert fingerprint(SourceConfig(source=str(source), **fields), stores) == plain
        return plain

    first = of(folder)
    os.utime(folder / "a.txt", ns=(0, 10**18))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "a.txt").rename(tmp_path / "copy" / "aa.txt")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "copy" / "again.txt").symlink_to("aa.txt")
    assert first == of(folder) == of(tmp_path / "copy") == of(tmp_path / "link") == of(folder / "*.txt")

    seen = [first]
    (tmp_path / "copy" / "aa.txt").rename(tmp_path / "copy" / "c.txt")  # another order
    seen.append(of(tmp_path / "copy"))
    (folder / "b.txt").write_text("owt")
    os.utime(folder / "b.txt", ns=(0, 10**18))
    seen.append(of(folder))
    stat = (folder / "b.txt").stat()
    (folder / "b.txt").write_text("tow")  # of the same size, and with the old time put back
    os.utime(folder / "b.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.append(of(folder))
    (folder / "b.txt").rename(folder / "b.csv")  # read in another way
    seen.append(of(folder))
    (folder / "c.txt").write_text("")
    seen += [of(folder), of(folder, split="train[:1]"), of(folder, on_error="skip"), of(folder, max_characters=9)]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("place", [0, BUFFER - 1, BUFFER, 2 * BUFFER + 6])
def test_a_byte_anywhere_changes_the_fingerprint(tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with size and modification time as they were, of a file whose hash is remembered."""
    monkeypatch.setattr(fingerprints, "YOUNG", {False: -1.0, True: -1.0})
    file, stores = tmp_path / "a.txt", tmp_path / "stores"
    file.write_bytes(content := b"a" * (2 * BUFFER + 7))
    source, stat = SourceConfig(source=str(file)), file.stat()
    first = fingerprint(source, stores)
    file.write_bytes(content[:place] + b"b" + content[place + 1 :])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(source, stores) != first


def test_a_source_of_any_kind_is_known_once_it_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run asks, whatever the sources are."""
    monkeypatch.setattr(fingerprints, "YOUNG", {False: 0.0, True: 0.0})  # files are remembered at once
    rows = write_rows(tmp_path / "rows.jsonl", {"text": "a"})
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "a")
    (tmp_path / "given_rows.py").write_text("def rows():\n    yield {'text': 'a'}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = ["stdlib", "stdlib-functions", str(rows), f"zip://a.txt::{packed}", "given_rows:rows"]
    for source in (SourceConfig(source=text) for text in sources):
        stores = tmp_path / "stores"
        before = is_known(source, stores)
        fingerprint(source, stores)
        assert is_known(source, stores)
        assert before == (source.source not in ("stdlib", str(rows)))  # no file of theirs was read yet


def test_a_file_is_read_once_for_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    hashed = fingerprints._hashed
    monkeypatch.setattr(fingerprints, "_hashed", lambda file, known: read.append(file) or hashed(file, known))
    monkeypatch.setattr(fingerprints, "YOUNG", {False: -1.0, True: -1.0})
    file, stores = tmp_path / "a.txt", tmp_path / "stores"
    file.write_text("one")
    source = SourceConfig(source=str(file))
    assert not is_known(source, stores)
    first = fingerprint(source, stores)
    assert is_known(source, stores) and fingerprint(source, stores) == first and len(read) == 1
    os.utime(file, ns=(0, 10**18))
    assert not is_known(source, stores) and fingerprint(source, stores) == first and len(read) == 2
    (stores / "contents.json").write_text("{")  # a cut file costs nothing but another look
    assert fingerprint(source, stores) == first and len(read) == 3 and is_known(source, stores)
    monkeypatch.setattr(fingerprints, "YOUNG", {False: 1e6, True: 1e6})
    file.write_text("two")
    assert fingerprint(source, stores) != first and not is_known(source, stores)  # it may change at the same moment


def test_fingerprint_follows_the_function(module: str, tmp_path: Path) -> None:
    first = fingerprint(SourceConfig(source=f"{module}:rows"))
    assert (
        fingerprint(SourceConfig(source=f"{module}:rows"))
        == first
        != fingerprint(SourceConfig(source=f"{module}:none"))
    )
    file = tmp_path / f"{module}.py"
    file.write_text(file.read_text() + "# changed\n")
    assert fingerprint(SourceConfig(source=f"{module}:rows")) != first


def test_fingerprints_of_the_library_differ() -> None:
    modules, functions = SourceConfig(source="stdlib"), SourceConfig(source="stdlib-functions")
    assert fingerprint(modules) == fingerprint(modules) != fingerprint(functions)


# The standard library.


def test_stdlib_modules() -> None:
    modules = {row["key"]: row["text"] for row in stdlib.modules()}
    assert len(modules) == len(stdlib.modules()) > 400
    assert list(modules) == sorted(modules)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py", "unittest/case.py"} <= set(modules)
    parts = {part for key in modules for part in key.split("/")}
    assert not parts & {
        "site-packages",
        "test",
        "tests",
        "idle_test",
        "turtledemo",
        "__pycache__",
        "pydoc_data",
    }
    assert modules["json/decoder.py"] == (stdlib.root() / "json" / "decoder.py").read_text()


def test_stdlib_functions_are_their_prompt_and_completion() -> None:
    rows = stdlib.functions()
    assert len(rows) > 3000
    modules = {row["key"]: row["text"] for row in stdlib.modules()}
    for row in rows[::11]:
        [node] = ast.parse(row["prompt"] + row["completion"]).body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        [prompt] = ast.parse(row["prompt"]).body
        assert ast.get_docstring(prompt) and len(prompt.body) == 1
        assert f"def {node.name}" in modules[row["key"]]
        assert row["completion"].strip()


def test_a_known_function() -> None:
    [row] = [r for r in stdlib.functions() if r["key"] == "bisect.py" and "def insort_right" in r["prompt"]]
    assert row["prompt"].startswith('def insort_right(a, x, lo=0, hi=None, *, key=None):\n    """Insert item x')
    assert row["prompt"].endswith('"""\n')
    assert row["completion"].startswith("    if key is None:\n        lo = bisect_right(a, x, lo, hi)\n")
    [method] = [r for r in stdlib.functions() if r["key"] == "fractions.py" and "def limit_denominator" in r["prompt"]]
    assert method["prompt"].startswith('def limit_denominator(self, max_denominator=1000000):\n    """')


# Splits.


def test_held_out_is_uniform_and_nested() -> None:
    keys = [f"key {i}" for i in range(20_000)]
    small, large = ({key for key in keys if is_held_out(key, fraction)} for fraction in (0.05, 0.2))
    assert abs(len(small) - 1000) < 130  # about four standard deviations
    assert abs(len(large) - 4000) < 230
    assert small < large
    assert not any(is_held_out(key, 0.0) for key in keys)


def test_held_out_is_the_same_for_ever() -> None:
    """A change here would move documents that were trained on into an evaluation."""
    assert [i for i in range(40) if is_held_out(f"key {i}", 0.2)] == [8, 9, 14, 22, 23, 32, 39]


def test_a_held_out_file_is_held_out_with_its_functions() -> None:
    sides = defaultdict(set)
    for source, columns in (("stdlib", ("text",)), ("stdlib-functions", ("prompt", "completion"))):
        for row in documents(SourceConfig(source=source), (columns,)):
            sides[row["key"]].add((source, is_held_out(row["key"], 0.1)))
    both = {key: {side for _, side in seen} for key, seen in sides.items() if len({s for s, _ in seen}) == 2}
    assert len(both) > 200
    assert all(len(side) == 1 for side in both.values())
    assert 0 < sum(True in side for side in both.values()) < len(both) / 4


def test_renaming_a_file_moves_it_and_its_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = (stdlib.root() / "fractions.py").read_text()
    held_out, trained = (
        next(name for i in range(99) if is_held_out(name := f"m{i}.py", 0.3) is side) for side in (True, False)
    )
    monkeypatch.setattr(stdlib, "root", lambda: tmp_path)
    try:
        for old, new, side in ((trained, held_out, True), (held_out, trained, False)):
            (tmp_path / old).unlink(missing_ok=True)
            (tmp_path / new).write_text(original)
            stdlib.modules.cache_clear()
            stdlib.functions.cache_clear()
            keys = [row["key"] for row in read("stdlib")]
            keys += [row["key"] for row in read("stdlib-functions", "prompt", "completion")]
            assert len(keys) > 5
            assert {is_held_out(key, 0.3) for key in keys} == {side}
    finally:
        stdlib.modules.cache_clear()
        stdlib.functions.cache_clear()
