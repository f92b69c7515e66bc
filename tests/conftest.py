"""Which tests a worker of `pytest -n` takes together, and what the processes that they fork have imported."""

import multiprocessing

from xdist.scheduler import LoadFileScheduling

multiprocessing.set_forkserver_preload(["tests.preloaded"])

# These share pools of ranks.
POOLS = {f"tests/parity/test_{name}.py" for name in ("loop", "precision", "state", "steps", "tasks")}


class Scheduling(LoadFileScheduling):
    """A file each, and POOLS as one."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "pools" if file in POOLS else file


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)
