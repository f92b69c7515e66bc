"""Experiment trackers as readers of the stream, through accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigtrain.config.schema import Run
from bigtrain.observability.stream import METRICS, Event

NOT_LOGGED = {"kind", "time", "stage", "step", "steps", "attempt"}


def trackers(config: Run, folder: Path) -> list[Tracker]:
    """A reader for each name in `trackers`."""
    return [Tracker(name, config, folder) for name in config.trackers]


class Tracker:
    """Sends every metric as STAGE/NAME, at the step counted over all stages.

    The project (MLflow: experiment) is `bigtrain`, the run is named as here; where they send it to is set as their own
    documentation says (WANDB_*, MLFLOW_*, TRACKIO_* in the environment). TensorBoard's files are in the run's folder.
    """

    def __init__(self, name: str, config: Run, folder: Path):
        from accelerate import tracking
        from accelerate.state import PartialState

        PartialState()  # accelerate asks it which process is the main one
        self._tracker: tracking.GeneralTracker = {
            "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", logging_dir=folder),
            "wandb": lambda: tracking.WandBTracker("bigtrain", name=config.name, dir=folder),
            "mlflow": lambda: tracking.MLflowTracker("bigtrain", run_name=config.name),
            "trackio": lambda: tracking.TrackioTracker("bigtrain", name=config.name),
        }[name]()
        self._tracker.start()
        self._tracker.store_init_configuration(_flat(config.model_dump(by_alias=True, mode="json")))
        self._before = 0  # steps of the stages that are done
        self._stage = ""
        self._last = 0

    def __call__(self, event: Event) -> None:
        if event["kind"] == "stage_skipped":
            self._before += event["steps"]
        if event["kind"] not in METRICS:
            return
        if event["stage"] != self._stage:
            self._before, self._stage = self._before + self._last, event["stage"]
        self._last = event["step"]
        prefix = f"{event['stage']}/" + ("held_out_" if event["kind"] == "evaluation" else "")
        values = {prefix + name: value for name, value in event.items() if name not in NOT_LOGGED}
        self._tracker.log(values, step=self._before + event["step"])

    def close(self) -> None:
        self._tracker.finish()


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values, stages by name: what every tracker can show as hyper-parameters."""
    if isinstance(values, list):
        names = [item.get("name", i) if isinstance(item, dict) else i for i, item in enumerate(values)]
        values = dict(zip(names, values, strict=True))
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in _flat(value, f"{prefix}.{key}").items()}
    return {} if values is None else {prefix.removeprefix("."): values}
