"""Which sample comes when: a pure function of (seed, number of the sample in the stage), with O(1) memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigtrain.errors import DataError

if TYPE_CHECKING:
    from bigtrain.config.schema import StageConfig

PATTERN = 4096  # entries of the repeating pattern that mixes weighted sources
ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Indices = NDArray[np.int64]


def make_key(*parts: int | str) -> int:
    """A 64-bit key, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def permute(indices: Indices, size: int, key: int) -> Indices:
    """Where a permutation of range(size), chosen by `key`, takes each of the indices (int64 of shape (n,)).

    A Feistel network permutes the smallest near-square grid that holds the range; the few values that fall
    outside the range walk on until they are back inside.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    values = _feistel(indices.astype(np.uint64), rows, columns, key)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], rows, columns, key)
    return values.astype(np.int64)


def mixing_pattern(weights: Sequence[float]) -> Indices:
    """The source of each of PATTERN consecutive samples: counts by largest remainder, spread evenly.

    Raises DataError for a weight that is too small to get an entry.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * PATTERN
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: PATTERN - counts.sum()]] += 1
    if not counts.all():
        unheard = int(np.flatnonzero(counts == 0)[0])
        raise DataError(
            f"the weight of source {unheard} ({weights[unheard]:g}) is less than 1/{PATTERN} of all weights: "
            "it would never be drawn. Raise it, or remove the source."
        )
    credit = np.zeros_like(counts)
    pattern = np.empty(PATTERN, dtype=np.int64)
    for i in range(PATTERN):  # smooth weighted round robin: the source that is furthest behind its share
        credit += counts
        pattern[i] = credit.argmax()
        credit[pattern[i]] -= PATTERN
    return pattern


def stage_samples(stage: StageConfig, samples: Sequence[int]) -> int:
    """How many samples a whole stage trains on. samples: how many each of its stores holds.

    With `epochs_of` it ends with the last sample of that source's last epoch. Raises DataError as `mixing_pattern`.
    """
    if stage.epochs is None or stage.epochs_of is None:
        return stage.sequences(sum(samples))
    number = [source.source for source in stage.data].index(stage.epochs_of)
    entries = np.flatnonzero(mixing_pattern([source.weight or 0.0 for source in stage.data]) == number)
    rounds, place = divmod(max(1, round(stage.epochs * samples[number])) - 1, len(entries))
    return rounds * PATTERN + int(entries[place]) + 1


class Order:
    """Maps the number of a sample in the stage to (store, sample in the store).

    Without weights the stores are one: each epoch is a permutation of all their samples. With weights a fixed
    pattern says which store gives each sample; a store that is used up begins its next epoch, reshuffled.
    """

    def __init__(self, samples: Sequence[int], weights: Sequence[float] | None, seed: int):
        """samples: how many each store holds."""
        self._seed = seed
        self._samples = np.asarray(samples, dtype=np.int64)
        self._ends = np.cumsum(self._samples)
        self._pattern: Indices | None = None
        if weights is not None:
            self._pattern = mixing_pattern(weights)
            taken = self._pattern[:, None] == np.arange(len(samples))
            self._counts = taken.sum(axis=0)
            self._before = np.take_along_axis(taken.cumsum(axis=0) - 1, self._pattern[:, None], axis=1)[:, 0]

    @property
    def shares(self) -> NDArray[np.float64]:
        """Of all samples, those that each store gives."""
        counts = self._samples if self._pattern is None else self._counts
        return counts / counts.sum()

    def __call__(self, numbers: Indices) -> tuple[Indices, Indices]:
        """(stores, samples), int64 of the shape of `numbers` (n,)."""
        if self._pattern is None:
            return locate(self._shuffled(numbers, int(self._ends[-1]), -1), self._ends)
        rounds, place = np.divmod(numbers, PATTERN)
        stores = self._pattern[place]
        given = rounds * self._counts[stores] + self._before[place]
        samples = np.empty_like(given)
        for store in np.unique(stores):
            rows = stores == store
            samples[rows] = self._shuffled(given[rows], int(self._samples[store]), int(store))
        return stores, samples

    def _shuffled(self, numbers: Indices, size: int, source: int) -> Indices:
        """Each run of `size` numbers is one epoch, permuted by a key of its own."""
        epochs, places = np.divmod(numbers, size)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            result[rows] = permute(places[rows], size, make_key(self._seed, source, int(epoch)))
        return result


def locate(numbers: Indices, ends: Indices) -> tuple[Indices, Indices]:
    """(store, sample) of numbers into the concatenation of stores whose samples end at `ends`."""
    stores = np.searchsorted(ends, numbers, side="right")
    return stores, numbers - np.concatenate(([0], ends))[stores]


def _feistel(values: NDArray[np.uint64], rows: int, columns: int, key: int) -> NDArray[np.uint64]:
    """A permutation of range(rows * columns): row and column are shifted in turn by a hash of the other."""
    row, column = np.divmod(values, np.uint64(columns))
    round_keys = _mix(np.uint64(key) + GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))
    for row_key, column_key in zip(round_keys[::2], round_keys[1::2], strict=True):
        row = (row + _half(_mix(column ^ row_key))) % np.uint64(rows)
        column = (column + _half(_mix(row ^ column_key))) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _half(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return x >> np.uint64(1)  # leaves room for a sum: one that wraps around would not be a permutation


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
