"""What can happen in a run, a class for each kind of event. A row of events.jsonl or metrics.jsonl has its fields.

Fields are plain numbers, texts, lists and dicts. Steps are counted from 1; a `step` or `done` of 0 is before the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from bigtrain.masking import masked_values


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of events.jsonl, where `kind` names the class."""

    kind: ClassVar[str]

    def row(self) -> dict[str, Any]:
        """The kind and the fields, as they are written."""
        return {"kind": self.kind} | {field.name: getattr(self, field.name) for field in fields(self)}

    def masked(self) -> Self:
        """The same without secrets in its texts."""
        return replace(self, **{field.name: masked_values(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Metric(Event):
    """A line of metrics.jsonl: numbers of a stage after a step, which hold no secrets."""

    stage: str
    step: int

    def masked(self) -> Self:
        return self


@dataclass(frozen=True, kw_only=True)
class Step(Metric):
    """An optimizer step. steps: of the stage. loss: mean over the targets, in nats where they are tokens. tokens:
    positions of the global batch; targets: the task's weight of it. grad_norm: before clipping. lr: learning rate.
    memory_bytes: peak of this process, on a GPU of its allocator."""

    kind: ClassVar[str] = "step"
    lr: float
    tokens: int
    steps: int
    loss: float
    grad_norm: float
    targets: int
    step_seconds: float
    tokens_per_second: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluation(Metric):
    """An evaluation on held-out samples. metrics: of the task, each a field of the row; `loss` is always among them."""

    kind: ClassVar[str] = "evaluation"
    metrics: dict[str, float]
    seconds: float

    def row(self) -> dict[str, Any]:
        row = super().row()
        return row | row.pop("metrics")


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """An attempt has begun. chosen: what was decided for the user and why, in words."""

    kind: ClassVar[str] = "started"
    version: str
    folder: str
    attention: str
    chosen: Sequence[str]
    world_size: int
    engine: str
    precision: str
    device: str


@dataclass(frozen=True, kw_only=True)
class NetworkMeasured(Event):
    """How fast the ranks talk to each other: see `distributed.network.Network`."""

    kind: ClassVar[str] = "network"
    bus_bytes_per_second: float
    latency_seconds: float
    processes: int
    hosts: int


@dataclass(frozen=True, kw_only=True)
class Unusual(Event):
    """A value of the run's file that is allowed and probably not meant, in words."""

    kind: ClassVar[str] = "unusual"
    text: str


@dataclass(frozen=True, kw_only=True)
class Preparing(Event):
    """what: in words, is looked for, and made if it is not there."""

    kind: ClassVar[str] = "preparing"
    what: str


@dataclass(frozen=True, kw_only=True)
class Tokenizing(Event):
    """How far all processes together are with a store; the rates are those since this process began. expected_bytes: of
    the whole text, None if not known. seconds_left: an estimate."""

    kind: ClassVar[str] = "tokenizing"
    source: str
    documents_are: str
    text_bytes: int
    documents: int
    tokens: int
    text_bytes_per_second: float
    documents_per_second: float
    tokens_per_second: float
    expected_bytes: int | None
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Cleaned(Event):
    """What `clean` has decided about a stage's documents. characters: of all, characters_kept: of the `kept` ones.
    changed, redacted, dropped: documents by step, kind and reason. folder: of the report."""

    kind: ClassVar[str] = "cleaned"
    stage: str
    folder: str
    documents: int
    held_out: int
    kept: int
    characters: int
    characters_kept: int
    warning: str | None
    changed: dict[str, int]
    redacted: dict[str, int]
    dropped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class CleanedTooMuch(Event):
    """A warning, in words, about documents that `clean` has dropped."""

    kind: ClassVar[str] = "cleaned_too_much"
    stage: str
    text: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class Prepared(Event):
    """A store is there. counts: as `data.prepare.counts` gives them, each a field of the row."""

    kind: ClassVar[str] = "prepared"
    stage: str
    folder: str
    counts: dict[str, Any]

    def row(self) -> dict[str, Any]:
        row = super().row()
        return row | row.pop("counts")


@dataclass(frozen=True, kw_only=True)
class Verified(Event):
    """The checksums of a store of so many bytes are right."""

    kind: ClassVar[str] = "verified"
    folder: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class WeightsConverted(Event):
    """One process has written a pretrained model's weights to `folder` for all, and why."""

    kind: ClassVar[str] = "weights_converted"
    reason: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class StageStarted(Event):
    """A stage begins, or goes on after `done` steps. batch: sequences of a step. sequences: of all steps together.
    origin: of its weights, in words; `from` in the row. trained: of the parameters, those that train.
    logits: whether the engine takes them whole or in chunks; None for a task over rows."""

    kind: ClassVar[str] = "stage_started"
    stage: str
    done: int
    batch: int
    origin: str
    model: str
    parameters: int
    trained: int
    logits: str | None
    engine: str
    steps: int
    sequences: int
    sequence_length: int

    def row(self) -> dict[str, Any]:
        return {"from" if name == "origin" else name: value for name, value in super().row().items()}


@dataclass(frozen=True, kw_only=True)
class StageSkipped(Event):
    """A stage of so many steps was finished before."""

    kind: ClassVar[str] = "stage_skipped"
    stage: str
    steps: int


@dataclass(frozen=True, kw_only=True)
class DropoutDraws(Event):
    """On what a stage's dropout depends, in words. probabilities: by their key in the model's configuration, each a
    field of the row."""

    kind: ClassVar[str] = "dropout"
    stage: str
    text: str
    probabilities: dict[str, float]

    def row(self) -> dict[str, Any]:
        row = super().row()
        return row | row.pop("probabilities")


@dataclass(frozen=True, kw_only=True)
class CheckpointsPlanned(Event):
    """bytes: of a whole checkpoint; free_bytes: of the disk; keep: how many stay."""

    kind: ClassVar[str] = "checkpoints_planned"
    bytes: int
    free_bytes: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete. stalled_seconds: that training stood still; seconds: of the whole save."""

    kind: ClassVar[str] = "checkpoint_saved"
    stage: str
    step: int
    folder: str
    stalled_seconds: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointDamaged(Event):
    """A checkpoint that cannot be read was renamed to `set_aside`."""

    kind: ClassVar[str] = "checkpoint_damaged"
    reason: str
    set_aside: str


@dataclass(frozen=True, kw_only=True)
class CheckpointAhead(Event):
    """A checkpoint of a later step than `done`, from which the stage goes on, was renamed to `set_aside`."""

    kind: ClassVar[str] = "checkpoint_ahead"
    stage: str
    done: int
    set_aside: str


@dataclass(frozen=True, kw_only=True)
class Profiled(Event):
    """A trace was written."""

    kind: ClassVar[str] = "profiled"
    stage: str
    step: int
    file: str


@dataclass(frozen=True, kw_only=True)
class Preempted(Event):
    """The run was asked to stop, and has saved after `step` steps of the stage."""

    kind: ClassVar[str] = "preempted"
    stage: str
    step: int


@dataclass(frozen=True, kw_only=True)
class Exporting(Event):
    """An export of a stage to `folder` begins."""

    kind: ClassVar[str] = "exporting"
    stage: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """All is done, after so many seconds of this attempt."""

    kind: ClassVar[str] = "finished"
    folder: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ReportingFailed(Event):
    """`what` only reports, has failed for this reason, and was dropped."""

    kind: ClassVar[str] = "reporting_failed"
    what: str
    reason: str
