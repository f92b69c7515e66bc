"""Every format that documents come in, plain and compressed, near and far, whole and broken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from backports import zstd

from bigtrain.config.schema import SourceConfig
from bigtrain.data.fingerprints import fingerprint
from bigtrain.data.sources import documents, size_of
from bigtrain.data.tally import Tally
from bigtrain.errors import DataError

ROWS = [{"text": "first"}, {"text": "zwei ✓\r\nlines"}, {"text": "007"}]
TEXTS = [row["text"] for row in ROWS]
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}


def texts(source: object, tally: Tally | None = None, **fields: Any) -> list[str]:
    return [row["text"] for row in documents(SourceConfig(source=str(source), **fields), (("text",),), tally)]


def wrong(source: object, **fields: Any) -> str:
    with pytest.raises(DataError) as error:
        texts(source, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(file: Path) -> None:
    """ROWS in the format of the file's name."""
    kind = file.name.partition(".")[2]
    table = datasets.Dataset.from_list(ROWS)
    if kind == "parquet":
        table.to_parquet(file)
    elif kind == "arrow":
        table.save_to_disk(file.parent / "saved")
        (file.parent / "saved" / "data-00000-of-00001.arrow").rename(file)
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        file.write_bytes(f'text{comma}n\r\nfirst{comma}1\r\n"zwei ✓\r\nlines"{comma}2\r\n\r\n007{comma}3\r\n'.encode())
    elif kind == "json":
        file.write_text(json.dumps(ROWS))
    elif kind == "pretty.json":
        file.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    else:
        assert kind in ("jsonl", "ndjson", "lines.json")
        file.write_bytes(json_lines(ROWS))


FORMATS = ["jsonl", "ndjson", "json", "lines.json", "pretty.json", "csv", "tsv", "parquet", "arrow"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format(tmp_path: Path, kind: str) -> None:
    write(tmp_path / f"a.{kind}")
    assert texts(tmp_path / f"a.{kind}") == texts(tmp_path / f"*.{kind}") == TEXTS


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_compressed(tmp_path: Path, kind: str, suffix: str) -> None:
    if kind == "txt":
        (tmp_path / "a.txt").write_bytes(b"one\r\ndocument")
    else:
        write(tmp_path / f"a.{kind}")
    packed = PACKED[suffix]((tmp_path / f"a.{kind}").read_bytes())
    file = tmp_path / f"a.{kind}{suffix}"
    file.write_bytes(packed)
    assert texts(file) == (["one\r\ndocument"] if kind == "txt" else TEXTS)
    assert size_of(SourceConfig(source=str(file))) is None
    file.write_bytes(packed[:-5])
    assert f"{file}: cannot be read: Compressed file ended" in wrong(file)


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_in_several_parts(tmp_path: Path, suffix: str) -> None:
    """As parallel compressors and `cat` write it."""
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(PACKED[suffix](json_lines([row])) for row in ROWS))
    assert texts(tmp_path / f"a.jsonl{suffix}") == TEXTS


def test_a_file_that_is_not_compressed(tmp_path: Path) -> None:
    for suffix in PACKED:
        (tmp_path / f"a.txt{suffix}").write_text("plain text")
        assert f"a.txt{suffix}: cannot be read: " in wrong(tmp_path / f"a.txt{suffix}")


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    contents = {"a.txt": "é", "b.csv": "text\né\n", "c.jsonl": '{"text": "é"}\n', "d.json": '[{"text": "é"}]'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert texts(tmp_path / name) == ["é"], name


def test_a_column_may_begin_later_and_change_its_type(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n{"n": {"x": []}, "more": 2, "text": "b"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a", "b"]


# Slices.


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_rows_of_a_split(tmp_path: Path, kind: str) -> None:
    for name in "abc":
        if kind == "txt":
            (tmp_path / f"{name}.txt").write_text(name)
        else:
            write(tmp_path / f"{name}.{kind}")
    source, rows = tmp_path / f"*.{kind}", list("abc") if kind == "txt" else TEXTS * 3
    assert texts(source, split="train") == texts(source, split="train[:]") == rows
    assert texts(source, split="train[:2]") == rows[:2]
    assert texts(source, split="train[1:3]") == rows[1:3]
    assert texts(source, split="train[2:]") == rows[2:]
    assert "holds no documents in train[99:]" in wrong(source, split="train[99:]")
    assert "is one split, `train`; there is no test" in wrong(source, split="test")


def test_broken_rows_count_in_a_slice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "0"}\n{\n{"text": "2"}\n{"text": "3"}\n')
    assert texts(tmp_path / "a.jsonl", split="train[2:3]") == ["2"]
    assert texts(tmp_path / "a.jsonl", split="train[:3]", on_error="skip") == ["0", "2"]


# Saved by datasets.


def test_a_saved_dataset(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([*ROWS, {"text": "more"}])
    table.select([2, 0]).with_format("numpy").save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == texts(tmp_path / "one", split="train") == [TEXTS[2], TEXTS[0]]
    table.save_to_disk(tmp_path / "shards", num_shards=3)
    assert texts(tmp_path / "shards", split="train[1:]") == [*TEXTS[1:], "more"]
    assert "is one split, train; there is no test" in wrong(tmp_path / "one", split="test")
    first = fingerprint(SourceConfig(source=str(tmp_path / "one")))
    table.select([0, 1]).save_to_disk(tmp_path / "one")
    assert fingerprint(SourceConfig(source=str(tmp_path / "one"))) != first
    file = next((tmp_path / "one").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    assert f"{tmp_path / 'one'}: cannot be read" in wrong(tmp_path / "one")


def test_saved_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path)
    assert texts(tmp_path, split="train[:2]") == TEXTS[:2]
    assert texts(tmp_path, split="test") == TEXTS[1:2]
    assert "its splits are train, test; say which with `split`" in wrong(tmp_path)
    assert "its splits are train, test; there is no valid" in wrong(tmp_path, split="valid")


# URLs.


def test_urls(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    for kind in ("jsonl", "parquet", "csv"):
        write(tmp_path / f"a.{kind}")
        memory.pipe(f"{root}/{kind}/b.{kind}", (tmp_path / f"a.{kind}").read_bytes())
        memory.pipe(f"{root}/{kind}/.hidden.{kind}", b"no")
        assert texts(f"memory:/{root}/{kind}/b.{kind}") == TEXTS
        assert texts(f"memory:/{root}/{kind}") == texts(f"memory:/{root}/*/b.{kind}") == TEXTS
        assert texts(f"file://{tmp_path}/a.{kind}") == TEXTS
    memory.pipe(f"{root}/c.txt.gz", gzip.compress("dé".encode()))
    assert texts(f"memory:/{root}/c.txt.gz") == ["dé"]
    for name in ("absent.txt", "*.absent"):
        assert "there is no such file" in (text := wrong(f"memory:/{root}/{name}")) or "no file matches" in text
    source = SourceConfig(source=f"memory:/{root}/c.txt.gz")
    first = fingerprint(source)
    assert fingerprint(source) == first
    memory.pipe(f"{root}/c.txt.gz", gzip.compress(b"longer than that"))
    assert fingerprint(source) != first
    memory.pipe(f"{root}/bad.jsonl", b'{"text": "a"}\n{\n')
    assert f"{root}/bad.jsonl:2: is not JSON" in wrong(f"memory:/{root}/bad.jsonl")


def test_files_in_a_zip_archive(tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet"):
        write(tmp_path / f"a.{kind}")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.jsonl", "in/a.jsonl")
        archive.write(tmp_path / "a.parquet", "in/b.parquet")
    assert texts(f"zip://in/*.jsonl::{tmp_path}/a.zip") == TEXTS
    assert texts(f"zip://in/b.parquet::{tmp_path}/a.zip") == TEXTS
    assert texts(f"zip://::{tmp_path}/a.zip") == TEXTS * 2
    assert "absent.zip" in wrong(f"zip://*::{tmp_path}/absent.zip")


# What is wrong with rows: an error, or counted.


@pytest.mark.parametrize(
    ("name", "content", "message", "reason"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', ":2: is not UTF-8 text: byte 24 of the",
         "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n{"text": "b"}\n', ":2: is not JSON: Expecting ':'", "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n7\n{"text": "b"}\n', ":2: is a JSON int", "not a JSON object"),
        ("a.json", b'[{"text": "a"},\n7,\n{"text": "b"}]', ", row 1: is a JSON int", "not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": ""}\n{"text": "b"}\n', ":2: no column `text`",
         "without a column that the task reads"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n', ":2: column `text` is null",
         "without a column that the task reads"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}', ":2: column `text` holds half",
         "with half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 101 + b'"}\n{"text": "b"}\n', ":2: is 101 characters long",
         "longer than max_characters"),
        ("a.csv", b'text\na\n"\xff"\nb\n', ":3: is not UTF-8 text: byte 8", "not UTF-8"),
        ("a.csv", b'text\na\n"one\n\xfftwo"\nb\n', ":4: is not UTF-8 text: byte 12", "not UTF-8"),
        ("a.csv", b"text\na\nx,y\nb\n", ":3: has 2 fields, and the header has 1",
         "with another number of fields than the header"),
        ("a.csv", b'text\na\n"x"y\nb\n', ":3: is not CSV: ',' expected after '\"'", "not CSV"),
        ("a.csv", b"text\na\n" + b"x" * 101 + b"\nb\n", ":3: is 101 characters long", "longer than max_characters"),
    ],
)  # fmt: skip
def test_a_wrong_row(tmp_path: Path, name: str, content: bytes, message: str, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    text = wrong(tmp_path / name, max_characters=100)
    assert f"{tmp_path / name}{message}" in text
    assert text.endswith("`on_error: skip` leaves such rows out.")
    tally = Tally()
    assert texts(tmp_path / name, tally, max_characters=100, on_error="skip") == ["a", "b"]
    assert tally.dropped == {reason: 1}


def test_wrong_text_files(tmp_path: Path) -> None:
    for name, content in {"a": b"a", "b": b"ok\xe9", "c": b"x" * 101, "d": b"y" * 401, "e": b"", "f": b"b"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert "b.txt: is not UTF-8 text: byte 2 of the file, 0xe9" in wrong(tmp_path)
    for name in "cd":
        assert "max_characters (100)" in wrong(tmp_path / f"{name}.txt", max_characters=100)
    tally = Tally()
    assert texts(tmp_path, tally, max_characters=100, on_error="skip") == ["a", "", "b"]
    assert tally.dropped == {"not UTF-8": 1, "longer than max_characters": 2}


def test_a_source_of_which_nothing_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n{"txt": "b"}\n')
    message = wrong(tmp_path / "a.jsonl", on_error="skip")
    assert "no row can be used. The first: " in message
    assert "a.jsonl:1: no column `text`; there are `txt`" in message


def test_a_file_that_cannot_be_read_is_never_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    assert "b.parquet: cannot be read as parquet: " in wrong(tmp_path, on_error="skip")
    (tmp_path / "c.json").write_text('[{"text": "a"}, {')
    assert "c.json, row 1: is not JSON" in wrong(tmp_path / "c.json", on_error="skip")
    (tmp_path / "d.csv").write_text("text,n,text\n")
    assert "d.csv:1: the header names `text` twice" in wrong(tmp_path / "d.csv", on_error="skip")


def test_a_misspelt_column_is_never_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    assert "maps `texts`" in wrong(tmp_path / "a.jsonl", columns={"texts": "text"}, on_error="skip")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A line of 120 MB among others, a list of 15 MB, 20 MB of lines."""
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(120):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "b"}\n')
    line = json.dumps({"text": "x" * 1000})
    (tmp_path / "b.json").write_text(f"[{', '.join([line] * 15_000)}]")
    with (tmp_path / "c.jsonl").open("w") as file:
        file.writelines(f"{line}\n" for _ in range(20_000))
    expected = {"a.jsonl": 2, "b.json": 15_000, "c.jsonl": 20_000}
    assert (
        sum(1 for _ in documents(SourceConfig(source=str(tmp_path / "c.jsonl"), split="train[:1]"), (("text",),))) == 1
    )
    for name, count in expected.items():
        source = SourceConfig(source=str(tmp_path / name), on_error="skip", max_characters=100_000)
        tracemalloc.start()
        try:
            assert sum(1 for _ in documents(source, (("text",),))) == count
            assert tracemalloc.get_traced_memory()[1] < (80e6 if name == "a.jsonl" else 12e6), name
        finally:
            tracemalloc.stop()


# Fingerprints.


def test_a_fingerprint_follows_what_is_chosen(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    choices: list[dict[str, Any]] = [{}, {"split": "train[:2]"}, {"on_error": "skip"}, {"max_characters": 5}]
    sources = [SourceConfig(source=str(tmp_path / "a.jsonl"), **fields) for fields in choices]
    assert len({fingerprint(source) for source in sources}) == len(sources)
    assert fingerprint(sources[0].model_copy(update={"weight": 2.0})) == fingerprint(sources[0])


def test_sizes(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    source = SourceConfig(source=str(tmp_path))
    assert size_of(source) == len(json_lines(ROWS))
    assert size_of(source.model_copy(update={"split": "train[:1]"})) is None
    write(tmp_path / "b.parquet")
    assert size_of(source) is None


# The Hub, out of reach, and what datasets has kept of it.

HUB = """
import sys
from pathlib import Path
import datasets
from datasets.packaged_modules.parquet.parquet import Parquet
from bigtrain.config.schema import SourceConfig
from bigtrain.data.fingerprints import fingerprint
from bigtrain.data.sources import documents
from bigtrain.errors import DataError

datasets.disable_progress_bars()
for config, commit in (("default", "a" * 40), ("other", "b" * 40)):
    files = {"train": [sys.argv[1]], "test": [sys.argv[1]]}
    builder = Parquet(dataset_name="name", config_name=config, data_files=files, hash=commit)
    builder.download_and_prepare(f"{datasets.config.HF_DATASETS_CACHE}/owner___name/{config}/0.0.0/{commit}")
prints = []
for fields in (
    {"config": "default", "split": "train"},
    {"config": "default", "split": "test[1:]"},
    {"config": "other", "split": "train[:1]", "revision": "b" * 40},
    {"config": "default", "split": "train", "revision": "v1"},
    {"config": "default", "split": "valid"},
    {"split": "train"},
    {"config": "third", "split": "train"},
    {"source": "owner/nothing", "split": "train"},
):
    source = SourceConfig(**{"source": "owner/name"} | fields)
    try:
        print(ascii([row["text"] for row in documents(source, (("text",),))]))
        prints.append(fingerprint(source))
    except DataError as error:
        assert chr(10) not in str(error)
        print(error)
print(len(set(prints)))
"""


def test_hub_datasets_offline(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-c", HUB, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [ascii(TEXTS), ascii(TEXTS[1:]), ascii(TEXTS[:1])]
    nowhere = f"as a path it does not exist (looked in {tmp_path}), and as a dataset of the Hub it cannot be opened: "
    for line, message in zip(
        lines[3:],
        [
            f"the local cache holds commit {'a' * 40}, which may not be revision v1",
            "owner/name: split valid cannot be opened: Bad split: valid. Available splits: ['train', 'test']",
            "the local cache holds the configurations default, other; choose one with `config`",
            nowhere + "Couldn't find cache for owner/name for config 'third'",
            "owner/nothing: " + nowhere,
            "3",
        ],
        strict=True,
    ):
        assert message in line
