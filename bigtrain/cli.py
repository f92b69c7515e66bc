"""The commands: parse, call, print."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from bigtrain.errors import BigtrainError, ConfigError, DataError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _app() -> None:
    """Train large models from one file."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The run's file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Like stages.pretrain.optimizer.lr=1e-4", show_default=False),
    ] = None,
) -> None:
    """Run all stages of CONFIG; started again, it continues where it was."""
    from bigtrain.config import load_config
    from bigtrain.launching.spawn import processes_here, spawn

    loaded = load_config(config, overrides or [])
    if "RANK" not in os.environ:
        processes = processes_here(loaded.parallel.processes, loaded.parallel.device)
        if processes > 1:
            command = [sys.executable, "-m", "bigtrain", "run", str(config), *(overrides or [])]
            raise typer.Exit(spawn(command, processes))
    from bigtrain.stages import run_here

    run_here(loaded)


def main() -> None:
    """The `bigtrain` command. Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong."""
    from bigtrain.launching.spawn import tell

    try:
        app()
    except BigtrainError as error:
        code = 2 if isinstance(error, ConfigError | DataError) else 1
        tell(str(error), code)
        sys.exit(code)
    except Exception:  # noqa: BLE001 - told in full, with the rank that it happened on
        rank = os.environ.get("RANK")
        tell((f"rank {rank} failed:\n" if rank else "") + traceback.format_exc(), 1)
        sys.exit(1)
