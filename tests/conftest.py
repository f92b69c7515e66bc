"""Which tests a worker of `pytest -n` takes together."""

import pytest


def pytest_collection_modifyitems(items):
    """A file each; those that share pools of ranks are one."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("pools" if "pools" in item.fixturenames else str(item.path)))
