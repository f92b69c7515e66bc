"""Ask a job that runs elsewhere, through its run's folder."""

from __future__ import annotations

import time
from pathlib import Path

from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.resilience.requests import heard
from bigtrain.run_folder import RunFolder

ANSWER_SECONDS = 15.0  # a job that trains looks for the file twice a second
LOOK_SECONDS = 0.1


def ask_to_save(run_dir: Path) -> Path:
    """Have the job of a run save after its current step; returns the checkpoint once it is complete.

    Raises ConfigError for a folder that holds no run, BigtrainError if no job answers.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} holds no run: it has no config.yaml.")
    request = RunFolder(run_dir).save_request
    request.touch()
    deadline = time.monotonic() + ANSWER_SECONDS
    while request.exists():
        if time.monotonic() > deadline:
            request.unlink(missing_ok=True)
            raise BigtrainError(
                f"no job answers in {run_dir}. Only one that trains does: not before its first step, nor after its end."
            )
        time.sleep(LOOK_SECONDS)
    while heard(request).exists():  # until the step is over
        time.sleep(LOOK_SECONDS)
    begun = max(run_dir.glob("*/checkpoints/step-*"), key=lambda folder: folder.stat().st_mtime_ns)
    while not (begun / "manifest.json").exists():
        time.sleep(LOOK_SECONDS)
    return begun
