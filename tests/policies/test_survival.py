"""Survival curves: what is left, as counted from the lengths themselves."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.survival import BUCKETS, EDGES, Cell, Curve, Epochs, log_normal

PRIOR = log_normal(128, 1.25)
LENGTHS = [max(1, int(Random(each).lognormvariate(5.0, 1.0))) for each in range(4000)]


def learned(lengths: list[int], backing: float = 1e-6, memory: int = 10**9) -> Curve:
    cell = Cell(lambda epoch: PRIOR, memory, backing)
    for length in lengths:
        cell.observe(length, ended=True)
    return cell.curve(1)


def left_of(lengths: list[int], so_far: int, limit: int) -> float:
    left = [min(length, limit) - so_far for length in lengths if length > so_far]
    return sum(left) / len(left)


def test_edges_grow_by_no_more_than_a_fifth_but_where_they_are_single_tokens() -> None:
    assert all(after - before == 1 or after <= before * 1.2 for before, after in pairwise(EDGES))
    assert EDGES[-1] >= 2**20


@pytest.mark.parametrize("limit", [150, 600, 10**6])
@pytest.mark.parametrize("so_far", [0, 1, 5, 20, 100, 140, 400])
def test_what_is_expected_to_be_left_is_what_is_left_on_average(so_far: int, limit: int) -> None:
    if so_far < limit:
        assert learned(LENGTHS).remaining(so_far, limit) == pytest.approx(
            left_of(LENGTHS, so_far, limit), rel=0.03
        )


def test_where_buckets_are_single_tokens_it_is_exact() -> None:
    lengths = [1, 1, 2, 3, 3, 3, 5]
    for so_far in range(5):
        for limit in range(so_far + 1, 7):
            expected = left_of(lengths, so_far, limit)
            assert learned(lengths).remaining(so_far, limit) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("so_far", [0, 50, 300])
def test_a_share_q_has_ended_at_the_quantile(so_far: int, q: float) -> None:
    left = learned(LENGTHS).quantile(so_far, 10**6, q)
    longer = [length for length in LENGTHS if length > so_far]
    assert sum(length - so_far <= left for length in longer) / len(longer) == pytest.approx(q, abs=0.02)


@given(
    st.lists(st.integers(1, 10**7), max_size=20),
    st.integers(0, 2**21),
    st.integers(0, 2**21),
    st.floats(0.0, 1.0),
)
def test_answers_stay_within_what_is_possible(lengths: list[int], so_far: int, room: int, q: float) -> None:
    curve, limit = learned(lengths, backing=1.0), so_far + room
    assert min(1, room) <= curve.remaining(so_far, limit) <= room
    assert min(1, room) <= curve.quantile(so_far, limit, q) <= room
    assert curve.quantile(so_far, limit, q / 2) <= curve.quantile(so_far, limit, q)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), max_size=30))
def test_curves_fall_from_one_to_nothing_and_never_reach_it_early(samples: list[tuple[int, bool]]) -> None:
    cell = Cell(lambda epoch: PRIOR, memory=10, backing=1.0)
    for length, ended in samples:
        cell.observe(length, ended=ended)
    survival = cell.curve(1).survival
    assert survival[0] == 1.0
    assert survival[-1] == 0.0
    assert all(before >= after for before, after in pairwise(survival))
    assert min(survival[:-1]) > 0.0
    assert len(survival) == BUCKETS + 1


def test_a_cell_without_samples_is_the_coarser_one() -> None:
    assert Cell(lambda epoch: PRIOR, 100, 8.0).curve(0) is PRIOR


def test_with_few_samples_it_lies_between_them_and_the_coarser_one() -> None:
    prior = PRIOR.remaining(0, 10**6)
    few, many = (learned([10] * count, backing=8.0).remaining(0, 10**6) for count in (8, 800))
    assert 10 < many < 20 < few < prior
    assert few == pytest.approx((10 + prior) / 2, rel=0.1)


def test_beyond_its_longest_it_goes_on_like_the_coarser_one() -> None:
    """Nobody of its own has come so far."""
    assert learned([10] * 100, backing=8.0).remaining(300, 10**6) == pytest.approx(
        PRIOR.remaining(300, 10**6)
    )


def test_lengths_cut_short_count_as_longer() -> None:
    """All would be 300 long; half of them are stopped at 100. Kaplan and Meier's estimate is that all are 300 long."""
    cell = Cell(lambda epoch: PRIOR, 10**9, 1e-6)
    for _ in range(50):
        cell.observe(300, ended=True)
        cell.observe(100, ended=False)
    assert cell.curve(1).remaining(0, 10**6) == pytest.approx(300, rel=0.1)


def test_what_was_long_ago_fades() -> None:
    cell = Cell(lambda epoch: PRIOR, memory=100, backing=1.0)
    for length in [1000] * 1000 + [10] * 500:
        cell.observe(length, ended=True)
    assert cell.curve(1).remaining(0, 10**6) < 25  # e⁻⁵ of the weight is still at 1000


def test_fading_survives_any_number_of_samples() -> None:
    cell = Cell(lambda epoch: PRIOR, memory=2, backing=1.0)
    for _ in range(2000):
        cell.observe(7, ended=True)
    assert cell.curve(1).remaining(0, 8) == pytest.approx(7, rel=0.1)


def test_curves_are_made_again_after_every_sample_at_first_and_after_32_later() -> None:
    epochs = Epochs()
    for count in range(1, 17):
        epochs.seen()
        assert epochs.now == count
    for _ in range(2000):
        epochs.seen()
    before = epochs.now
    for _ in range(32 * 5):
        epochs.seen()
    assert epochs.now == before + 5
