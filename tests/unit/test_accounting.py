"""Every row that is read is trained on, held out, or counted under a named reason."""

from __future__ import annotations

import io
import json
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigtrain.config.schema import (
    CleanConfig,
    EvaluateConfig,
    SourceConfig,
    StageConfig,
)
from bigtrain.data import sources, stdlib
from bigtrain.data.prepare import StageData, counts, prepare_stage
from bigtrain.data.tokenizer import load_tokenizer, train_tokenizer
from bigtrain.data.types import Layout
from bigtrain.data.writing import gather, token_dtype
from bigtrain.errors import DataError
from bigtrain.observability.events import Prepared
from bigtrain.observability.progress import Progress, dropped
from bigtrain.optim.adamw import AdamW

ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["def f(): return 'a b c'\n" * 20]), 300, 10_000, folder)
    found = load_tokenizer(folder)
    found.chat_template = ALTERNATING
    return found


def prepared(
    folder: Path, tokenizer: Any, task: str, *sources: SourceConfig, encoder: Any = lambda task: task, **stage: Any
) -> StageData:
    """The stores of a run with one stage."""
    settings = {"sequence_length": 16} | stage
    chosen = {"name": "sft", "max_cut_answers": 1.0} if task == "sft" else task
    only = StageConfig(
        name="s",
        task=chosen,
        data=list(sources),
        global_batch_size=1,
        steps=1,
        optimizer=AdamW(lr=1e-3),
        **settings,
    )
    return prepare_stage(only, encoder(only.task), tokenizer, stores=folder / "out" / "stores", seed=0)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_row_that_the_template_refuses_is_named_or_skipped(tmp_path: Path, tokenizer: Any) -> None:
    good = {"messages": [turn("user", "a"), turn("assistant", "b")]}
    refused = {"messages": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]}
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([json.dumps(good), "", json.dumps(refused), json.dumps(good)]))
    with pytest.raises(DataError, match=r"^\S*chats\.jsonl:3: .*roles must alternate.*`on_error: skip`") as error:
        prepared(tmp_path, tokenizer, "sft", SourceConfig(source=str(file)))
    assert "key" not in str(error.value)
    data = prepared(tmp_path, tokenizer, "sft", SourceConfig(source=str(file), on_error="skip"))
    assert data.train[0].manifest["documents"] == 2
    assert data.train[0].manifest["dropped"] == {"refused by the chat template": 1}
    assert dropped(counts(data.train[0])) == f"1 refused by the chat template (first: {file}:3)"


# Every kind of source.

TEXTS = ["one def f(): return", "", "two " * 30, "three", "four four", "five"]


def jsonl(folder: Path) -> SourceConfig:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join([*rows[:3], "{", '{"text": 7}', "", '{"txt": 1}', *rows[3:], '"x"']))
    return SourceConfig(source=str(folder / "a.jsonl"))


def json_list(folder: Path) -> SourceConfig:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "a.json").write_text(f'{{"d": [{", ".join([*rows, "7", json.dumps({"text": "x" * 500})])}]}}')
    return SourceConfig(source=str(folder / "a.json"), field="d")


def csv(folder: Path) -> SourceConfig:
    (folder / "a.csv").write_text("\n".join(["n,text", *(f"1,{text}" for text in TEXTS), '1,"open', "1,2,3", "1,end"]))
    return SourceConfig(source=str(folder / "a.csv"))


def texts(folder: Path) -> SourceConfig:
    (folder / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "texts" / "broken.txt").write_bytes(b"\xff")
    return SourceConfig(source=str(folder / "texts"))


def a_table(kind: str, folder: Path) -> SourceConfig:
    table = pa.table({"text": [*TEXTS, None]})
    if kind == "parquet":
        parquet.write_table(table, folder / "a.parquet", row_group_size=2)
        return SourceConfig(source=str(folder / "a.parquet"))
    datasets.Dataset(table).save_to_disk(folder / "saved")
    return SourceConfig(source=str(folder / "saved"))


def url(folder: Path) -> SourceConfig:
    fsspec.filesystem("memory").pipe(
        f"/{folder.name}/a.jsonl", "\n".join([*(json.dumps({"text": text}) for text in TEXTS), "{"]).encode()
    )
    return SourceConfig(source=f"memory://{folder.name}/a.jsonl")


def function(folder: Path) -> SourceConfig:
    module = types.ModuleType(f"rows_of_{folder.name}")
    module.rows = lambda: iter([*({"text": text} for text in TEXTS), "no dict", {"text": None}])  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return SourceConfig(source=f"{module.__name__}:rows")


SOURCES: dict[str, tuple[Callable[[Path], SourceConfig], int, int]] = {  # rows; of them those that cannot be read
    "jsonl": (jsonl, 10, 4),
    "json": (json_list, 8, 2),
    "csv": (csv, 9, 2),
    "texts": (texts, 7, 1),
    "parquet": (partial(a_table, "parquet"), 7, 1),
    "saved": (partial(a_table, "saved"), 7, 1),
    "url": (url, 7, 1),
    "function": (function, 8, 2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_row_of_a_source_is_counted(tmp_path: Path, tokenizer: Any, name: str) -> None:
    make, rows, unreadable = SOURCES[name]
    source = make(tmp_path).model_copy(update={"on_error": "skip", "max_characters": 400})
    clean = CleanConfig(exact_duplicates=True, min_characters=6)
    data = prepared(tmp_path, tokenizer, "pretrain", source, sequence_length=2)
    [plain] = [store.manifest for store in data.train]
    assert plain["rows"] == rows
    assert sum(plain["dropped"].values()) == unreadable + 1  # and the empty one
    assert plain["used"] == plain["documents"] == rows - unreadable - 1
    assert set(plain["examples"]) == set(plain["dropped"])
    told = dropped(counts(data.train[0]))
    assert all(f"{n} {reason} (first: {plain['examples'][reason]})" in told for reason, n in plain["dropped"].items())

    split = prepared(
        tmp_path, tokenizer, "pretrain", source, sequence_length=2, held_out=0.6, evaluate=EvaluateConfig(), clean=clean
    )
    for store in (*split.train, *split.held_out):
        metadata = store.manifest
        assert metadata["rows"] == rows == metadata["used"] + metadata["other_side"] + sum(metadata["dropped"].values())
    [train], [held_out] = split.train, split.held_out
    short = train.manifest["dropped"].get("too short (clean)", 0)
    assert train.manifest["used"] + short == held_out.manifest["other_side"]
    assert train.manifest["other_side"] == held_out.manifest["used"] + held_out.manifest["dropped"].get("empty", 0)


def test_every_row_of_the_standard_library_is_counted(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(stdlib, "modules", lambda: stdlib_rows)
    stdlib_rows = tuple({"key": f"{i}.py", "text": text} for i, text in enumerate(TEXTS))
    monkeypatch.setitem(sources.STDLIB, "stdlib", stdlib.modules)
    metadata = prepared(tmp_path, tokenizer, "pretrain", SourceConfig(source="stdlib")).train[0].manifest
    assert (metadata["rows"], metadata["used"], metadata["dropped"]) == (6, 5, {"empty": 1})
    assert metadata["examples"] == {"empty": "stdlib: 1.py"}


def test_every_conversation_and_token_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    said = [turn("user", "a"), turn("assistant", "b " * 40)]
    rows: list[dict[str, Any]] = [
        {"messages": said},
        {"messages": [turn("user", "q")]},
        {"messages": [turn("user", "q " * 60), *said[1:]]},
        {"messages": [*said, *said]},
        {"messages": [turn("assistant", "first")]},
        {"messages": "x"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "b"},
        {"text": "x"},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepared(tmp_path, tokenizer, "sft", SourceConfig(source=str(file), on_error="skip"), sequence_length=24)
    metadata = data.train[0].manifest
    assert metadata["rows"] == len(rows) == metadata["used"] + sum(metadata["dropped"].values())
    assert metadata["used"] == 3 and metadata["cut"] == 2 and metadata["cut_tokens"] > 0
    assert metadata["dropped"] == {
        "without usable turns": 1,
        "without a column that the task reads": 1,
        "empty": 2,
        "without a trained target within sequence_length": 1,
        "refused by the chat template": 1,
    }
    assert metadata["examples"] == {
        "without usable turns": f"{file}:6",
        "without a column that the task reads": f"{file}:9",
        "empty": f"{file}:2",
        "without a trained target within sequence_length": f"{file}:3",
        "refused by the chat template": f"{file}:5",
        "cut to sequence_length": f"{file}:1",
    }
    assert f"2 cut to sequence_length (first: {file}:1), {metadata['cut_tokens']} tokens" in dropped(
        counts(data.train[0])
    )


def test_parts_of_a_row_that_are_dropped_are_counted() -> None:
    read = ([1, 2, 3], [False, False, False])
    learned = ([1, 2, 3], [False, True, True])
    encoded = gather([("a:1", [read, learned]), ("a:2", [read])], Layout("packed", 8, 0), token_dtype(9))
    reason = "without a trained target within sequence_length"
    assert encoded.tally.metadata() == {
        "rows": 0,
        "other_side": 0,
        "hidden": 0,
        "used": 1,
        "dropped": {reason: 1},
        "parts": {reason: 1},
        "unread": {},
        "examples": {reason: "a:1"},
    }
    assert encoded.tally.counted == 2


def test_files_that_are_passed_over_for_their_names_are_told(tmp_path: Path, tokenizer: Any) -> None:
    table = tmp_path / "table"
    for name in ("_SUCCESS", ".part-0.txt.crc", "_temporary/a.txt", "part-0.txt"):
        (table / name).parent.mkdir(parents=True, exist_ok=True)
        (table / name).write_text("def f(): return 'a b c'\n" * 9)
    [store] = prepared(tmp_path, tokenizer, "pretrain", SourceConfig(source=str(table))).train
    assert (store.manifest["hidden"], store.manifest["rows"]) == (3, 1)
    shown = io.StringIO()
    Progress(shown)(Prepared(stage="s", folder="f", counts=counts(store)))
    assert "; 3 files or folders whose names begin with _ or . not read" in " ".join(shown.getvalue().split())


def test_tokens_behind_the_last_sequence_are_told(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a b c d e f g h")
    [store] = prepared(tmp_path, tokenizer, "pretrain", SourceConfig(source=str(file)), sequence_length=5).train
    assert store.left_over == store.manifest["tokens"] - 1 - 5 * store.samples > 0
    assert f"{store.left_over} tokens behind the last whole sequence" in dropped(counts(store))


# What data is the same.


def test_the_same_data_elsewhere_gives_the_same_store(tmp_path: Path, tokenizer: Any) -> None:
    """Moved, renamed and touched; and the place is told where it is now."""
    before, after = tmp_path / "a.jsonl", tmp_path / "moved" / "b.jsonl"
    before.write_text("".join(json.dumps({"text": f"def f(): return {i}"}) + "\n" for i in range(9)))
    old = prepared(tmp_path, tokenizer, "pretrain", SourceConfig(source=str(before))).train[0]
    after.parent.mkdir()
    before.rename(after)
    os.utime(after)
    new = prepared(tmp_path, tokenizer, "pretrain", SourceConfig(source=str(after))).train[0]
    assert new.folder == old.folder and new.manifest["fingerprint"] == old.manifest["fingerprint"]
    assert (old.manifest["source"], new.manifest["source"]) == (str(before), str(after))
    after.write_text(after.read_text().replace("return 8", "return 9"))
    other = prepared(tmp_path, tokenizer, "pretrain", SourceConfig(source=str(after))).train[0]
    assert other.folder != old.folder and other.content != old.content


def test_data_that_changes_while_it_is_read_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """And what was made of it is not used once the data is back."""
    file = tmp_path / "a.jsonl"
    whole = "".join(json.dumps({"text": f"def f(): return {i}"}) + "\n" for i in range(9))
    changed = whole.replace("return 0", "return 1")
    file.write_text(whole)
    source = SourceConfig(source=str(file))

    class Meanwhile:
        """Tokenizes while somebody else writes a row that has been read already."""

        def __init__(self, task: Any):
            self._task = task
            self.layout, self.encoding, self.columns = task.layout, task.encoding, task.columns
            self.long_documents = task.long_documents

        def encode(self, rows: list[Any], tokenizer: Any, layout: Any = None) -> Any:
            file.write_text(changed)
            texts = [json.loads(line) | {"where": ""} for line in changed.splitlines()]
            return self._task.encode(texts, tokenizer)

    with pytest.raises(DataError, match=r"a\.jsonl: has changed while it was being read"):
        prepared(tmp_path, tokenizer, "pretrain", source, encoder=Meanwhile)
    file.write_text(whole)
    again, fresh = (prepared(folder, tokenizer, "pretrain", source).train[0] for folder in (tmp_path, tmp_path / "new"))
    assert again.content == fresh.content
