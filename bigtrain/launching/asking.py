"""Ask a job that runs elsewhere, through its run's folder."""

from __future__ import annotations

import time
from pathlib import Path

from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.resilience.requests import heard
from bigtrain.run_folder import RunFolder

ANSWER_SECONDS = 15.0  # a job that trains looks for the file twice a second
UNSEEN_SECONDS = 3.0  # where no job is seen to hold the folder: some disks do not show other hosts' locks
SILENCE_SECONDS = 60.0  # and renews the answer's time as often; a shared disk may show it late
LOOK_SECONDS = 0.1


def ask_to_save(run_dir: Path) -> Path:
    """Have the job of a run save after its current step; returns the checkpoint once it is complete.

    Raises ConfigError for a folder that holds no run, BigtrainError if no job answers or it ends before it has saved.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} holds no run: it has no config.yaml.")
    folder = RunFolder(run_dir)
    request = folder.save_request
    answer = heard(request)
    answer.unlink(missing_ok=True)
    request.touch()
    deadline = time.monotonic() + (ANSWER_SECONDS if folder.is_at_work() else UNSEEN_SECONDS)
    while request.exists():
        if time.monotonic() > deadline:
            request.unlink(missing_ok=True)
            raise BigtrainError(
                f"no job answers in {run_dir}. Only one that trains does: not before its first step, nor after its end."
            )
        time.sleep(LOOK_SECONDS)
    try:
        saved = _awaited(answer)
    except FileNotFoundError:
        raise BigtrainError(f"the job of {run_dir} ended before it had saved.") from None
    answer.unlink()
    if not saved:
        raise BigtrainError(
            f"the job of {run_dir} heard that it should save, and has shown no sign of life for "
            f"{SILENCE_SECONDS:.0f} s since: it was killed, or its host cannot be reached."
        )
    return Path(saved)


def _awaited(answer: Path) -> str:
    """What is written into a file; empty if its time stands still. Raises FileNotFoundError once it is gone."""
    renewed, seen = 0.0, time.monotonic()
    while not (text := answer.read_text(encoding="utf-8")):
        if (now := answer.stat().st_mtime) != renewed:
            renewed, seen = now, time.monotonic()
        if time.monotonic() - seen > SILENCE_SECONDS:
            break
        time.sleep(LOOK_SECONDS)
    return text
