"""What a run did, for a person: read from its folder, so that it can be told again at any time."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from bigtrain.config.schema import Run, Stage
from bigtrain.observability.progress import count, duration, perplexity, plural
from bigtrain.observability.stream import Event, read_metrics
from bigtrain.run_folder import RunFolder


def summary(config: Run, folder: RunFolder) -> str:
    """Stage by stage: what was trained on what, held-out loss before and after, speed, answers; what to try next."""
    rows = read_metrics(folder.path)
    stages = folder.facts()["stages"]
    lines = ["", f"{config.name}: {plural(len(config.stages), 'stage', 'stages')} in {folder.path}"]
    for stage in config.stages:
        lines += _stage(stage, stages[stage.name], [row for row in rows if row["stage"] == stage.name])
    last = config.stages[-1]
    prompt = last.prompts[0] if last.prompts else "Once upon a time"
    shown = prompt.strip().splitlines()[0].replace('"', "'")
    lines += ["", "try next"]
    if last.export:
        lines.append(f'  bigtrain generate {folder.path} "{shown}"')
    if last.evaluate is not None:
        lines.append(f"  bigtrain eval {folder.path}")
    return "\n".join([*lines, f"  less {folder.path / 'metrics.jsonl'}"])


def _stage(stage: Stage, facts: dict[str, Any], rows: list[Event]) -> list[str]:
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    sources = ", ".join(f"{d['source']} ({count(d['documents'])} documents)" for d in facts["data"])
    lines = [
        "",
        f"{stage.name}: {facts['model']} {count(facts['parameters'])} from {facts['from']}, task {stage.task}",
        f"  trained    {count(sum(row['tokens'] for row in steps))} tokens in {len(steps)} steps of {sources}",
        f"  speed      {count(statistics.median(row['tokens_per_second'] for row in steps))} tokens per second, "
        f"{duration(sum(row['step_seconds'] for row in steps))} of steps",
    ]
    if evaluations:
        first, last = evaluations[0]["loss"], evaluations[-1]["loss"]
        lines.append(
            f"  held-out   loss {first:.4f} -> {last:.4f} ({last / first:.0%})   "
            f"perplexity {perplexity(first)} -> {perplexity(last)}   "
            f"accuracy {evaluations[0]['accuracy']:.1%} -> {evaluations[-1]['accuracy']:.1%}"
        )
    if "export" in facts:
        lines.append(f"  export     {facts['export']}")
    for answer in facts.get("answers", []):
        lines += ["  prompt     " + _indented(answer["prompt"]), "  answer     " + _indented(answer["answer"])]
    return lines


def _indented(text: str) -> str:
    return textwrap.indent(text.strip("\n"), " " * 13)[13:]
