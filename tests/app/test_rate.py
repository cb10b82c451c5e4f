"""What one API key may ask for, in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.keys import KeyTable
from app.rate import Allowance, Allowances, OverLimit


def key(calls_at_once: int = 0, calls_a_minute: int = 0) -> KeyTable:
    return KeyTable(
        name="k", sha256="0" * 64, max_concurrent=calls_at_once, requests_per_minute=calls_a_minute
    )


def refused(allowance: Allowance, now: float) -> OverLimit:
    with pytest.raises(OverLimit) as caught:
        allowance.take(now)
    return caught.value


def test_a_key_without_limits_has_none() -> None:
    allowance = Allowance(key(), 0.0)
    for _ in range(1000):
        allowance.take(0.0)
    assert allowance.running == 1000


def test_calls_at_once_are_limited_and_one_that_ends_makes_room() -> None:
    allowance = Allowance(key(calls_at_once=2), 0.0)
    allowance.take(0.0)
    allowance.take(0.0)
    assert refused(allowance, 0.0).code == "concurrency_limit"
    allowance.give_back()
    allowance.take(0.0)


def test_a_minutes_calls_may_come_at_once_and_then_one_by_one() -> None:
    allowance = Allowance(key(calls_a_minute=6), 100.0)
    for _ in range(6):
        allowance.take(100.0)
    assert refused(allowance, 100.0).retry_after == 10
    assert refused(allowance, 107.5).retry_after == 3
    allowance.take(110.0)
    assert refused(allowance, 110.0).retry_after == 10


@given(
    st.integers(1, 100),
    st.lists(st.floats(0, 100), max_size=60),
)
def test_whoever_waits_as_long_as_told_is_taken_and_no_more_than_the_rate_ever_is(
    rate: int, gaps: list[float]
) -> None:
    """Over any time: at most a full bucket and what the rate brings."""
    allowance, now = Allowance(key(calls_a_minute=rate), 0.0), 0.0
    for taken, gap in enumerate(gaps, 1):
        now += gap
        try:
            allowance.take(now)
        except OverLimit as over:
            now += over.retry_after
            allowance.take(now)
        assert taken <= rate + now * rate / 60 + 1e-6


def test_a_call_that_fails_is_given_back_and_one_that_is_refused_was_never_taken() -> None:
    allowances, mine = Allowances(), key(calls_at_once=1)

    def fail() -> None:
        with allowances.taking(mine, 0.0):
            with pytest.raises(OverLimit), allowances.taking(mine, 0.0):
                pass
            raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            fail()
