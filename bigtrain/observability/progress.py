"""The reader that shows a run to the person who started it: one line that renews itself, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import singledispatchmethod
from typing import Any, TextIO

from bigtrain.observability.console import console
from bigtrain.observability.events import (
    CheckpointAhead,
    CheckpointDamaged,
    CheckpointsPlanned,
    Cleaned,
    CleanedTooMuch,
    DropoutDraws,
    Evaluation,
    Event,
    Exporting,
    Finished,
    NetworkMeasured,
    Preempted,
    Prepared,
    Preparing,
    StageSkipped,
    StageStarted,
    Started,
    Step,
    Tokenizing,
    Unusual,
    Verified,
    WeightsConverted,
)
from bigtrain.terminal import guarded, printable

MASTERS = "master weights, moments, gradient accumulation and reduction, loss: fp32"
ABOUT_AN_EVALUATION = ("kind", "time", "attempt", "stage", "step", "seconds", "targets")  # what is no metric
PRECISION_NOTES = {
    "fp32": ["precision: everything in fp32"],
    "bf16": [f"precision: forward and backward in bf16; {MASTERS}"],
    "fp16": [f"precision: forward and backward in fp16 with dynamic loss scaling; {MASTERS}"],
}


class Progress:
    """Prints headings, steps and evaluations; on a terminal the step's line is renewed in place.

    Raises OSError once nothing can be printed any more.
    """

    name = "the progress on standard output"

    def __init__(self, file: TextIO | None = None, log_seconds: float = 10.0):
        """file: to print on; None for standard output."""
        self._out = guarded(file or sys.stdout)
        self._console = console(self._out)
        self._seconds = 0.2 if self._console.is_terminal else log_seconds
        self._shown = 0.0
        self._steps_left_at: tuple[int, float] | None = None
        self._held_out: dict[str, dict[str, str]] = {}
        self._open_line = False

    def __call__(self, event: Event) -> None:
        self._show(event)
        if self._out.failure is not None:
            raise self._out.failure

    @singledispatchmethod
    def _show(self, event: Event) -> None:
        """Print what a person wants to know of an event; nothing of the kinds that are not among these."""

    def _print(self, text: str) -> None:
        if self._open_line:
            self._out.write("\n")
            self._open_line = False
        self._console.print(text)

    @_show.register
    def _(self, event: Started) -> None:
        self._print(
            f"bigtrain {event.version} · {event.folder} · {plural(event.world_size, 'process', 'processes')}"
            f" · {event.engine} · {event.precision} · {event.device}"
        )
        for reason in (*event.chosen, f"attention: {event.attention}", *PRECISION_NOTES[event.precision]):
            self._print(f"           {reason}")

    @_show.register
    def _(self, event: Unusual) -> None:
        self._print(f"{'warning':<10} {event.text}")

    @_show.register
    def _(self, event: DropoutDraws) -> None:
        self._print(f"           dropout: {event.text}")

    @_show.register
    def _(self, event: NetworkMeasured) -> None:
        self._print(
            f"           network: all-reduce {event.bus_bytes_per_second / 1e9:.2g} GB/s (bus), "
            f"{event.latency_seconds * 1e6:.0f} us over {plural(event.processes, 'process', 'processes')} "
            f"on {plural(event.hosts, 'host', 'hosts')}"
        )

    def _renew(self, line: str) -> None:
        """Show a line in the place of the one before, where there is a terminal."""
        if self._console.is_terminal:
            self._out.write(f"\r\x1b[K{printable(line)[: self._console.width - 1]}")
            self._out.flush()
            self._open_line = True
        else:
            self._print(line)

    @_show.register
    def _(self, event: Preparing) -> None:
        self._print(f"{'prepare':<10} {event.what}")

    @_show.register
    def _(self, event: Tokenizing) -> None:
        now = time.monotonic()
        if now - self._shown < self._seconds:
            return
        self._shown = now
        expected, left = event.expected_bytes, event.seconds_left
        of = "" if expected is None else f" of about {expected / 1e6:.1f}"
        self._renew(
            f"  {event.source} ({event.documents_are}): {event.documents} documents, "
            f"{event.text_bytes / 1e6:.1f}{of} MB of text  "
            f"{count(event.documents_per_second)} documents/s  {event.text_bytes_per_second / 1e6:.1f} MB/s  "
            f"{count(event.tokens_per_second)} tok/s" + ("" if left is None else f"  {duration(left)} left")
        )

    @_show.register
    def _(self, event: Cleaned) -> None:
        training = event.documents - event.held_out
        share = event.characters_kept / event.characters if event.characters else 1.0
        self._print(
            f"  cleaned: {event.kept} of {plural(training, 'training document', 'training documents')} stay, "
            f"{share:.1%} of the characters"
        )
        for what, numbers in (("changed", event.changed), ("redacted", event.redacted), ("dropped", event.dropped)):
            told = ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
            if told:
                self._print(f"           {what}: {told}")
        self._print(f"           examples in {event.folder}/report.json")

    @_show.register
    def _(self, event: CleanedTooMuch) -> None:
        self._print(f"  warning: {event.text} What was dropped, and why, is in {event.folder}/dropped.jsonl.")

    @_show.register
    def _(self, event: Prepared) -> None:
        lost = dropped(event.counts)
        unread = ", ".join(
            f"{name} ({plural(number, 'row', 'rows')})" for name, number in event.counts.get("unread", {}).items()
        )
        hidden = plural(event.counts.get("hidden", 0), "file or folder", "files or folders")
        self._print(
            f"  {contents(event.counts)}"
            + (f"; dropped or cut: {lost}" if lost else "")
            + (f"; not used: {unread}" if unread else "")
            + (f"; {hidden} whose names begin with _ or . not read" if event.counts.get("hidden") else "")
        )

    @_show.register
    def _(self, event: Verified) -> None:
        self._print(f"  {event.folder}: {event.bytes / 1e6:.1f} MB read, every checksum is right")

    @_show.register
    def _(self, event: WeightsConverted) -> None:
        self._print(f"{'weights':<10} converted to {event.folder} by one process for all, since {event.reason}")

    @_show.register
    def _(self, event: StageStarted) -> None:
        resumed = f", resumed at step {event.done}" if event.done else ""
        part = f" ({count(event.trained)} train)" if event.trained < event.parameters else ""
        self._print(
            f"{event.stage:<10} {event.model} {count(event.parameters)}{part}, from {event.origin} · "
            f"{event.batch} x {event.sequence_length} tokens a step, {event.steps} steps{resumed}"
        )
        if event.logits == "whole":
            self._print(f"           logits: all at once; {event.model} is none of the models that need only its head")
        self._steps_left_at = None

    @_show.register
    def _(self, event: CheckpointsPlanned) -> None:
        room = event.free_bytes // event.bytes
        short = event.keep + 1 > room
        self._print(
            f"           checkpoints: {event.bytes / 1e6:,.1f} MB each, {event.keep} of them kept; "
            f"{event.free_bytes / 1e9:,.1f} GB free"
            + (f", room for {room} only: `checkpoint.keep` and the one being written need {event.keep + 1}" * short)
        )

    @_show.register
    def _(self, event: CheckpointDamaged) -> None:
        self._print(f"{'damaged':<10} {event.reason}. Set aside as {event.set_aside}.")

    @_show.register
    def _(self, event: CheckpointAhead) -> None:
        self._print(f"{'ahead':<10} of step {event.done}, from which the run goes on: kept as {event.set_aside}")

    @_show.register
    def _(self, event: StageSkipped) -> None:
        self._print(f"{event.stage:<10} is finished ({event.steps} steps)")

    @_show.register
    def _(self, event: Step) -> None:
        now = time.monotonic()
        done, steps = event.step, event.steps
        if self._steps_left_at is None:
            self._steps_left_at = (done, now)
        if now - self._shown < self._seconds and done < steps:
            return
        self._shown = now
        first, since = self._steps_left_at
        left = duration((now - since) / (done - first) * (steps - done)) if done > first else "?"
        line = (
            f"  step {done}/{steps}  loss {event.loss:.4f}  grad {event.grad_norm:.3f}  lr {event.lr:.2e}  "
            f"{count(event.tokens_per_second)} tok/s  {event.memory_bytes / 2**30:.2f} GiB  {left} left"
        )
        self._renew(line)

    @_show.register
    def _(self, event: Evaluation) -> None:
        now = dict(shown_metrics(event.metrics)[:2])
        start = self._held_out.setdefault(event.stage, now)
        told = [
            f"{name} {value if start[name] == value else f'{start[name]} -> {value}'}" for name, value in now.items()
        ]
        self._print(f"  held-out   {'   '.join(told)}   (step {event.step})")

    @_show.register
    def _(self, event: Preempted) -> None:
        self._print(f"asked to stop: saved at step {event.step} of {event.stage}; start it again to go on")

    @_show.register
    def _(self, event: Exporting) -> None:
        self._print(f"{'export':<10} {event.folder}")

    @_show.register
    def _(self, event: Finished) -> None:
        self._print(f"done in {duration(event.seconds)}   {event.folder}")


def contents(metadata: Mapping[str, Any]) -> str:
    """What a token store holds, from its metadata."""
    fill = f", {metadata['fill']:.1%} full" if "fill" in metadata else ""
    return (
        f"{metadata['source']} ({metadata['documents_are']}): {metadata['documents']:,} documents, "
        f"{count(metadata['tokens'])} tokens, {metadata['sequences']:,} sequences{fill}"
    )


def dropped(metadata: Mapping[str, Any]) -> str:
    """What of its rows and tokens a token store has left out or cut, why, and where the first of each stands, from its
    metadata; empty if nothing."""

    def told(number: int, what: str, reason: str) -> str:
        where = metadata["examples"].get(reason)
        return f"{number:,} {what}" + (f" (first: {where})" if where else "")

    lost = [told(number, reason, reason) for reason, number in metadata["dropped"].items()]
    lost += [told(number, f"parts of used rows {reason}", reason) for reason, number in metadata["parts"].items()]
    if split := metadata.get("split"):
        lost.append(f"{plural(split, 'conversation', 'conversations')} split to sequence_length")
    if metadata["cut"]:
        what = "cut to sequence_length"
        lost.append(told(metadata["cut"], what, what) + f", {count(metadata['cut_tokens'])} tokens")
    if metadata["left_over"]:
        lost.append(f"{metadata['left_over']:,} tokens behind the last whole sequence")
    return ", ".join(lost)


def shown_metrics(event: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value to be read) of the metrics of an evaluation."""
    forms = {"loss": ".4f", "perplexity": ".4g", "accuracy": ".1%"}
    named = [(name, value) for name, value in event.items() if name not in ABOUT_AN_EVALUATION]
    return [(name, format(value, forms.get(name, ".4g"))) for name, value in named if isinstance(value, int | float)]


def count(number: float) -> str:
    """A number to be read: 1234567 -> 1.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """3723 -> 1h02m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def plural(number: int, one: str, many: str) -> str:
    """2, "process", "processes" -> 2 processes."""
    return f"{number} {one if number == 1 else many}"
