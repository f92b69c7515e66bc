"""Tasks, one file each: how rows become samples, the model's inputs, the loss as sums, the metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from bigtrain.config.core import Component, choice

if TYPE_CHECKING:
    from torch import Tensor

    from bigtrain.data.files import Row
    from bigtrain.data.types import Answer, Layout


class LongDocuments(NamedTuple):
    """What becomes of conversations that are longer than a sequence: cut, split or drop. max_cut_answers: the part of a
    source's answers that may lose their end."""

    way: Literal["cut", "split", "drop"]
    max_cut_answers: float


class Task(Component):
    """A task never calls the model; the engine does, with what `inputs` gives.

    columns: the sets of columns that it can read; the first one that a row has is taken, a name that ends in ? may be
    missing. layout: of its samples, `windows`, `packed` or `rows`. store_columns: names and dtypes of what a document
    has beside its tokens. encoding: name and version of what `encode` does; a new version makes new stores. model_kind:
    which model and head it needs (`bigtrain.models.kinds`). sums_over: what its sums add up over; of `tokens` the
    engine may compute logits and sums some tokens at a time, of `rows` it takes whole rows. chats: whether a model
    learns to answer through the tokenizer's chat template. generates: whether it predicts tokens.
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]]
    layout: ClassVar[Literal["windows", "packed", "rows"]]
    store_columns: ClassVar[Mapping[str, str]] = MappingProxyType({})
    encoding: ClassVar[str]
    model_kind: ClassVar[str]
    sums_over: ClassVar[Literal["tokens", "rows"]]
    chats: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    @property
    def model_values(self) -> Mapping[str, Any]:
        """What of the model's configuration follows from the task, like its labels."""
        return {}

    @property
    def long_documents(self) -> LongDocuments | None:
        """None where a document may have any length, or is cut without more ado."""
        return None

    @abstractmethod
    def encode(self, rows: list[Row], tokenizer: Any, layout: Layout | None = None) -> list[Answer]:
        """One answer for each row: its documents, none if there is nothing to learn, Unusable, or LeftOut.

        layout: how long a document may be; None: any length. Raises DataError if the tokenizer lacks a special token
        that the encoding needs.
        """

    @abstractmethod
    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments for the model's forward."""

    @abstractmethod
    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """What the loss is divided by, of these rows: a scalar that adds up over rows and ranks."""

    @abstractmethod
    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What each of `batch["targets"]` adds to `loss`, in one row, fp32; 0 where nothing is to be learned."""

    @abstractmethod
    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        """Tensors of fixed shapes that add up over tokens, rows and ranks: `loss` (a scalar, differentiable), and
        outside training all that `metrics` needs.

        logits: (..., classes) for the tensors of `batch`, (...): whole rows, or some tokens of them.
        """

    @abstractmethod
    def metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """`loss`, `targets` (what it was divided by) and other numbers, from sums (float64) over all that was
        evaluated."""


def parse_task(value: Any) -> Task:
    """The task of a value as the run's file has it. Raises ValidationError."""
    return choice("bigtrain.tasks:Task").parse(value)


def taught_to_chat(names: Iterable[str]) -> bool:
    """Whether one of the tasks of these names teaches to answer through a chat template."""
    known = choice("bigtrain.tasks:Task")
    return any(task.chats for name in names if (task := known.of(name)) is not None)
