"""The chance of reuse is what was counted, and the index of a wait is the best rate that some horizon has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.reuse import (
    BUCKETS,
    EDGES,
    LEAST_ALIVE,
    MOST_TIMES,
    WIDTHS,
    Cell,
    Reuse,
    hazards_of,
    shares_of,
    single_peaked,
    worths,
)

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


@given(shares)
def test_hazards_and_shares_say_the_same(shares: list[float]) -> None:
    shares = [share / 2 for share in shares]
    assert shares_of(hazards_of(shares)) == pytest.approx(shares, abs=1e-12)


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_of_a_single_peaked_curve_the_ends_of_any_stretch_are_least(values: list[float]) -> None:
    curve = single_peaked(values)
    peak = values.index(max(values))
    assert len(curve) == len(values)
    assert curve[peak] == pytest.approx(values[peak])
    assert curve[: peak + 1] == sorted(curve[: peak + 1])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)


@given(st.lists(st.floats(0, 1e3), min_size=1), st.integers(0, 50))
def test_a_curve_with_one_peak_stays_as_it_is(values: list[float], at: int) -> None:
    curve = [*sorted(values[:at]), *sorted(values[at:], reverse=True)]
    assert single_peaked(curve) == pytest.approx(curve)


def test_uses_too_young_to_tell_do_not_count_as_gone() -> None:
    """All come back after ten seconds. At second 12 those of the last ten seconds have not yet."""
    cell, nothing = Cell(), [0.0] * BUCKETS
    for use in range(120):
        cell.used(use / 10)
        if use < 20:
            cell.again[EDGES.index(8.0) + 1] += 1
    hazards = cell.hazards(12.0, nothing, 1.0)
    assert sum(hazards) == hazards[EDGES.index(8.0) + 1] == pytest.approx(20 / 24, abs=0.05)


def test_the_moments_kept_are_bounded_and_still_tell_how_many_uses_are_so_old() -> None:
    cell = Cell()
    for second in range(10_000):
        cell.used(float(second))
    assert len(cell.times) == len(cell.totals) <= MOST_TIMES
    cell.again[EDGES.index(2048.0)] = 3500.0
    found = cell.hazards(10_000.0, [0.0] * BUCKETS, 1.0)[EDGES.index(2048.0)]
    middle = (2048.0 + EDGES[EDGES.index(2048.0) - 1]) / 2
    assert found == pytest.approx(3500 / (10_000 - middle), rel=0.1)


def test_a_kind_that_has_seen_nothing_fares_like_its_family() -> None:
    reuse = Reuse([0, 0, 1, 1])
    for second in range(3000):
        reuse.used(0, float(second))
        reuse.used(2, float(second))
        reuse.again(0, 8.0)
    assert reuse.worth(1, 1.0) > 5 * reuse.worth(3, 1.0)


def test_a_kind_that_is_used_again_is_worth_more_than_one_that_is_not() -> None:
    reuse = Reuse([0, 1])
    for moment in range(2000):
        for kind in (0, 1):
            reuse.used(kind, float(moment))
        reuse.again(1, 8.0)
    assert reuse.worth(1, 1.0) > 10 * reuse.worth(0, 1.0)
    assert reuse.worth(1, 1.0) == pytest.approx(1 / 8, rel=0.5), "once in about eight seconds"
    assert reuse.worth(1, 100.0) < reuse.worth(1, 1.0) / 10, "its time is over"


def test_what_a_kind_has_not_seen_it_takes_from_all_others() -> None:
    reuse = Reuse([0, 1])
    before = reuse.worth(1, 1.0)
    for moment in range(2000):
        reuse.used(0, float(moment))
        reuse.again(0, 8.0)
    assert reuse.worth(1, 1.0) == pytest.approx(reuse.worth(0, 1.0), rel=0.3)
    assert reuse.worth(1, 1.0) > 2 * before


def test_old_ways_are_forgotten() -> None:
    reuse = Reuse([0, 1])
    for hour in range(12):
        for use in range(20_000):
            kind = use % 2
            reuse.used(kind, 3600.0 * hour + use / 10)
            if kind == (hour < 4):
                reuse.again(kind, 8.0)
    assert reuse.worth(0, 1.0) > reuse.worth(1, 1.0), "eight hours of it outweigh the four before"


def test_the_buckets_cover_all_time() -> None:
    reuse = Reuse([0])
    for seconds in (0.0, EDGES[0], EDGES[-1], 1e9):
        reuse.again(0, seconds)
        assert reuse.worth(0, seconds) >= 0
