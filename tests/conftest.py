"""What all tests share: hypothesis is deterministic, and a blocking call on the event loop fails."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """Calls that block, made on an event loop from our own code, raise."""
    with blockbuster_ctx(["app", "engine", "kvstore"]) as guard:
        yield guard
