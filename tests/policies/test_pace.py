"""Replicas that are alike learn together what steps cost; one that is slower for good is priced so, by itself."""

import random
from dataclasses import replace
from itertools import islice

import pytest

from policies.cost import CopySample, CostModel, StepCost, StepGroup
from policies.pace import BAND, ENOUGH, STEPS, Paces
from tests.policies.test_cost import SLOWER, TRUTH, decode, seconds_of, steps

USUAL = (200, 200 * 400.0, 8, 4_000)
WANTED = seconds_of(TRUTH, *USUAL)


def group_of(count: int) -> list[StepCost]:
    group = StepGroup()
    return [StepCost(group, number) for number in range(count)]


def run(costs: list[StepCost], factors: list[float], rounds: int, seed: int = 0) -> None:
    """By turns, each with steps of its own, which take so many times what they ought to."""
    streams = [steps(tuple(f * c for c in TRUTH), seed=100 * seed + n) for n, f in enumerate(factors)]
    for _ in range(rounds):
        for cost, stream in zip(costs, streams, strict=True):
            cost.observe(next(stream))


def test_what_one_replica_learns_all_like_it_know() -> None:
    first, second = group_of(2)
    for sample in islice(steps(TRUTH, seed=1), 500):
        first.observe(sample)
    assert second.step_seconds(*USUAL) == first.step_seconds(*USUAL) == pytest.approx(WANTED, rel=0.05)
    assert second.samples == 500


def test_a_replica_without_a_group_learns_alone() -> None:
    known, other = StepCost(), StepCost()
    run([known], [1.0], 200)
    assert other.samples == 0
    assert other.step_seconds(*USUAL) != pytest.approx(known.step_seconds(*USUAL), rel=0.5)


def test_steps_in_which_no_time_passes_give_a_finite_pace() -> None:
    """As a clock that is too coarse has them."""
    costs = group_of(2)
    for _ in range(STEPS):
        for cost in costs:
            cost.observe(decode(1, 10, 0.0))
    assert [cost.pace for cost in costs] == [1.0, 1.0]


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_who_is_left_of_two_is_priced_as_one_that_was_always_alone(factor: float) -> None:
    (left, lost), alone = group_of(2), StepCost()
    run([left, lost], [factor, 1.0], 200)
    run([alone], [factor], 200)
    for now in (factor, 2 * factor, 1.0):
        run([left], [now], 200, seed=1)
        run([alone], [now], 200, seed=1)
        assert left.step_seconds(*USUAL) == pytest.approx(alone.step_seconds(*USUAL), rel=0.05)


@pytest.mark.parametrize("replicas", [2, 4, 16])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_one_that_is_slower_or_quicker_for_good_is_priced_so_within_a_bounded_number_of_its_steps(
    replicas: int, factor: float
) -> None:
    costs = group_of(replicas)
    run(costs, [1.0] * replicas, 200)
    run(costs, [factor] + [1.0] * (replicas - 1), STEPS // 2 + 1, seed=1)
    beside = costs[0].step_seconds(*USUAL) / costs[1].step_seconds(*USUAL)
    assert beside == pytest.approx(factor, rel=0.15)
    run(costs, [factor] + [1.0] * (replicas - 1), 200, seed=2)
    assert costs[0].step_seconds(*USUAL) == pytest.approx(factor * WANTED, rel=0.1)
    assert costs[1].step_seconds(*USUAL) == pytest.approx(WANTED, rel=0.1)
    run(costs, [1.0] * replicas, STEPS // 2 + 1, seed=3)
    assert [cost.pace for cost in costs] == [1.0] * replicas, "it is as quick as before, and priced so"


def test_one_that_is_slow_from_the_start_is_told_apart() -> None:
    costs = group_of(3)
    run(costs, [1.0, 1.0, 2.0], 100)
    assert costs[2].step_seconds(*USUAL) == pytest.approx(2 * WANTED, rel=0.15)
    assert costs[0].step_seconds(*USUAL) == pytest.approx(WANTED, rel=0.15)


def test_the_slow_one_alone_at_work_misleads_the_others_for_a_bounded_number_of_steps() -> None:
    """The fit takes its steps for the truth, as nobody denies them; until the others are heard again."""
    costs = group_of(3)
    run(costs, [1.0] * 3, 100)
    run(costs[:1], [2.0], 300, seed=1)
    run(costs, [2.0, 1.0, 1.0], 3 * STEPS, seed=2)
    assert costs[0].step_seconds(*USUAL) == pytest.approx(2 * WANTED, rel=0.15)
    assert costs[1].step_seconds(*USUAL) == pytest.approx(WANTED, rel=0.15)


def test_single_outliers_change_nothing() -> None:
    costs = group_of(2)
    run(costs, [1.0, 1.0], 200)
    before = [cost.coefficients for cost in costs]
    costs[0].observe(decode(8, 4_000, 50 * seconds_of(TRUTH, 0, 0.0, 8, 4_000)))
    assert [cost.coefficients for cost in costs] == before
    draw = random.Random(1)
    for sample in islice(steps(TRUTH, seed=9), 400):
        factor = 30.0 if draw.random() < 0.1 else 1.0
        costs[0].observe(replace(sample, seconds=sample.seconds * factor))
        assert [cost.pace for cost in costs] == [1.0, 1.0]


def test_what_is_slow_for_all_is_nobodys_pace() -> None:
    costs = group_of(3)
    run(costs, [1.0] * 3, 200)
    run(costs, [20.0] * 3, 200, seed=1)
    assert [cost.pace for cost in costs] == [1.0] * 3
    assert costs[1].step_seconds(*USUAL) == pytest.approx(seconds_of(SLOWER, *USUAL), rel=0.1)


def test_a_replica_alone_has_no_pace() -> None:
    """What changes there the fit follows, as it does for any one device."""
    (cost,) = group_of(1)
    for factor in (1.0, 20.0, 1.5, 0.1):
        run([cost], [factor], 60)
        assert cost.pace == 1.0


def test_like_ones_differ_by_less_than_the_band_unpunished() -> None:
    costs = group_of(2)
    run(costs, [1.0, 1.1], 300)
    assert [cost.pace for cost in costs] == [1.0, 1.0]


def test_little_is_said_of_little() -> None:
    paces = Paces()
    for number in range(2):
        paces.join(number)
        for _ in range(ENOUGH):
            paces.observe(0, 1.0)
    for _ in range(ENOUGH - 1):
        paces.observe(1, 3 * BAND)
    assert paces.of(1) == 1.0
    paces.observe(1, 3 * BAND)
    assert paces.of(1) == 3 * BAND


def test_one_that_comes_again_knows_what_the_group_knows_and_has_no_pace_yet() -> None:
    group = StepGroup()
    costs = [StepCost(group, number) for number in range(2)]
    run(costs, [2.0, 1.0], 200)
    again = CostModel.calibrated([decode(1, 10, 9.0)], group, 0).steps
    assert again.pace == 1.0
    assert again.step_seconds(*USUAL) == costs[1].step_seconds(*USUAL) == pytest.approx(WANTED, rel=0.1)


def test_of_a_groups_calibrations_the_first_counts_but_copies_are_each_ones_own() -> None:
    group = StepGroup()
    first, second = (
        CostModel.calibrated(
            [decode(8, 100, seconds), CopySample("host", "device", 10**6, seconds, 0.0)], group, n
        )
        for n, seconds in enumerate((0.01, 0.1))
    )
    assert group.fit.samples == 1
    assert first.copies.seconds("host", "device", 10**6) < second.copies.seconds("host", "device", 10**6)
