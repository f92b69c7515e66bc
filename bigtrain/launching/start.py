"""Start a run from here: as one rank of a launcher that is there already, or by spawning the ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bigtrain.config import RunConfig, lacking, load
from bigtrain.config.environment import FAILURE_FILE, PROCESSES_WHY, has_launcher
from bigtrain.errors import BigtrainError, ConfigError, ReportedError, ending_of
from bigtrain.launching.launchers import Launcher, adopt
from bigtrain.launching.spawn import processes_here, spawn_command
from bigtrain.observability.results import RunResult, read_result
from bigtrain.run_folder import RunFolder
from bigtrain.terminal import say, show


class RunError(BigtrainError):
    """A run did not reach its end. exit_code: 75, it was asked to stop and has saved; else it failed, 2 where its input
    was wrong. result: what it has reached."""

    def __init__(self, text: str, exit_code: int, result: RunResult):
        super().__init__(text)
        self.exit_code = exit_code
        self.result = result


def run(
    config: RunConfig | str | Path, overrides: list[str] | tuple[str, ...] = (), restart: str | None = None
) -> RunResult:
    """Run all stages of a run's file (a path, with `KEY=VALUE` overrides, or a loaded one); returns what it reached.

    `restart` names a stage to begin anew, with all that follow from it. Raises ConfigError for wrong input, RunError
    (with the result so far) for a run that failed or was asked to stop.
    """
    loaded = config if isinstance(config, RunConfig) else load_here(config, overrides)
    uses_deepspeed = any(loaded.parallel_of(stage).engine.startswith("zero") for stage in loaded.stages)
    code = start(loaded, restart, apart=uses_deepspeed)  # DeepSpeed starts once in a process
    result = read_result(loaded)
    if code == os.EX_TEMPFAIL:
        raise RunError(f"the run in {result.folder} was asked to stop, and has saved; run it again.", code, result)
    if code != 0:
        raise RunError(f"the run in {result.folder} failed with exit code {code}; see above.", code, result)
    return result


def load_here(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The run of a file, to be started on this machine. Raises ConfigError; a run that has begun keeps the reason."""
    loaded = load(path, overrides)
    if lines := lacking(loaded):
        error = ConfigError("\n".join(lines))
        if os.environ.get("RANK", "0") == "0" and not has_launcher():
            RunFolder(loaded.run.folder).end(*ending_of(error), time.time())
        raise error
    return loaded.run


def start(config: RunConfig, restart: str | None = None, apart: bool = False) -> int:
    """Run all stages; returns the exit code. Spawned ranks have printed why they failed.

    apart: a run of one process gets one of its own as well; else it is this one.
    """
    launcher = adopt()
    if launcher is not None:
        if FAILURE_FILE not in os.environ:
            os.environ[PROCESSES_WHY] = _why(launcher, config)
        return _here(config, restart)
    folder, since = RunFolder(config.folder), time.time()
    try:
        folder.check(config, restart)
    except ConfigError as error:
        folder.end(*ending_of(error), since)
        raise
    if restart is None and folder.is_finished(config):
        from bigtrain.observability.summary import summary

        say(f"{folder.path} is finished: nothing to do.")
        show(summary(config.stages, folder))
        return 0
    processes, why = processes_here(config.parallel.processes, config.parallel.device)
    if processes == 1 and not apart:
        os.environ[PROCESSES_WHY] = why
        return _here(config, restart)

    def failed(code: int, text: str) -> None:
        lines = text.strip().splitlines()
        reason = f"{lines[0]} {lines[-1]}" if "Traceback (most recent call last)" in text else text
        folder.end("refused" if code == 2 else "failed", reason, since)

    return spawn_command(config, "run", ["--restart", restart] if restart else [], processes, why, failed)


def _why(launcher: Launcher, config: RunConfig) -> str:
    """In words, why there are as many ranks as a launcher has started."""
    asked, size = config.parallel.processes, os.environ["WORLD_SIZE"]
    overridden = f"; parallel.processes: {asked} does not count there" if str(asked) not in ("auto", size) else ""
    return launcher.why + overridden


def _here(config: RunConfig, restart: str | None) -> int:
    from bigtrain.pipeline.run import run_here

    try:
        return run_here(config, restart)
    except ReportedError as told:
        return told.exit_code
