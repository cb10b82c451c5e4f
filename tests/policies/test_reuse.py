"""The chance of reuse is what was counted, and the index of a wait is the best rate that some horizon has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.reuse import BUCKETS, EDGES, LEAST_ALIVE, WIDTHS, Reuse, worths

shares = st.lists(st.floats(0, 1), min_size=BUCKETS, max_size=BUCKETS).map(
    lambda raw: [share / max(1.0, sum(raw)) for share in raw]
)


def by_trying(shares: list[float]) -> list[float]:
    """From each bucket the best horizon, all of them tried."""
    alive = [1.0]
    for share in shares:
        alive.append(alive[-1] - share)
    alive = [max(left, LEAST_ALIVE) for left in alive]
    found = []
    for start in range(BUCKETS):
        rates, again, kept = [], 0.0, 0.0
        for bucket in range(start, BUCKETS):
            again += shares[bucket]
            kept += WIDTHS[bucket] * (alive[bucket] + alive[bucket + 1]) / 2
            rates.append(again / kept)
        found.append(max(rates))
    return found


@given(shares)
def test_the_hull_finds_the_best_horizon(shares: list[float]) -> None:
    assert worths(shares) == pytest.approx(by_trying(shares), rel=1e-6, abs=1e-12)


def test_a_kind_that_is_used_again_is_worth_more_than_one_that_is_not() -> None:
    reuse = Reuse(2)
    for moment in range(2000):
        for kind in (0, 1):
            reuse.used(kind, float(moment))
        reuse.again(1, 8.0)
    assert reuse.worth(1, 1.0) > 10 * reuse.worth(0, 1.0)
    assert reuse.worth(1, 1.0) == pytest.approx(1 / 8, rel=0.5), "once in about eight seconds"
    assert reuse.worth(1, 100.0) < reuse.worth(1, 1.0) / 10, "its time is over"


def test_what_a_kind_has_not_seen_it_takes_from_all_others() -> None:
    reuse = Reuse(2)
    before = reuse.worth(1, 1.0)
    for moment in range(2000):
        reuse.used(0, float(moment))
        reuse.again(0, 8.0)
    assert reuse.worth(1, 1.0) == pytest.approx(reuse.worth(0, 1.0), rel=0.1)
    assert reuse.worth(1, 1.0) > 2 * before


def test_old_ways_are_forgotten() -> None:
    reuse = Reuse(2)
    for hour in range(12):
        for use in range(20_000):
            kind = use % 2
            reuse.used(kind, 3600.0 * hour + use / 10)
            if kind == (hour < 4):
                reuse.again(kind, 8.0)
    assert reuse.worth(0, 1.0) > reuse.worth(1, 1.0), "eight hours of it outweigh the four before"


def test_the_buckets_cover_all_time() -> None:
    reuse = Reuse(1)
    for seconds in (0.0, EDGES[0], EDGES[-1], 1e9):
        reuse.again(0, seconds)
        assert reuse.worth(0, seconds) >= 0
