"""One rank's part in a run, from joining the others to the exports."""

from __future__ import annotations

import os
import time

from bigtrain.config import RunConfig
from bigtrain.config.environment import has_launcher
from bigtrain.errors import ReportedError, ending_of
from bigtrain.observability.events import Finished
from bigtrain.pipeline.finish import finish
from bigtrain.pipeline.session import session
from bigtrain.pipeline.stages import train_stages
from bigtrain.pretrained import quiet
from bigtrain.run_folder import RunFolder


def run_here(config: RunConfig, restart: str | None = None) -> int:
    """Run all stages with this process as one rank: that of the launcher's environment, or the only one.

    restart: a stage to begin anew. Returns the exit code: 0, or 75 if it was asked to stop and has saved.
    """
    quiet()
    folder, since, first = RunFolder(config.folder), time.time(), os.environ.get("RANK", "0") == "0"
    try:
        code = _run(config, folder, restart)
        if first:
            folder.end("preempted" if code else "finished", None, since)
        return code
    except BaseException as error:
        if not has_launcher():  # which knows the rank that failed first
            how, reason = ending_of(error)
            if first:
                folder.end(how, reason, since)
            elif not isinstance(error, ReportedError | RuntimeError):  # torch's own, when another rank is gone
                folder.note(how, reason, rank=int(os.environ["RANK"]))
        raise
    finally:
        folder.leave()


def _run(config: RunConfig, folder: RunFolder, restart: str | None) -> int:
    begun, joined = time.monotonic(), None
    try:
        with session(config, folder, restart) as joined:
            finished = train_stages(config, joined)
        if not finished:
            return os.EX_TEMPFAIL
        if joined.world.rank == 0:  # the group is closed: no rank waits for this one
            finish(config.stages, folder, joined.stream)
            joined.stream.emit(Finished(folder=str(folder.path), seconds=time.monotonic() - begun))
        return 0
    finally:
        if joined is not None:
            joined.stream.close()  # after a failure too: what was reported reaches its readers
