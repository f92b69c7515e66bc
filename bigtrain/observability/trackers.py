"""Experiment trackers as readers of the stream, through accelerate."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from bigtrain.config.files import flat
from bigtrain.masking import masked_values
from bigtrain.observability.events import Evaluation, Event, Metric, StageSkipped

FINISH_SECONDS = 120.0  # that sending the rest may take
# For a server that does not answer, in seconds; by their own defaults training would wait for minutes. What a user has
# set wins.
PATIENCE = {"WANDB_INIT_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
NOT_LOGGED = {"kind", "stage", "step", "steps"}


class Tracker:
    """Sends every metric as STAGE/NAME, at the step counted over all stages; starts with its first event.

    The project (MLflow: experiment) is `bigtrain`, the run is named as here; where they send it to is set as their own
    documentation says (WANDB_*, MLFLOW_*, TRACKIO_* in the environment). TensorBoard's files are in the run's folder.
    """

    def __init__(self, tracker: str, run: str, settings: dict[str, Any], folder: Path):
        """run: its name. settings: the hyper-parameters to show, as the run's file has them."""
        self.name = f"the tracker {tracker}"
        self._kind, self._run, self._settings, self._folder = tracker, run, settings, folder
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
        name = self._run
        tracker: tracking.GeneralTracker = {
            "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", logging_dir=self._folder),
            "wandb": lambda: tracking.WandBTracker("bigtrain", name=name, dir=self._folder),
            "mlflow": lambda: tracking.MLflowTracker("bigtrain", run_name=name),
            "trackio": lambda: tracking.TrackioTracker("bigtrain", name=name),
        }[self._kind]()
        tracker.start()
        self._tracker = tracker
        plain = {key: value for key, value in flat(masked_values(self._settings)) if value not in (None, {}, [])}
        tracker.store_init_configuration(plain)  # what every tracker can show

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
