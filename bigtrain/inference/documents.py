"""How well a model predicts each held-out document."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.batches import DOCUMENTS, IGNORE, Batch
from bigtrain.data.cleaning.texts import row_text
from bigtrain.data.prepare import SourcePart
from bigtrain.data.store import Store
from bigtrain.data.writing import Layout
from bigtrain.distributed.collectives import sum_over_ranks
from bigtrain.distributed.world import World
from bigtrain.errors import ConfigError, DataError
from bigtrain.masking import masked
from bigtrain.parallel.micro_batches import micro_batches
from bigtrain.parallel.task_module import TaskModule
from bigtrain.tasks import Task

SHOWN = 200  # characters of a document's beginning

Sums = dict[str, NDArray[np.float64]]  # loss (nats), targets, correct: of each document, store after store


class ByDocument:
    """A task whose sums are vectors, float64 of shape (documents,), in which each target counts for its document."""

    def __init__(self, task: Task, documents: int):
        self._task = task
        self._documents = documents

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return self._task.inputs(batch)

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:  # noqa: ARG002
        targets = batch["targets"].flatten()
        values = {
            "loss": self._task.losses(logits, batch),
            "targets": targets != IGNORE,
            "correct": logits.flatten(0, -2).argmax(-1) == targets,
        }
        nothing = torch.zeros(self._documents, dtype=torch.float64, device=targets.device)
        which = batch[DOCUMENTS].flatten()
        return {name: nothing.index_add(0, which, value.double()) for name, value in values.items()}


def sums_by_document(
    model: Any, task: Task, stores: Sequence[Store], batches: Iterable[Batch], micro: int, world: World
) -> Sums:
    """Over all ranks. batches: held-out ones with DOCUMENTS; micro: sequences that go through the model at once."""
    documents = sum(store.manifest["documents"] for store in stores)
    module = TaskModule(model, ByDocument(task, documents), world.device)  # type: ignore[arg-type]
    module.eval()
    totals: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            for tensors in micro_batches(batch, micro, world.size):
                sums = module({key: tensor.to(world.device) for key, tensor in tensors.items()})
                totals = {key: totals[key] + value for key, value in sums.items()} if totals else sums
    return {key: value.cpu().numpy() for key, value in sum_over_ranks(totals).items()}


@contextmanager
def listing(path: Path | None, world: World) -> Iterator[TextIO | None]:
    """The file to write, on rank 0; it is at `path` once all went well. Raises ConfigError if it cannot be written."""
    if path is None or world.rank != 0:
        yield None
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"documents: {path} cannot be written: {error.strerror}.") from error
    try:
        with file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_documents(
    file: TextIO, parts: Sequence[SourcePart], stores: Sequence[Store], task: Task, tokenizer: Any, sums: Sums
) -> None:
    """A line of JSON for each row that has targets: `source`, `where` (file and line), `key`, `text` (its beginning),
    `targets`, `loss` (nats per target); in the order of the sources.

    A row finds its documents in the store by their tokens. Memory: O(1) per document. Raises DataError for sources
    that give other documents than the stores hold.
    """
    first = 0
    for part, store in zip(parts, stores, strict=True):
        numbers: defaultdict[bytes, deque[int]] = defaultdict(deque)
        documents = store.manifest["documents"]
        for number in range(documents):
            numbers[_digest(store.document(number))].append(first + number)
        for row in part.documents(task.columns):
            [answer] = task.encode([part.cleaned(row)], tokenizer, Layout.of(store.manifest))
            held = [_digest(_cut(ids, store)) for ids, _ in answer] if isinstance(answer, list) else []
            chosen = [numbers[digest].popleft() for digest in held if numbers.get(digest)]
            loss, targets = (float(sums[name][chosen].sum()) for name in ("loss", "targets"))
            if targets:
                text = row_text(row)
                place = {"source": masked(part.source.source), "where": masked(row["where"])}
                told: dict[str, Any] = place | {"key": row["key"], "text": text[:SHOWN]}
                told |= {"targets": int(targets), "loss": loss / targets}
                file.write(json.dumps(told, ensure_ascii=False) + "\n")
        if any(numbers.values()):
            raise DataError(
                f"{part.source.source}: no longer gives all documents that the evaluation is about, so they cannot be "
                "listed: put them back, or name others with --data."
            )
        first += documents


def _cut(ids: Sequence[int], store: Store) -> Sequence[int]:
    """A document as the store holds it."""
    limit = store.manifest["sequence_length"]
    return ids if limit is None else ids[: limit + 1]


def _digest(ids: Any) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
