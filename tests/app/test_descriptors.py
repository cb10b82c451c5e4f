"""File descriptors: the soft limit is raised as far as connections need it, and what is left is told."""

import resource
from collections.abc import Iterator

import pytest

from app.descriptors import OTHERS, reserve


@pytest.fixture
def hard() -> Iterator[int]:
    """The hard limit, with a low soft one; restored at the end."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OTHERS + 50, before[1]))
    try:
        yield before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_few_connections_need_nothing(hard: int) -> None:
    assert reserve(50) == 50
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (OTHERS + 50, hard)


def test_the_soft_limit_is_raised_as_far_as_need_be(hard: int) -> None:
    assert reserve(51) == 51
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (OTHERS + 51, hard)


def test_no_more_than_the_hard_limit_allows_is_promised(hard: int) -> None:
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no hard limit here")
    assert reserve(hard) == hard - OTHERS
