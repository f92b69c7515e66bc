"""Pools of ranks, one for each world size, started once for all parity tests."""

import pytest

from bigtrain.testing import Ranks


@pytest.fixture(scope="session")
def pools():
    """pools(size) gives the pool of that many ranks."""
    started = {}

    def pool(size):
        if size not in started:
            started[size] = Ranks(size).__enter__()
        return started[size]

    yield pool
    for ranks in started.values():
        ranks.__exit__()
