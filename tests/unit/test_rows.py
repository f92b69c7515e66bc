"""Rows with values of their own: the store, and the batches that every world size makes of it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.schema import CleanConfig
from bigtrain.data.batches import DOCUMENTS, Batch, Batches, held_out_batches
from bigtrain.data.cleaning.texts import TextSteps, row_text
from bigtrain.data.shards import _measured, text_of
from bigtrain.data.store import open_store
from bigtrain.data.types import IGNORE, Document, Layout
from bigtrain.data.writing import assemble, gather, write_shard
from bigtrain.parallel.micro_batches import micro_batches

PAD, LENGTH = 9, 24
METADATA = {"source": "test", "documents_are": "all"}


def layout():
    return Layout("rows", LENGTH, PAD, columns={"targets": "int64", "score": "float32"})


def make_store(folder, lengths, shards=1):
    """Document i has the tokens i, i, ..., the target i and the score i / 2."""
    rows = [Document([i] * size, None, {"targets": i, "score": i / 2}) for i, size in enumerate(lengths)]
    places = []
    for number, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        places.append(folder.with_name(f"{folder.name}.{number}"))
        places[-1].mkdir()
        encoded = gather([(f"row {i}", [rows[i]]) for i in part], layout(), np.dtype(np.uint16))
        write_shard(places[-1], encoded, {})
    folder.mkdir()
    assemble(folder, places, layout(), dtype=np.dtype(np.uint16), seed=1, metadata=METADATA)
    return open_store(folder, LENGTH)


@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=30),
    size=st.integers(1, 9),
    world=st.integers(1, 4),
    shards=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_each_row_has_its_values_in_every_world(tmp_path_factory, lengths, size, world, shards):
    store = make_store(tmp_path_factory.mktemp("rows") / "store", lengths, shards)
    assert store.samples == len(lengths)

    def batches(rank, of):
        total = 2 * len(lengths)
        return Batches([store], None, seed=3, global_batch_size=size, total_samples=total, data_rank=rank, data_size=of)

    for step in range(batches(0, 1).steps):
        whole = batches(0, 1)(step).tensors
        parts = [batches(rank, world)(step).tensors for rank in range(world)]
        for key, expected in whole.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), expected), key
        ids, mask = whole["input_ids"], whole["attention_mask"]
        longest = max(lengths[target] for target in whole["targets"].tolist())
        assert ids.shape[1] == min(LENGTH, -(-longest // 8) * 8)
        assert torch.equal(whole["score"], whole["targets"].float() / 2)
        for row, target in enumerate(whole["targets"].tolist()):
            assert mask[row].tolist() == [1] * lengths[target] + [0] * (ids.shape[1] - lengths[target])
            assert (ids[row][mask[row] == 1] == target).all() and (ids[row][mask[row] == 0] == PAD).all()


def test_each_held_out_row_once_with_its_number(tmp_path):
    stores = [make_store(tmp_path / "a", [3, 5, 1]), make_store(tmp_path / "b", [2, 2])]
    ranks = [list(held_out_batches(stores, 4, None, rank, 2, documents=True)) for rank in range(2)]
    rows = [batch.tensors for step in zip(*ranks, strict=True) for batch in step]
    assert torch.cat([row[DOCUMENTS] for row in rows]).tolist() == [0, 1, 2, 3, 4]
    firsts = [store.document(i)[0] for store in stores for i in range(store.samples)]
    assert torch.cat([row["targets"] for row in rows]).tolist() == firsts


def test_dummy_rows_have_no_target_and_something_to_attend_to():
    tensors = {
        "input_ids": torch.full((1, 8), 5),
        "attention_mask": torch.ones((1, 8), dtype=torch.int64),
        "targets": torch.tensor([1]),
    }
    micros = micro_batches(Batch(tensors, 6, 0), 2, 2)  # this rank has one of six rows, the fullest has three
    assert [len(micro["targets"]) for micro in micros] == [2, 2]
    assert list(itertools.chain(*(micro["targets"].tolist() for micro in micros))) == [1, IGNORE, IGNORE, IGNORE]
    assert all(micro["attention_mask"].all() for micro in micros)


def test_rows_are_counted_once_and_what_is_cut_is_told():
    rows = [("a:1", [Document([1, 2, 3], None, {"targets": 0, "score": 0}, cut=4)]), ("a:2", [])]
    encoded = gather(rows, layout(), np.dtype(np.uint16))
    assert (encoded.counts["targets"], encoded.counts["cut"], encoded.counts["cut_tokens"]) == (1, 1, 4)
    assert (encoded.tally.used, dict(encoded.tally.dropped)) == (1, {"empty": 1})
    with pytest.raises(KeyError, match="score"):
        gather([("a:1", [Document([1], None, {"targets": 0})])], layout(), np.dtype(np.uint16))


def test_a_label_is_no_text_and_tells_rows_apart():
    row = {"key": "k", "where": "a:1", "text": "win cash", "label": "spam"}
    assert text_of(row) == row_text(row) == "win cash"
    other = row | {"label": "ham"}
    assert _measured([row]) != _measured([other])
    steps = TextSteps(CleanConfig(normalize="NFKC"))
    assert steps(row | {"text": "\uff21", "label": "\uff21"}) == row | {"text": "A", "label": "\uff21"}
