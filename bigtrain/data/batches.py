"""batches(step): one rank's share of a global batch, as a pure function of (stores, seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bigtrain.data.order import Indices, Order, locate

if TYPE_CHECKING:
    from bigtrain.data.store import Store

DOCUMENTS = "documents"  # a tensor of batches that are asked for it


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    tensors: on the CPU, each with as many rows; a rank may have none. Of `windows` and `packed` layouts `input_ids`,
        `targets` (already shifted; IGNORE where nothing is to be learned) and `position_ids` (restart at each
        document), int64 of shape (rows, length). Of `rows` `input_ids` and `attention_mask`, (rows, length), where
        length is that of the longest row of the global batch, and the layout's columns, (rows,).
    rows: sequences in the whole global batch, over all ranks.
    step: the step that the batch belongs to; seeds dropout.
    """

    tensors: dict[str, Tensor]
    rows: int
    step: int


class Batches:
    """The batches of a stage. Nothing to save: any rank of any world size can build any step's batch."""

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float] | None,
        *,
        seed: int,
        global_batch_size: int,
        total_samples: int,
        data_rank: int,
        data_size: int,
    ):
        """weights: shares of the stores, None to take them as one. total_samples: of the whole stage; the last step
        has what is left. data_rank, data_size: which share of each batch, and of how many (`ParallelDims`).
        Raises DataError for a weight that is too small to be drawn."""
        self._stores = list(stores)
        self._order = Order([store.samples for store in stores], weights, seed)
        self._shares = _Shares(global_batch_size, total_samples, data_rank, data_size)

    @property
    def steps(self) -> int:
        return self._shares.steps

    @property
    def shares(self) -> list[float]:
        """Of the stage's samples, those that each store gives."""
        return self._order.shares.tolist()

    def __call__(self, step: int) -> Batch:
        """This rank's contiguous share of the global batch of `step`; may have no rows. Raises IndexError."""
        rows, numbers = self._shares.of(step)
        length = _length(self._stores, lambda: self._order(self._shares.whole(step)))
        return _batch(self._stores, *self._order(numbers), length=length, rows=rows, step=step)

    def ids(self, step: int) -> list[tuple[int, int]]:
        """(store, sample in the store) of each row of the whole global batch."""
        stores, samples = self._order(self._shares.whole(step))
        return list(zip(stores.tolist(), samples.tolist(), strict=True))


class Prefetched:
    """The batches of a stage, the next one built by a thread while the current one is trained on.

    With `pin` its tensors lie in page-locked memory, from which a GPU copies without the host waiting.
    A context; leaving it ends the thread.
    """

    def __init__(self, batches: Batches, pin: bool = False):
        self._batches = batches
        self._pin = pin
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        """`batches(step)`, of any step; fast for the one after the last that was asked for."""
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            future = self._thread.submit(self._build, step)
        batch = future.result()
        if step + 1 < self._batches.steps:
            self._ahead = step + 1, self._thread.submit(self._build, step + 1)
        return batch

    def _build(self, step: int) -> Batch:
        batch = self._batches(step)
        if not self._pin:
            return batch
        return replace(batch, tensors={key: tensor.pin_memory() for key, tensor in batch.tensors.items()})


def held_out_batches(
    stores: Sequence[Store],
    global_batch_size: int,
    sequences: int | None,
    data_rank: int,
    data_size: int,
    documents: bool = False,
) -> Iterator[Batch]:
    """This rank's share of the first `sequences` samples (None: all), store after store, each sample once.

    documents: with the tensor DOCUMENTS, of the shape of `targets`: the number of each target's document, counted
    through all stores.
    """
    ends = np.cumsum([store.samples for store in stores])
    total = int(ends[-1]) if sequences is None else min(int(ends[-1]), sequences)
    shares = _Shares(global_batch_size, total, data_rank, data_size)
    for step in range(shares.steps):
        rows, numbers = shares.of(step)
        which, samples = locate(numbers, ends)
        length = _length(stores, lambda step=step: locate(shares.whole(step), ends))  # type: ignore[misc]
        batch = _batch(stores, which, samples, length=length, rows=rows, step=step)
        yield replace(batch, tensors=batch.tensors | _documents(stores, which, samples)) if documents else batch


@dataclass(frozen=True)
class _Shares:
    """Which of the samples 0 ... total_samples - 1 a rank has in a step."""

    global_batch_size: int
    total_samples: int
    data_rank: int
    data_size: int

    @property
    def steps(self) -> int:
        return -(-self.total_samples // self.global_batch_size)

    def whole(self, step: int) -> Indices:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        first = step * self.global_batch_size
        return np.arange(first, min(first + self.global_batch_size, self.total_samples))

    def of(self, step: int) -> tuple[int, Indices]:
        """(rows of the global batch, this rank's numbers)."""
        numbers = self.whole(step)
        rows = len(numbers)
        return rows, numbers[self.data_rank * rows // self.data_size : (self.data_rank + 1) * rows // self.data_size]


def _length(stores: Sequence[Store], whole: Callable[[], tuple[Indices, Indices]]) -> int:
    """Tokens of a row of a batch. whole: (store, sample) of the rows of the global batch, so that all ranks agree."""
    if not stores[0].is_ragged:
        return stores[0].sequence_length
    which, samples = whole()
    return max(stores[store].longest(samples[which == store]) for store in np.unique(which).tolist())


def _batch(stores: Sequence[Store], which: Indices, samples: Indices, *, length: int, rows: int, step: int) -> Batch:
    arrays = stores[0].arrays(len(samples), length)
    for row, (store, sample) in enumerate(zip(which.tolist(), samples.tolist(), strict=True)):
        stores[store].fill(arrays, row, sample)
    return Batch({key: torch.from_numpy(array) for key, array in arrays.items()}, rows, step)


def _documents(stores: Sequence[Store], which: Indices, samples: Indices) -> dict[str, Tensor]:
    firsts = np.cumsum([0, *(store.manifest["documents"] for store in stores)])
    if stores[0].is_ragged:  # each row is a document
        return {DOCUMENTS: torch.from_numpy(firsts[which] + samples)}
    numbers = np.zeros((len(samples), stores[0].sequence_length), dtype=np.int64)  # 0 where nothing is
    for row, (store, sample) in enumerate(zip(which.tolist(), samples.tolist(), strict=True)):
        documents = stores[store].documents_in(sample)
        sizes = np.diff(documents.cu_seqlens)
        numbers[row, : documents.cu_seqlens[-1]] = np.repeat(
            firsts[store] + documents.first + np.arange(len(sizes)), sizes
        )
    return {DOCUMENTS: torch.from_numpy(numbers)}
