"""The order of samples: permutations, epochs, mixing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.schema import SourceConfig, StageConfig
from bigtrain.data.batches import _Shares
from bigtrain.data.order import PATTERN, Order, locate, make_key, mixing_pattern, permute, stage_samples
from bigtrain.errors import DataError
from bigtrain.optim.adamw import AdamW

KEYS = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 3000), key=KEYS)
@settings(deadline=None)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 255, 256, 257, 65535, 65536, 65537, 99991])
def test_permute_is_a_bijection_around_squares_and_powers(size: int) -> None:
    seen = np.zeros(size, dtype=int)
    np.add.at(seen, permute(np.arange(size), size, key=7), 1)
    assert (seen == 1).all()


@given(size=st.integers(2, 2**50), key=KEYS, data=st.data())
@settings(deadline=None)
def test_permute_keeps_huge_ranges_apart_and_inside(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    images = permute(np.asarray(indices), size, key).tolist()
    assert len(set(images)) == len(images)
    assert all(0 <= image < size for image in images)


def test_permute_does_not_depend_on_what_it_is_asked_with() -> None:
    whole = permute(np.arange(1000), 1000, 5)
    assert [int(permute(np.array([i]), 1000, 5)[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_permute_is_the_same_for_ever() -> None:
    """A change here changes the samples of every resumed run."""
    assert permute(np.arange(10), 10, make_key(0, -1, 0)).tolist() == [8, 6, 7, 2, 4, 3, 5, 0, 9, 1]


def test_permute_shuffles_well() -> None:
    """Each image of index 0 is about equally likely over keys; neighbours do not stay neighbours."""
    images = Counter(int(permute(np.array([0]), 10, make_key("k", k))[0]) for k in range(5000))
    chi_square = sum((images[i] - 500) ** 2 / 500 for i in range(10))
    assert chi_square < 27.9  # 0.1 % point for 9 degrees of freedom
    order = permute(np.arange(10_000), 10_000, 3)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


@given(samples=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_without_weights_each_epoch_has_each_sample_once(samples: list[int], seed: int) -> None:
    order, size = Order(samples, None, seed), sum(samples)
    everything = {(store, sample) for store, count in enumerate(samples) for sample in range(count)}
    for epoch in range(3):
        stores, picked = order(np.arange(epoch * size, (epoch + 1) * size))
        ids = list(zip(stores.tolist(), picked.tolist(), strict=True))
        assert len(ids) == len(everything)
        assert set(ids) == everything


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    numbers = np.arange(100)
    first = Order([100], None, seed=1)
    orders = [first(numbers)[1], first(numbers + 100)[1], Order([100], None, seed=2)(numbers)[1]]
    assert len({tuple(order.tolist()) for order in orders}) == 3


WEIGHTS = st.lists(st.floats(0.05, 20), min_size=1, max_size=6)


@given(weights=WEIGHTS, start=st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_mixing_keeps_the_shares(weights: list[float], start: int) -> None:
    """Within one sample in any window of a whole pattern; never off by more than a few from the start."""
    order = Order([1000] * len(weights), weights, seed=0)
    shares = np.asarray(weights) / sum(weights)
    window, _ = order(np.arange(start, start + PATTERN))
    assert (np.abs(np.bincount(window, minlength=len(weights)) - shares * PATTERN) < 1).all()
    first, _ = order(np.arange(PATTERN))
    so_far = (first[:, None] == np.arange(len(weights))).cumsum(axis=0)
    wanted = np.arange(1, PATTERN + 1)[:, None] * shares
    assert np.abs(so_far - wanted).max() < 3


@given(weights=WEIGHTS, start=st.integers(0, 10**9), size=st.integers(1, 3 * PATTERN))
@settings(max_examples=50, deadline=None)
def test_mixing_keeps_the_shares_in_any_window(weights: list[float], start: int, size: int) -> None:
    """Up to a few samples, and one for each pattern that the window goes through."""
    stores, _ = Order([1000] * len(weights), weights, seed=0)(np.arange(start, start + size))
    wanted = np.asarray(weights) / sum(weights) * size
    assert np.abs(np.bincount(stores, minlength=len(weights)) - wanted).max() < 6 + size / PATTERN


def test_a_used_up_source_is_reshuffled_by_itself() -> None:
    stores, picked = Order([40, 1000], [1.0, 1.0], seed=2)(np.arange(400))
    epochs = picked[stores == 0].reshape(5, 40)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    assert len(set(picked[stores == 1].tolist())) == 200  # the other one is still in its first


def test_the_order_holds_nothing_that_grows_with_the_samples() -> None:
    held = [
        sum(value.nbytes for value in vars(Order([size, size], weights, seed=0)).values() if hasattr(value, "nbytes"))
        for size in (10, 10**12)
        for weights in (None, [1.0, 2.0])
    ]
    assert held[:2] == held[2:]
    assert max(held) < 300_000


@given(
    samples=st.lists(st.integers(30, 300), min_size=2, max_size=4),
    data=st.data(),
)
@settings(max_examples=10, deadline=None)
def test_a_weighted_source_goes_through_all_its_samples_before_it_repeats(
    samples: list[int], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(samples), max_size=len(samples)))
    stores, picked = Order(samples, weights, seed=4)(np.arange(2 * PATTERN + 77))
    for store, size in enumerate(samples):
        given_out = picked[stores == store]
        assert len(given_out) > 0
        for first in range(0, len(given_out) - size + 1, size):
            assert sorted(given_out[first : first + size].tolist()) == list(range(size))


def test_a_weighted_order_does_not_depend_on_what_it_is_asked_with() -> None:
    order = Order([50, 70], [1.0, 2.5], seed=9)
    stores, samples = order(np.arange(10_000))
    for number in (0, 1, 4095, 4096, 4097, 9999):
        store, sample = order(np.array([number]))
        assert (store[0], sample[0]) == (stores[number], samples[number])


def test_a_weight_that_would_never_be_drawn_is_an_error() -> None:
    with pytest.raises(DataError, match="source 1"):
        mixing_pattern([1.0, 1e-5])


def test_locate() -> None:
    stores, samples = locate(np.arange(6), np.array([2, 3, 6]))
    assert stores.tolist() == [0, 0, 1, 2, 2, 2]
    assert samples.tolist() == [0, 1, 0, 0, 1, 2]


def weighted_stage(epochs, of, weights, batch=7):
    data = [{"source": f"data/{i}.jsonl", "weight": weight} for i, weight in enumerate(weights)]
    return StageConfig(
        name="s",
        task="pretrain",
        data=[SourceConfig(**source) for source in data],
        sequence_length=8,
        global_batch_size=batch,
        epochs=epochs,
        epochs_of=f"data/{of}.jsonl",
        optimizer=AdamW(lr=1e-3),
    )


@pytest.mark.parametrize("epochs", [1, 2, 3.5])
@pytest.mark.parametrize(
    ("samples", "weights", "of"),
    [([50, 900], [1.0, 3.0], 0), ([50, 900], [1.0, 3.0], 1), ([5000, 3, 700], [2.0, 0.5, 5.5], 0), ([1, 1], [1, 1], 1)],
)
def test_the_named_source_is_seen_as_often_as_its_epochs_say(samples, weights, of, epochs):
    stage = weighted_stage(epochs, of, weights)
    total = stage_samples(stage, samples)
    stores, chosen = Order(samples, weights, seed=5)(np.arange(total))
    seen = np.bincount(chosen[stores == of], minlength=samples[of])
    assert seen.sum() == round(epochs * samples[of])
    assert set(seen.tolist()) <= {int(epochs), -int(-epochs // 1)}  # each sample, and of a part of an epoch some
    assert stores[-1] == of  # not one more of the others than their shares take meanwhile
    shares = np.bincount(stores, minlength=len(samples)) / total
    assert np.allclose(shares, np.array(weights) / sum(weights), atol=max(2 / total, 1e-3)) or total < 20


def test_batches_of_a_stage_that_counts_a_sources_epochs_are_a_function_of_the_step():
    """Whatever the number of ranks: all steps together see what one reading sees."""
    stage = weighted_stage(2, 0, [1.0, 3.0])
    total, order = stage_samples(stage, [50, 900]), Order([50, 900], [1.0, 3.0], seed=5)
    whole = np.stack(order(np.arange(total)), axis=1).tolist()
    for world in (1, 3):
        ranks = [_Shares(stage.global_batch_size, total, rank, world) for rank in range(world)]
        seen = [np.stack(order(rank.of(step)[1]), axis=1).tolist() for step in range(ranks[0].steps) for rank in ranks]
        assert [row for rows in seen for row in rows] == whole
