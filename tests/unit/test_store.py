"""Token stores against a slow reference; made once, by whoever comes first."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.model import TrainTokenizerConfig
from bigtrain.config.schema import EvaluateConfig, ModelConfig, RunConfig, SourceConfig, StageConfig, TokenizerConfig
from bigtrain.data import writing
from bigtrain.data.batches import Batches
from bigtrain.data.columns import BLOCK, Column
from bigtrain.data.prepare import StageData, prepare_stage, prepare_tokenizer
from bigtrain.data.store import FORMAT, SEAL, Store, content_of, open_store, verify_store
from bigtrain.data.types import IGNORE, Document, Layout
from bigtrain.data.writing import assemble, gather, write_shard, write_store
from bigtrain.errors import DataError
from bigtrain.optim.adamw import AdamW
from bigtrain.pipeline.build import open_tokenizer

PAD = 9999
METADATA = {"source": "test", "documents_are": "all"}


def make_store(folder: Path, documents: list[Document], layout: str, length: int, vocabulary: int = 10_000) -> Store:
    folder.mkdir()
    chosen = Layout("windows") if layout == "windows" else Layout("packed", length, PAD)
    write_store(folder, iter(documents), chosen, vocabulary_size=vocabulary, seed=3, metadata=METADATA)
    return open_store(folder, length)


def numbered(lengths: list[int], trained: list[list[bool]] | None = None) -> list[Document]:
    """Documents whose tokens are all different, so that each can be recognised anywhere."""
    starts = np.cumsum([0, *lengths]).tolist()
    masks = trained or [None] * len(lengths)
    return [(list(range(s, s + n)), mask) for s, n, mask in zip(starts, lengths, masks, strict=False)]


def owners(documents: list[Document]) -> dict[int, tuple[int, int, bool]]:
    """token -> (document, position in it, trained)."""
    return {
        token: (number, position, trained is None or trained[position])
        for number, (ids, trained) in enumerate(documents)
        for position, token in enumerate(ids)
    }


LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=40)


@given(lengths=LENGTHS, length=st.integers(1, 16), masked=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_windows_against_a_slow_reference(tmp_path_factory, lengths, length, masked, data) -> None:
    trained = None
    if masked:
        trained = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    documents = numbered(lengths, trained)
    folder = tmp_path_factory.mktemp("windows") / "store"
    if sum(lengths) <= length:
        with pytest.raises(DataError, match="fewer than one sequence"):
            make_store(folder, documents, "windows", length)
        return
    store = make_store(folder, documents, "windows", length)
    assert store.samples == (sum(lengths) - 1) // length
    owner = owners(documents)
    stream = np.fromfile(folder / "tokens.bin", dtype=np.uint16).tolist()
    assert sorted(stream) == sorted(owner)
    for i in range(store.samples):
        inputs, targets, positions = store.sample(i)
        assert inputs.dtype == targets.dtype == positions.dtype == np.int64
        assert inputs.tolist() == stream[i * length : (i + 1) * length]
        for j in range(length):
            following = stream[i * length + j + 1]
            is_learned = owner[following][1] > 0 and owner[following][2]
            assert targets[j] == (following if is_learned else IGNORE)
            begins = j == 0 or owner[stream[i * length + j]][1] == 0
            assert positions[j] == (0 if begins else positions[j - 1] + 1)


@given(lengths=LENGTHS, length=st.integers(1, 16), masked=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_packed_against_a_slow_reference(tmp_path_factory, lengths, length, masked, data) -> None:
    trained = None
    if masked:
        trained = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    documents = numbered(lengths, trained)
    wanted: dict[int, list[tuple[int, int, int]]] = {}  # document -> its (input, target, position)
    dropped = {"empty": 0, "without a trained target within sequence_length": 0}
    for number, (ids, mask) in enumerate(documents):
        pairs = [
            (ids[k], ids[k + 1] if mask is None or mask[k + 1] else IGNORE, k) for k in range(min(len(ids) - 1, length))
        ]
        if not pairs:
            dropped["empty"] += 1
        elif all(target == IGNORE for _, target, _ in pairs):
            dropped["without a trained target within sequence_length"] += 1
        else:
            wanted[number] = pairs
    folder = tmp_path_factory.mktemp("packed") / "store"
    if not wanted:
        with pytest.raises(DataError, match="no document is left"):
            make_store(folder, documents, "packed", length)
        return
    store = make_store(folder, documents, "packed", length)
    owner = owners(documents)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for i in range(store.samples):
        rows = list(zip(*(array.tolist() for array in store.sample(i)), strict=True))
        assert len(rows) == length
        used = [row for row in rows if row[0] != PAD]
        assert rows[len(used) :] == [(PAD, IGNORE, k) for k in range(length - len(used))]
        for row in used:
            found.setdefault(owner[row[0]][0], []).append(row)
    assert found == wanted
    manifest = store.manifest
    pairs = sum(map(len, wanted.values()))
    assert manifest["documents"] == len(wanted)
    assert manifest["tokens"] == pairs + len(wanted)
    assert manifest["targets"] == sum(t != IGNORE for rows in wanted.values() for _, t, _ in rows)
    assert manifest["dropped"] == {reason: count for reason, count in dropped.items() if count}
    assert manifest["cut"] == sum(lengths[number] > length + 1 for number in wanted)
    assert manifest["fill"] == pytest.approx(pairs / (store.samples * length))


def test_packing_wastes_little(tmp_path: Path) -> None:
    lengths = (np.random.default_rng(0).lognormal(3.5, 0.8, size=3000).astype(int) + 2).tolist()
    documents = [([1] * n, None) for n in lengths]
    store = make_store(tmp_path / "s", documents, "packed", 256)
    assert store.manifest["fill"] > 0.99


def test_documents_are_shuffled_but_always_alike(tmp_path: Path) -> None:
    documents = numbered([5] * 200)
    orders = []
    for name in ("a", "b"):
        make_store(tmp_path / name, documents, "windows", 8)
        orders.append((tmp_path / name / "tokens.bin").read_bytes())
    assert orders[0] == orders[1]
    firsts = np.frombuffer(orders[0], dtype=np.uint16)[::5]
    assert (np.diff(firsts.astype(int)) == 5).mean() < 0.1


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    documents: list[Document] = [([70_000 + i for i in range(20)], None)]
    store = make_store(tmp_path / "s", documents, "windows", 4, vocabulary=2**16 + 1)
    assert store.sample(1)[0].tolist() == [70_004, 70_005, 70_006, 70_007]
    small = make_store(tmp_path / "t", [(list(range(20)), None)], "windows", 4, vocabulary=2**16)
    assert (small.manifest["dtype"], store.manifest["dtype"]) == ("uint16", "uint32")


@pytest.mark.parametrize("i", [-1, 4])
def test_a_sample_that_is_not_there(tmp_path: Path, i: int) -> None:
    store = make_store(tmp_path / "s", numbered([20]), "windows", 4)
    assert store.samples == 4
    with pytest.raises(IndexError):
        store.sample(i)


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    make_store(folder, numbered([20], [[True, False] * 10]), "packed", 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = (folder / "tokens.bin").read_bytes()

    (folder / "tokens.bin").write_bytes(tokens[:-2])
    with pytest.raises(DataError, match=r"tokens\.bin has 8 bytes instead of 10"):
        open_store(folder, 4)
    (folder / "tokens.bin").unlink()
    with pytest.raises(DataError, match=r"tokens\.bin is missing"):
        open_store(folder, 4)
    (folder / "tokens.bin").write_bytes(tokens)
    renamed = {"loss_mask.bin": "trained.bin", "packed.bin": "bins.bin"}
    older = {"files": {renamed.get(name, name): file for name, file in manifest["files"].items()}}
    assert content_of(manifest | older) == content_of(manifest)  # a run that began with format 3 goes on
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(DataError, match="has format 0, this bigtrain reads 4"):
        open_store(folder, 4)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_store(folder, 4)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        open_store(folder, 4)


@given(
    lengths=LENGTHS,
    length=st.integers(1, 16),
    layout=st.sampled_from(["windows", "packed"]),
    piece=st.integers(1, 200),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_shards_of_any_size_make_the_same_store(tmp_path_factory, lengths, length, layout, piece, data) -> None:
    masks = [data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    documents = [(ids, mask) for (ids, _), mask in zip(numbered(lengths), masks, strict=True)]
    borders = data.draw(st.lists(st.integers(0, len(documents)), max_size=6))
    chosen = Layout("windows") if layout == "windows" else Layout("packed", length, PAD)
    root = tmp_path_factory.mktemp("shards")
    shards = []
    for begin, end in itertools.pairwise([0, *sorted(borders), len(documents)]):
        shards.append(root / f"shard-{len(shards)}")
        shards[-1].mkdir()
        write_shard(
            shards[-1],
            gather([(f"document {i}", [documents[i]]) for i in range(begin, end)], chosen, np.dtype(np.uint16)),
            {},
        )
    (root / "whole").mkdir()
    (root / "pieced").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "ASSEMBLY_BYTES", piece)  # shuffled a few tokens at a time
        try:
            write_store(root / "whole", documents, chosen, vocabulary_size=10_000, seed=3, metadata=METADATA)
        except DataError:
            with pytest.raises(DataError, match="no document is left"):
                assemble(root / "pieced", shards, chosen, dtype=np.dtype(np.uint16), seed=3, metadata=METADATA)
            return
        assemble(root / "pieced", shards, chosen, dtype=np.dtype(np.uint16), seed=3, metadata=METADATA)
    assert contents(root / "pieced") == contents(root / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_a_flipped_byte_is_found_and_its_file_named(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "s"
    documents: list[Document] = [([i, i + 1, i + 2], [False, True, i % 2 == 0]) for i in range(50)]
    make_store(folder, documents, layout, 8)
    files = sorted(folder.iterdir())
    assert [file.name for file in files if file.name != "packed.bin"] == [
        "checksums.bin",
        "documents.bin",
        "loss_mask.bin",
        "manifest.json",
        "tokens.bin",
    ]
    assert verify_store(folder) == sum(file.stat().st_size for file in files if file.suffix == ".bin")
    for file in files:
        whole = file.read_bytes()
        for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            for flip in (1, 128):
                file.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
                with pytest.raises(DataError, match=re.escape(str(file))):
                    verify_store(folder)
        file.write_bytes(whole)
    verify_store(folder)


def flip(file: Path, place: int) -> None:
    whole = bytearray(file.read_bytes())
    whole[place] ^= 16
    file.write_bytes(whole)


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_a_flipped_byte_is_found_when_it_is_read(tmp_path: Path, layout: str) -> None:
    """By each way of reading, before a sample shows it; the file, the block and the folder are named."""
    folder, lengths = tmp_path / "s", [11, 2, 30, 7] * 1500
    masks = [[i % 3 > 0 for i in range(n)] for n in lengths]
    documents: list[Document] = [([i % 9000 for i in range(n)], mask) for n, mask in zip(lengths, masks, strict=True)]
    make_store(folder, documents, layout, 32)
    whole = open_store(folder, 32)
    expected = [whole.sample(i) for i in range(whole.samples)]
    looks = (
        lambda store: [store.documents_in(i) for i in range(store.samples)],
        lambda store: store.document_lengths(10**9),
    )
    seen_by = [(look, repr(look(whole))) for look in looks]
    for file in sorted(folder.glob("*.bin")):
        original = file.read_bytes()
        for place in {0, len(original) // 2, len(original) - 1}:
            flip(file, place)
            seen = 0
            with pytest.raises(DataError) as error:
                store = open_store(folder, 32)
                for i in range(store.samples):
                    assert all(map(np.array_equal, store.sample(i), expected[i]))
                    seen += 1
            assert f"{file}" in str(error.value) and "emove the folder" in str(error.value)
            if file.name != "checksums.bin":
                assert f"{file}: block {place // BLOCK} (" in str(error.value)
                assert f"emove the folder {folder}; " in str(error.value)
                assert seen or place < BLOCK or file.name != "tokens.bin"
            for look, found in seen_by:
                with suppress(DataError):
                    assert repr(look(open_store(folder, 32))) == found
            file.write_bytes(original)


def calls_of(work: Callable[[], Any]) -> Counter[str]:
    """Of functions, those written in C too, by name."""
    seen: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, arg: seen.update([frame.f_code.co_name if event == "call" else arg.__name__])
                   if event in ("call", "c_call") else None)  # fmt: skip
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize(("layout", "looks"), [("windows", 3), ("packed", 4)])
def test_a_look_at_compared_blocks_is_a_look_at_an_array(tmp_path: Path, layout: str, looks: int) -> None:
    """Nothing is looked up, and nothing is done per token, per document or per block of the store."""
    documents: list[Document] = [(list(range(200)), [True, False] * 100)] * 2000
    store = make_store(tmp_path / "s", documents, layout, 1024)
    first = calls_of(lambda: [store.sample(i) for i in range(store.samples)])
    again = calls_of(lambda: [store.sample(i) for i in range(store.samples)])
    assert first["_check"] - again["_check"] == first["xxh3_64_intdigest"] > 10
    assert again["__getitem__"] + again["between"] == looks * store.samples
    assert not {"find", "indices", "pread", "xxh3_64_intdigest"} & again.keys()
    assert sum(again.values()) < 60 * store.samples


def test_a_block_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", [(list(range(5000)), None)] * 40, "windows", 64)
    calls: list[int] = []
    check = Column._check
    monkeypatch.setattr(Column, "_check", lambda self, block: calls.append(block) or check(self, block))
    for _ in range(2):
        for i in range(store.samples):
            store.sample(i)
    assert len(calls) == sum(
        -(-store.manifest["files"][f"{name}.bin"]["bytes"] // BLOCK) for name in ("tokens", "documents")
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_memory_does_not_grow_with_the_store(tmp_path: Path, layout: str) -> None:
    """A store of 10 billion tokens, almost all of them holes of sparse files."""
    tokens, documents, length = 10**10, 10**7, 2048
    folder = tmp_path / "s"
    folder.mkdir()
    sizes = {"tokens.bin": 2 * tokens, "documents.bin": 8 * (documents + 1), "loss_mask.bin": tokens}
    if layout == "packed":
        sizes["packed.bin"] = 8 * (tokens // length + 1)
    for name, size in sizes.items():
        (folder / name).touch()
        os.truncate(folder / name, size)
    with (folder / "documents.bin").open("r+b") as file:
        file.seek(8 * documents)
        file.write(np.int64(tokens).tobytes())
    sums = []
    for name, size in sorted(sizes.items()):
        sums.append(np.full(-(-size // BLOCK), xxhash.xxh3_64_intdigest(bytes(BLOCK)), "<u8"))
        with (folder / name).open("rb") as file:
            file.seek((len(sums[-1]) - 1) * BLOCK)
            sums[-1][-1] = xxhash.xxh3_64_intdigest(file.read())
    (folder / "checksums.bin").write_bytes(data := np.concatenate(sums).tobytes())
    checksums = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "format": FORMAT,
        "layout": layout,
        "sequence_length": length,
        **METADATA,
        "pad_id": 0,
        "dtype": "uint16",
        "store_columns": {},
    }
    (folder / "manifest.json").write_text(
        SEAL.text(
            manifest
            | {"tokens": tokens, "checksums": checksums}
            | {"files": {name: {"bytes": size, "sha256": ""} for name, size in sorted(sizes.items())}}
        )
    )
    before = resident_bytes()
    store = open_store(folder, length)
    batches = Batches([store], None, seed=0, global_batch_size=4, total_samples=10**9, data_rank=0, data_size=1)
    if layout == "windows":
        assert batches(1_000_000).tensors["input_ids"].shape == (4, length)
    else:
        assert len(batches.ids(1_000_000)) == 4
    assert store.samples > 4_000_000
    assert resident_bytes() - before < 50_000_000


# Preparing a run's stores.

MODULE = """
import os, pathlib
folder = pathlib.Path({folder!r})
with (folder / "arrivals").open("a") as arrivals:
    arrivals.write(f"{{os.getpid()}}\\n")

def rows():
    with (folder / "calls").open("a") as calls:
        calls.write("called\\n")
    for i in range(60):
        if i == 30 and (folder / "gate").exists():
            (folder / "gate").read_text()  # a FIFO: waits until the test writes
            (folder / "gate").unlink()
        yield dict(key=f"k{{i}}", text=f"document {{i}} " + "words and words " * (i % 7 + 2),
                   prompt=f"question {{i}}", completion=f"answer {{i}}")
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A source whose readings are counted in the file `calls`."""
    name = f"source_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:rows"


def make_run(folder: Path, source: str, task: str = "pretrain", **changes) -> RunConfig:
    stage = StageConfig(
        name="s",
        task={"name": "sft", "max_cut_answers": 1.0} if task == "sft" else task,
        data=[SourceConfig(source=source)],
        **{"held_out": 0.2, "sequence_length": 16, "evaluate": EvaluateConfig()} | changes.pop("stage", {}),
        global_batch_size=2,
        steps=1,
        optimizer=AdamW(lr=1e-3),
    )
    return RunConfig(
        name="r",
        output=str(folder / "out"),
        model=ModelConfig(from_config={"model_type": "llama"}),
        tokenizer=TokenizerConfig(train=TrainTokenizerConfig(vocab_size=changes.pop("vocab_size", 300))),
        stages=[stage],
        **changes,
    )


def prepare(run: RunConfig) -> StageData:
    tokenizer = open_tokenizer(run)
    return prepare_stage(run.stages[0], run.stages[0].task, tokenizer, stores=run.stores, seed=run.seed)


def prepare_folders(run: RunConfig) -> list[str]:
    data = prepare(run)
    return [str(store.folder) for store in data.train + data.held_out]


def calls(folder: Path) -> int:
    return len(lines(folder / "calls"))


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_unchanged_ingredients_are_not_prepared_again(tmp_path: Path, rows: str, task: str) -> None:
    run = make_run(tmp_path, rows, task)
    first = prepare(run)
    times = [(store.folder / "manifest.json").stat().st_mtime_ns for store in first.train + first.held_out]
    assert calls(tmp_path) == 3  # tokenizer, training side, held-out side
    again = prepare(run)
    assert [s.folder for s in again.train] == [s.folder for s in first.train]
    assert [(s.folder / "manifest.json").stat().st_mtime_ns for s in again.train + again.held_out] == times
    assert calls(tmp_path) == 3
    assert first.train[0].manifest["documents"] + first.held_out[0].manifest["documents"] == 60
    assert first.weights is None


def test_a_changed_ingredient_makes_new_stores(tmp_path: Path, rows: str) -> None:
    runs = {
        "first": make_run(tmp_path, rows, "sft"),
        "seed": make_run(tmp_path, rows, "sft", seed=1),
        "tokenizer": make_run(tmp_path, rows, "sft", vocab_size=301),
        "held_out": make_run(tmp_path, rows, "sft", stage={"held_out": 0.3}),
        "length": make_run(tmp_path, rows, "sft", stage={"sequence_length": 24}),
        "task": make_run(tmp_path, rows, "pretrain"),
    }
    stores = {name: prepare_folders(run)[0] for name, run in runs.items()}
    assert len(set(stores.values())) == len(runs), stores
    module = tmp_path / f"{rows.split(':')[0]}.py"
    module.write_text(module.read_text() + "\n# changed\n")
    assert prepare_folders(runs["first"])[0] not in stores.values()


def test_windows_of_another_length_share_the_store(tmp_path: Path, rows: str) -> None:
    short, long = (prepare(make_run(tmp_path, rows, stage={"sequence_length": n})).train[0] for n in (8, 32))
    assert short.folder == long.folder
    assert short.samples > 3 * long.samples > 0


def test_changed_files_make_a_new_store(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some words " * 50)
    run = make_run(tmp_path, str(file), stage={"held_out": 0.0, "evaluate": None})
    first = prepare_folders(run)
    assert prepare_folders(run) == first
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert prepare_folders(run) == first
    file.write_text("some wards " * 50)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare_folders(run) != first


def test_evaluation_data_of_its_own_is_taken_whole(tmp_path: Path, rows: str) -> None:
    evaluate = EvaluateConfig(data=[SourceConfig(source=rows)])
    data = prepare(make_run(tmp_path, rows, stage={"held_out": 0.0, "evaluate": evaluate}))
    assert [store.manifest["documents"] for store in data.held_out] == [60]


def test_two_processes_train_the_tokenizer_once(tmp_path: Path, rows: str) -> None:
    """A FIFO holds the one that trains inside the source until the other process has come too."""
    run = make_run(tmp_path, rows)
    os.mkfifo(tmp_path / "gate")
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        results = [
            pool.apply_async(prepare_tokenizer, (run.tokenizer.train, run.stages[0], run.stores)) for _ in range(2)
        ]
        gate = None
        while gate is None:
            results[0].wait(0.1)
            assert not any(result.ready() for result in results)
            if len(lines(tmp_path / "arrivals")) == 2:
                with suppress(OSError):  # until the builder has opened its end
                    gate = os.open(tmp_path / "gate", os.O_WRONLY | os.O_NONBLOCK)
        results[0].wait(0.3)  # for the other one to reach the lock
        os.write(gate, b"go")
        os.close(gate)
        first, second = (result.get(timeout=60) for result in results)
    assert first == second
    assert len(set(lines(tmp_path / "arrivals"))) == 2
    assert calls(tmp_path) == 1


def test_too_little_data_says_whose(tmp_path: Path, rows: str) -> None:
    with pytest.raises(DataError, match=rf"{rows} \(training side\).*fewer than one sequence of 100000"):
        prepare(make_run(tmp_path, rows, stage={"sequence_length": 100_000}))
