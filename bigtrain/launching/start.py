"""Start a run from here: as one rank of a launcher that is there already, or by spawning the ranks."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from bigtrain.config import Run, load, to_yaml
from bigtrain.errors import BigtrainError
from bigtrain.launching.spawn import processes_here, spawn
from bigtrain.run_folder import RunFolder


def run(config: Run | str | Path, overrides: list[str] | tuple[str, ...] = (), restart: str | None = None) -> Path:
    """Run all stages of a run's file (a path, with `KEY=VALUE` overrides, or a loaded one); returns the run's folder.

    `restart` names a stage to begin anew, with all that follow from it. Raises ConfigError for wrong input, and
    BigtrainError for a run that failed.
    """
    loaded = config if isinstance(config, Run) else load(config, overrides, here=True).run
    code = start(loaded, restart)
    if code != 0:
        raise BigtrainError(f"the run in {RunFolder.of(loaded).path} failed with exit code {code}; see above.")
    return RunFolder.of(loaded).path


def start(config: Run, restart: str | None = None) -> int:
    """Run all stages; returns the exit code. Spawned ranks have printed why they failed."""
    if "RANK" in os.environ:
        return _here(config, restart)
    folder = RunFolder.of(config)
    folder.check(config, restart)
    if restart is None and folder.is_finished(config):
        from bigtrain.observability.summary import summary

        print(f"{folder.path} is finished: nothing to do.", summary(config, folder), sep="\n")
        return 0
    processes, why = processes_here(config.parallel.processes, config.parallel.device)
    if processes == 1:
        return _here(config, restart)
    with tempfile.TemporaryDirectory(prefix="bigtrain-") as temporary:
        resolved = Path(temporary) / "config.yaml"
        resolved.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "bigtrain", "run", str(resolved)]
        return spawn(command + (["--restart", restart] if restart else []), processes, why)


def _here(config: Run, restart: str | None) -> int:
    from bigtrain.stages import run_here

    run_here(config, restart)
    return 0
