"""What passes between tasks, stores and batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.files import Unusable

IGNORE = -100  # a target with this id is not trained on

Indices = NDArray[np.int64]


class Document(NamedTuple):
    """What an encoder makes of a row, or of a part of it.

    ids: tokens. loss_mask: which of them are trained; None for all. values: by the names of `Layout.columns`.
    cut: tokens that the encoder itself has cut off.
    """

    ids: Sequence[int]
    loss_mask: Sequence[bool] | None = None
    values: Mapping[str, float] = {}
    cut: int = 0


class Documents(list[Document]):
    """Those of a row. unread: names of what the row has and no document holds. is_split: whether they are several
    because one would be too long."""

    def __init__(self, documents: Iterable[Document], unread: tuple[str, ...] = (), is_split: bool = False):
        super().__init__(documents)
        self.unread = unread
        self.is_split = is_split


class LeftOut(NamedTuple):
    """A row of which the run's file wants no document, and why."""

    reason: str


Answer = list[Document] | Unusable | LeftOut  # what an encoder makes of a row
Answered = tuple[str, Answer]  # where the row stands, for messages; what was made of it


@dataclass(frozen=True)
class Layout:
    """How the documents of a store become samples.

    name: `windows`, `packed` or `rows`. sequence_length: tokens of a sample; None for windows, which are cut when they
    are read. pad_id: fills up a sample. columns: names and dtypes of the values that a document has beside its tokens.
    long_conversations: what becomes of conversations that are longer, as the run's file says.
    """

    name: str
    sequence_length: int | None = None
    pad_id: int | None = None
    long_conversations: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def longest(self) -> int | None:
        """Tokens of a document that a sample can hold: of a packed one the last token is a target alone."""
        return None if self.sequence_length is None else self.sequence_length + (self.name == "packed")

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Layout:
        """That of a store, by its manifest."""
        names = ("sequence_length", "pad_id", "long_conversations", "store_columns")
        return cls(manifest["layout"], *(manifest[name] for name in names))
