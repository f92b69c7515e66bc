"""What a run has reached, as plain values for a program: read from its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bigtrain.config.schema import RunConfig
from bigtrain.observability.stream import Row, read_metrics
from bigtrain.run_folder import RunFolder

NO_METRIC = ("kind", "time", "attempt", "stage", "step", "seconds", "loss")  # of an evaluation
LAST_STEP = ("tokens", "targets", "grad_norm", "lr", "tokens_per_second")


@dataclass(frozen=True)
class StageResult:
    """steps: optimizer steps done. finished: whether these are all of them.

    loss: of the last step, nats per target; held_out_loss: of the last evaluation; None where there was none.
    metrics: other values of the last step (`grad_norm`, `lr`, `tokens_per_second`, ...), and of the last evaluation
    with `held_out_` before their names (`held_out_perplexity`, `held_out_accuracy`, `held_out_targets`, ...).
    export: the Hugging Face folder, None if none was written.
    """

    name: str
    steps: int = 0
    finished: bool = False
    loss: float | None = None
    held_out_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    export: Path | None = None


@dataclass(frozen=True)
class RunResult:
    """folder: of the run. stages: by name, in the order of the run's file; those that have not begun too."""

    folder: Path
    stages: dict[str, StageResult]

    @property
    def finished(self) -> bool:
        return all(stage.finished for stage in self.stages.values())


def read_result(config: RunConfig) -> RunResult:
    """What the run of this file has reached; it may have failed, be at work, or not have begun."""
    folder = RunFolder(config.folder)
    rows = read_metrics(folder.path) if (folder.path / "metrics.jsonl").is_file() else []
    metadata = folder.metadata().get("stages", {})
    stages = {
        stage.name: _stage(
            stage.name, metadata.get(stage.name, {}), [row for row in rows if row["stage"] == stage.name]
        )
        for stage in config.stages
    }
    return RunResult(folder.path, stages)


def _stage(name: str, metadata: Row, rows: list[Row]) -> StageResult:
    step = next((row for row in reversed(rows) if row["kind"] == "step"), {})
    evaluation = next((row for row in reversed(rows) if row["kind"] == "evaluation"), {})
    metrics = {key: step[key] for key in LAST_STEP if key in step}
    metrics |= {f"held_out_{key}": value for key, value in evaluation.items() if key not in NO_METRIC}
    return StageResult(
        name,
        step.get("step", 0),
        bool(metadata.get("finished")),
        step.get("loss"),
        evaluation.get("loss"),
        metrics,
        Path(metadata["export"]) if "export" in metadata else None,
    )
