"""Experiment trackers as readers of the stream, through accelerate."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from bigtrain.config.schema import RunConfig
from bigtrain.masking import masked_values
from bigtrain.observability.events import Evaluation, Event, Metric, StageSkipped

FINISH_SECONDS = 120.0  # that sending the rest may take
# For a server that does not answer, in seconds; by their own defaults training would wait for minutes. What a user has
# set wins.
PATIENCE = {"WANDB_INIT_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
NOT_LOGGED = {"kind", "stage", "step", "steps"}


def trackers(config: RunConfig, folder: Path) -> list[Tracker]:
    """A reader for each name in `trackers`."""
    return [Tracker(name, config, folder) for name in config.trackers]


class Tracker:
    """Sends every metric as STAGE/NAME, at the step counted over all stages; starts with its first event.

    The project (MLflow: experiment) is `bigtrain`, the run is named as here; where they send it to is set as their own
    documentation says (WANDB_*, MLFLOW_*, TRACKIO_* in the environment). TensorBoard's files are in the run's folder.
    """

    def __init__(self, tracker: str, config: RunConfig, folder: Path):
        self.name = f"the tracker {tracker}"
        self._kind, self._config, self._folder = tracker, config, folder
        self._tracker: Any = None
        self._before = 0  # steps of the stages that are done
        self._stage = ""
        self._last = 0

    def _start(self) -> None:
        from accelerate import tracking
        from accelerate.state import PartialState

        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        PartialState()  # accelerate asks it which process is the main one
        name = self._config.name
        tracker: tracking.GeneralTracker = {
            "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", logging_dir=self._folder),
            "wandb": lambda: tracking.WandBTracker("bigtrain", name=name, dir=self._folder),
            "mlflow": lambda: tracking.MLflowTracker("bigtrain", run_name=name),
            "trackio": lambda: tracking.TrackioTracker("bigtrain", name=name),
        }[self._kind]()
        tracker.start()
        self._tracker = tracker
        values = masked_values(self._config.model_dump(by_alias=True, mode="json"))
        tracker.store_init_configuration(_flat(values))

    def __call__(self, event: Event) -> None:
        if self._tracker is None:
            self._start()
        if isinstance(event, StageSkipped):
            self._before += event.steps
        if not isinstance(event, Metric):
            return
        if event.stage != self._stage:
            self._before, self._stage = self._before + self._last, event.stage
        self._last = event.step
        prefix = f"{event.stage}/" + ("held_out_" if isinstance(event, Evaluation) else "")
        values = {prefix + name: value for name, value in event.row().items() if name not in NOT_LOGGED}
        self._tracker.log(values, step=self._before + event.step)

    def close(self) -> None:
        """Let it send what is left. Raises TimeoutError if that takes longer than FINISH_SECONDS."""
        if self._tracker is None:
            return
        failed: list[BaseException] = []

        def finish() -> None:
            try:
                self._tracker.finish()
            except BaseException as error:  # noqa: BLE001 - raised below
                failed.append(error)

        thread = threading.Thread(target=finish, name=self.name, daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            raise TimeoutError(f"it has not sent everything within {FINISH_SECONDS:g} s")
        if failed:
            raise failed[0]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values, stages by name: what every tracker can show as hyper-parameters."""
    if isinstance(values, list):
        names = [item.get("name", i) if isinstance(item, dict) else i for i, item in enumerate(values)]
        values = dict(zip(names, values, strict=True))
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in _flat(value, f"{prefix}.{key}").items()}
    return {} if values is None else {prefix.removeprefix("."): values}
