"""What a run did, for a person: read from its folder, so that it can be told again at any time."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from bigtrain.config.schema import StageConfig
from bigtrain.observability.events import Event, Finished
from bigtrain.observability.progress import count, duration, plural, shown_metrics
from bigtrain.observability.stream import Row, read_metrics
from bigtrain.run_folder import RunFolder
from bigtrain.terminal import show

SLOW = 3  # times the median, from which on a step is mentioned


class Summary:
    """The reader that prints the summary once a run is finished."""

    name = "the summary"

    def __init__(self, stages: Sequence[StageConfig], folder: RunFolder):
        self._stages, self._folder = stages, folder

    def __call__(self, event: Event) -> None:
        if isinstance(event, Finished):
            show(summary(self._stages, self._folder))


def summary(stages: Sequence[StageConfig], folder: RunFolder) -> str:
    """Stage by stage: what was trained on what, held-out loss before and after, speed, answers; what to try next."""
    rows = read_metrics(folder.path)
    known = folder.metadata()["stages"]
    lines = ["", f"{folder.path.name}: {plural(len(stages), 'stage', 'stages')} in {folder.path}"]
    for stage in stages:
        lines += _stage(stage, known[stage.name], [row for row in rows if row["stage"] == stage.name])
    last = stages[-1]
    prompt = last.prompts[0] if last.prompts else "Once upon a time"
    shown = prompt.strip().splitlines()[0].replace('"', "'")
    lines += ["", "try next"]
    if last.export and last.task.generates:
        lines.append(f'  bigtrain generate {folder.path} "{shown}"')
    if last.evaluate is not None:
        lines.append(f"  bigtrain eval {folder.path}")
    return "\n".join([*lines, f"  less {folder.path / 'metrics.jsonl'}"])


def _stage(stage: StageConfig, metadata: dict[str, Any], rows: list[Row]) -> list[str]:
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    lines = [
        "",
        f"{stage.name}: {metadata['model']} {count(metadata['parameters'])} from {metadata['from']}, "
        f"task {stage.task.name}",
        *_steps(steps, metadata),
    ]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        change = _change(first["loss"], last["loss"])
        both = zip(shown_metrics(first), shown_metrics(last), strict=True)
        told = [f"{name} {a} -> {b}{change if name == 'loss' else ''}" for (name, a), (_, b) in both]
        lines.append(f"  held-out   {'   '.join(told)}")
    if "export" in metadata:
        lines.append(f"  export     {metadata['export']}")
    for answer in metadata.get("answers", []):
        lines += ["  prompt     " + _indented(answer["prompt"]), "  answer     " + _indented(answer["answer"])]
    return lines


def _steps(steps: list[Row], metadata: dict[str, Any]) -> list[str]:
    """What was trained how fast, from the rows of the steps that are known."""
    sources = ", ".join(f"{d['source']} ({count(d['documents'])} documents)" for d in metadata["data"])
    if not steps:
        return [f"  trained    {metadata['steps']} steps of {sources}; metrics.jsonl has no row of them"]
    positions, targets = (count(sum(row[name] for row in steps)) for name in ("tokens", "targets"))
    seconds = [row["step_seconds"] for row in steps]
    return [
        f"  trained    {positions} positions, {targets} of them supervised targets, in {len(steps)} steps of {sources}",
        f"  speed      {count(statistics.median(row['tokens_per_second'] for row in steps))} tokens per second, "
        f"{duration(sum(seconds))} of steps",
        *_slow(steps),
    ]


def _slow(steps: list[Row]) -> list[str]:
    """A line about the steps that took far longer than the median; none if there are none."""
    median = statistics.median(row["step_seconds"] for row in steps)
    slow = [row for row in steps if row["step_seconds"] > SLOW * median]
    if not slow:
        return []
    slowest = max(slow, key=lambda row: row["step_seconds"])
    return [
        f"  slow       {plural(len(slow), 'step', 'steps')} took more than {SLOW} times the median of {median:.3g} s; "
        f"the slowest {slowest['step_seconds']:.3g} s, at step {slowest['step']}"
    ]


def _change(before: float, after: float) -> str:
    if not before:
        return ""
    change = 100 * (after / before - 1)
    return f" ({change:+.{0 if abs(change) >= 10 else 1}f} %)"


def _indented(text: str) -> str:
    return textwrap.indent(text.strip("\n"), " " * 13)[13:]
