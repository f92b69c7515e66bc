"""How well a model predicts each held-out document."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from bigtrain.data.batches import DOCUMENTS, Batch
from bigtrain.data.cleaning.texts import row_text
from bigtrain.data.prepare import SourcePart
from bigtrain.data.store import Store
from bigtrain.data.types import IGNORE, Layout
from bigtrain.disk import replaced
from bigtrain.distributed.world import World
from bigtrain.errors import ConfigError, DataError
from bigtrain.masking import masked
from bigtrain.parallel import engine
from bigtrain.parallel.task_module import TaskModule
from bigtrain.tasks import Task

SHOWN = 200  # characters of a document's beginning

Sums = dict[str, Tensor]
EACH = "documents' "  # before the names of sums that are one for each document


class ByDocument:
    """A task with more sums, float64 of shape (documents,): `loss` and `targets` of each document."""

    def __init__(self, task: Task, documents: int):
        self._task = task
        self.sums_over = task.sums_over
        self._documents = documents

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return self._task.inputs(batch)

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> Sums:
        values = {"loss": self._task.losses(logits, batch), "targets": batch["targets"].flatten() != IGNORE}
        nothing = torch.zeros(self._documents, dtype=torch.float64, device=batch["targets"].device)
        which = batch[DOCUMENTS].flatten()
        each = {f"{EACH}{name}": nothing.index_add(0, which, value.double()) for name, value in values.items()}
        return self._task.sums(logits, batch, training) | each


def sums_by_document(
    model: Any, task: Task, stores: Sequence[Store], batches: Iterable[Batch], micro: int, world: World
) -> tuple[Sums, Sums]:
    """(the task's sums, `loss` and `targets` of each document, store after store), over all ranks.

    batches: held-out ones with DOCUMENTS. micro: sequences that go through the model at once.
    """
    documents = sum(store.manifest["documents"] for store in stores)
    module = TaskModule(model, ByDocument(task, documents), world.device)  # type: ignore[arg-type]
    sums = engine.evaluate(module, batches, micro, world.size, world.device)
    whole = {name: value for name, value in sums.items() if not name.startswith(EACH)}
    return whole, {name.removeprefix(EACH): value for name, value in sums.items() if name.startswith(EACH)}


@contextmanager
def listing(path: Path | None, world: World) -> Iterator[TextIO | None]:
    """The file to write, on rank 0; it is at `path` once all went well. Raises ConfigError if it cannot be written."""
    if path is None or world.rank != 0:
        yield None
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(replaced(path))
        except OSError as error:
            raise ConfigError(f"documents: {path} cannot be written: {error.strerror}.") from error
        yield stack.enter_context(TextIOWrapper(file, encoding="utf-8"))


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
            held = [_digest(_cut(each.ids, store)) for each in answer] if isinstance(answer, list) else []
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
    return ids[: Layout.of(store.manifest).longest]


def _digest(ids: Any) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
