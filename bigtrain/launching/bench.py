"""Start `bigtrain bench`: as one rank of a launcher that is there already, or by spawning the ranks."""

from __future__ import annotations

from bigtrain.config import RunConfig
from bigtrain.config.schema import StageConfig
from bigtrain.errors import ConfigError, ReportedError, nearest
from bigtrain.launching.launchers import adopt
from bigtrain.launching.spawn import processes_here, spawn_command


def bench(config: RunConfig, stage: str | None, steps: int) -> int:
    """Time `steps` steps of a stage, None for the first; returns the exit code.

    Raises ConfigError for an unknown stage.
    """
    stages = {known.name: known for known in config.stages}
    name = stage or config.stages[0].name
    if name not in stages:
        raise ConfigError(f"--stage {name}: there is no such stage; {nearest(name, stages)}")
    if adopt() is not None:
        return _here(config, stages[name], steps)
    processes, why = processes_here(config.parallel.processes, config.parallel.device)
    if processes == 1:
        return _here(config, stages[name], steps)
    return spawn_command(config, "bench", ["--stage", name, "--steps", str(steps)], processes, why)


def _here(config: RunConfig, stage: StageConfig, steps: int) -> int:
    from bigtrain.bench import bench_here

    try:
        bench_here(config, stage, steps)
    except ReportedError as told:
        return told.exit_code
    return 0
