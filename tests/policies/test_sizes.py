"""Limits divide the load as they say, follow it when it changes, and stay as they are where they are fixed."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.sizes import LEAST_SAMPLES, SizeLimits, load

Lengths = list[tuple[int, int]]  # of prompt and output


def drawn(count: int, seed: int, median: float = 500.0) -> Lengths:
    random = Random(seed)
    return [
        (
            1 + int(median * random.lognormvariate(0.0, 1.0)),
            1 + int(median / 4 * random.lognormvariate(0.0, 1.0)),
        )
        for _ in range(count)
    ]


def learnt(limits: SizeLimits, lengths: Lengths) -> tuple[int, ...]:
    for prompt, output in lengths:
        limits.observe(prompt, output)
    return limits.limits


def loads_of(limits: tuple[int, ...], lengths: Lengths) -> list[float]:
    """What each class gets, as a share of all."""
    found = [0.0] * len(limits)
    for prompt, output in lengths:
        own = next(at for at, limit in enumerate(limits) if not limit or prompt + output <= limit)
        found[own] += load(prompt, output)
    return [each / sum(found) for each in found]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 1.0, 1.0), (2.0, 1.0), (1.0, 3.0, 2.0, 2.0)])
def test_classes_carry_their_shares_of_tomorrows_load(shares: tuple[float, ...]) -> None:
    limits = learnt(SizeLimits(shares, memory=10**6), drawn(20_000, seed=1))
    tomorrow = loads_of(limits, drawn(20_000, seed=2))
    assert tomorrow == pytest.approx([each / sum(shares) for each in shares], abs=0.05)


def test_a_load_is_positions_times_steps() -> None:
    assert load(100, 0) == 100
    assert load(100, 10) == 11 * 105
    assert load(0, 0) == 1


def test_old_samples_fade() -> None:
    """Even such as weighed 400 times as much."""
    limits = SizeLimits((1.0, 1.0), memory=500)
    before = learnt(limits, drawn(3000, seed=1, median=4000.0))[0]
    after = learnt(limits, drawn(9000, seed=2, median=200.0))[0]
    fresh = learnt(SizeLimits((1.0, 1.0), memory=500), drawn(9000, seed=2, median=200.0))[0]
    assert after < 0.2 * before
    assert after == pytest.approx(fresh, rel=0.02)


def test_no_limit_is_drawn_from_a_handful() -> None:
    limits = SizeLimits((1.0, 1.0))
    assert learnt(limits, drawn(LEAST_SAMPLES - 1, seed=1)) == (0, 0)
    assert learnt(limits, drawn(1, seed=2))[0] > 0


@given(
    st.lists(st.tuples(st.integers(0, 2**21), st.integers(0, 2**21)), min_size=LEAST_SAMPLES, max_size=80),
    st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6),
)
def test_limits_are_one_a_class_and_ascend_whatever_is_observed(
    lengths: Lengths, shares: list[float]
) -> None:
    found = learnt(SizeLimits(shares, memory=2), lengths)
    assert len(found) == len(shares)
    assert found[-1] == 0
    assert all(0 < before < after for before, after in pairwise((*found[:-1], 2**60)))


@pytest.mark.parametrize(("shares", "memory"), [((), 100), ((1.0, 0.0), 100), ((1.0,), 1)])
def test_parameters_that_make_no_sense_are_refused(shares: tuple[float, ...], memory: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        SizeLimits(shares, memory)
