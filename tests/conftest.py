"""The order in which the workers of `pytest -n` take files, and what the processes that they fork have imported."""

import multiprocessing
import os

import pytest
from xdist.scheduler import LoadFileScheduling

multiprocessing.set_forkserver_preload(["tests.preloaded"])
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process that is started would compile the package again

# Files that take the longest, longest first: the last to be begun is to be short. Others follow in pytest's order.
FIRST = (
    "tests/parity/test_steps.py",
    "tests/parity/test_state.py",
    "tests/parity/test_loop.py",
    "tests/parity/test_precision.py",
    "tests/parity/test_slots.py",
    "tests/parity/test_tasks.py",
    "tests/e2e/test_launch.py",
    "tests/recovery/test_elastic.py",
    "tests/e2e/test_launchers.py",
    "tests/e2e/test_run.py",
    "tests/e2e/test_pretrained.py",
)


def pytest_xdist_make_scheduler(config, log):
    return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    places = {file: place for place, file in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(FIRST)))
