"""Batches are a function of the step, and the ranks' shares of it add up."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.batches import Batch, Batches, Prefetched, held_out_batches
from bigtrain.data.store import Store, open_store
from bigtrain.data.types import Layout
from bigtrain.data.writing import write_store
from bigtrain.parallel.micro_batches import micro_batches

LENGTH = 4
NAMES = ("input_ids", "targets", "position_ids")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """37 and 11 samples, windows and packed."""
    opened = []
    for name, layout, tokens in [
        ("w", Layout("windows"), 37 * LENGTH + 1),
        ("b", Layout("packed", LENGTH, 0), 0),
    ]:
        folder = tmp_path_factory.mktemp("stores") / name
        folder.mkdir()
        documents = [(list(range(tokens)), None)] if tokens else [([i, i, i, i], None) for i in range(11)]
        metadata = {"source": name, "documents_are": "all"}
        write_store(folder, documents, layout, vocabulary_size=1000, seed=0, metadata=metadata)
        opened.append(open_store(folder, LENGTH))
    assert [store.samples for store in opened] == [37, 11]
    return opened


def ranks(stores, weights, size, total, world) -> list[Batches]:
    return [
        Batches(stores, weights, seed=5, global_batch_size=size, total_samples=total, data_rank=rank, data_size=world)
        for rank in range(world)
    ]


def rows_of(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch.tensors[name] for batch in batches]) for name in NAMES}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 5, 7, 48])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_ranks_together_have_the_global_batch(stores, weights, size, world) -> None:
    total = 2 * 48 + 3
    shares = ranks(stores, weights, size, total, world)
    reference = ranks(stores, weights, size, total, 1)[0]
    assert shares[0].steps == -(-total // size)
    seen = 0
    for step in range(shares[0].steps):
        ids = reference.ids(step)
        batches = [share(step) for share in shares]
        seen += len(ids)
        expected = [np.stack(arrays) for arrays in zip(*(stores[s].sample(i) for s, i in ids), strict=True)]
        rows = rows_of(batches)
        for name, array in zip(NAMES, expected, strict=True):
            assert rows[name].dtype == torch.int64
            assert torch.equal(rows[name], torch.from_numpy(array))
        for share, batch in zip(shares, batches, strict=True):
            assert share.ids(step) == ids
            assert (batch.rows, batch.step) == (len(ids), step)
            assert len(batch.tensors["targets"]) in (len(ids) // world, -(-len(ids) // world))
    assert seen == total


@pytest.mark.parametrize("size", [1, 5, 7, 48, 100])
def test_each_sample_once_per_epoch(stores, size) -> None:
    batches = ranks(stores, None, size, 96, 1)[0]
    ids = [pair for step in range(batches.steps) for pair in batches.ids(step)]
    everything = [(0, i) for i in range(37)] + [(1, i) for i in range(11)]
    assert sorted(ids[:48]) == sorted(ids[48:]) == everything
    assert ids[:48] != ids[48:]


@given(size=st.integers(1, 60), world=st.integers(1, 9), total=st.integers(1, 200), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_step_can_be_asked_for_alone(stores, size, world, total, data) -> None:
    walked = ranks(stores, None, size, total, world)[0]
    step = data.draw(st.integers(0, walked.steps - 1))
    for earlier in range(min(step, 3)):
        walked(earlier)
    fresh = ranks(stores, None, size, total, world)[0]
    assert all(torch.equal(walked(step).tensors[name], fresh(step).tensors[name]) for name in NAMES)


@given(
    size=st.integers(1, 60),
    total=st.integers(1, 300),
    weights=st.sampled_from([None, (1.0, 3.0)]),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=5),
    micro=st.integers(1, 16),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_resumed_anywhere_on_any_number_of_ranks(stores, size, total, weights, worlds, micro, data) -> None:
    """Each world takes over at a step that the one before has reached: the samples that are trained on are the same,
    in the same order, however the ranks' rows are split into micro-batches."""
    whole = ranks(stores, weights, size, total, 1)[0]
    cuts = [data.draw(st.integers(0, whole.steps)) for _ in worlds[1:]]
    borders = [0, *sorted(cuts), whole.steps]
    seen: list[tuple[int, int]] = []
    for world, first, last in zip(worlds, borders, borders[1:], strict=False):
        shares = ranks(stores, weights, size, total, world)  # nothing but the step is handed over
        for step in range(first, last):
            batches = [share(step) for share in shares]
            expected = np.stack([stores[s].sample(i)[0] for s, i in whole.ids(step)])
            assert torch.equal(rows_of(batches)["input_ids"], torch.from_numpy(expected))
            inputs = []
            for batch in batches:
                micros = micro_batches(batch, micro, world)
                inputs.append(torch.cat([part["input_ids"] for part in micros])[: len(batch.tensors["input_ids"])])
            assert torch.equal(torch.cat(inputs), torch.from_numpy(expected))
            seen += shares[0].ids(step)
    assert len(seen) == total
    if weights is None:
        everything = {(0, i) for i in range(37)} | {(1, i) for i in range(11)}
        for epoch in range(total // 48):
            assert set(seen[epoch * 48 : (epoch + 1) * 48]) == everything


def test_weights_count_tokens(tmp_path: Path) -> None:
    """Of two sources with documents of very different lengths, by the tokens of the batches themselves."""
    opened = []
    for number, length in enumerate((3, 200)):
        (tmp_path / str(number)).mkdir()
        documents = [([number] * length, None) for _ in range(3000 // length)]
        metadata = {"source": str(number), "documents_are": "all"}
        write_store(tmp_path / str(number), documents, Layout("windows"), vocabulary_size=2, seed=0, metadata=metadata)
        opened.append(open_store(tmp_path / str(number), LENGTH))
    batches = ranks(opened, [1.0, 3.0], 64, 64 * 40, 1)[0]
    for first in (0, 7, 20):
        tokens = torch.cat([batches(step).tensors["input_ids"].flatten() for step in range(first, first + 16)])
        assert tokens.float().mean().item() == pytest.approx(0.75, abs=0.005)


def test_a_rank_without_rows(stores) -> None:
    shares = ranks(stores, None, 2, 5, 8)
    assert shares[0].steps == 3
    last = [share(2) for share in shares]
    assert sum(len(batch.tensors["input_ids"]) for batch in last) == 1
    assert {tuple(batch.tensors["input_ids"].shape) for batch in last} == {(0, LENGTH), (1, LENGTH)}
    assert {batch.rows for batch in last} == {1}


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_that_is_not_there(stores, step) -> None:
    with pytest.raises(IndexError):
        ranks(stores, None, 2, 5, 1)[0](step)


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("sequences", [None, 1, 40, 1000])
def test_held_out_has_each_sample_once_in_natural_order(stores, world, sequences) -> None:
    natural = [stores[0].sample(i) for i in range(37)] + [stores[1].sample(i) for i in range(11)]
    natural = natural[:sequences]
    shares = [list(held_out_batches(stores, 10, sequences, rank, world)) for rank in range(world)]
    assert [batch.rows for batch in shares[0]] == [len(natural[i : i + 10]) for i in range(0, len(natural), 10)]
    rows = rows_of([batch for step in zip(*shares, strict=True) for batch in step])
    for column, name in enumerate(NAMES):
        assert torch.equal(rows[name], torch.from_numpy(np.stack([sample[column] for sample in natural])))


def test_a_batch_is_not_shared_with_the_store(stores) -> None:
    batches = ranks(stores, None, 48, 48, 1)[0]
    before = batches(0).tensors["input_ids"].clone()
    batches(0).tensors["input_ids"].zero_()
    assert torch.equal(batches(0).tensors["input_ids"], before)
    assert before.any()


def test_the_stores_folder_is_all_a_rank_needs(stores) -> None:
    opened = [open_store(Path(store.folder), LENGTH) for store in stores]
    ours, theirs = ranks(stores, None, 9, 48, 1)[0], ranks(opened, None, 9, 48, 1)[0]
    assert torch.equal(ours(2).tensors["input_ids"], theirs(2).tensors["input_ids"])


def test_prefetched_batches_are_the_same_in_any_order(stores) -> None:
    batches = ranks(stores, None, 9, 48, 1)[0]
    with Prefetched(batches) as prefetched:
        for step in (0, 1, 2, 2, 5, 0, 1, 4, 5):
            ahead, expected = prefetched(step), batches(step)
            assert (ahead.step, ahead.rows) == (step, expected.rows)
            assert all(torch.equal(ahead.tensors[name], expected.tensors[name]) for name in NAMES)
        with pytest.raises(IndexError):
            prefetched(6)


def test_the_next_batch_is_built_behind_the_step(stores) -> None:
    built = []
    second = threading.Event()

    class Watched(Batches):
        def __call__(self, step):
            built.append((step, threading.current_thread() is threading.main_thread()))
            if step == 1:
                second.set()
            return super().__call__(step)

    watched = Watched(stores, None, seed=0, global_batch_size=9, total_samples=48, data_rank=0, data_size=1)
    with Prefetched(watched) as prefetched:
        prefetched(0)
        assert second.wait(60)  # nobody has asked for step 1
    assert built == [(0, False), (1, False)]
