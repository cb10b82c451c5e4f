"""Costs are learned from samples, follow lasting changes, and shrug off the rest."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import CopyCost, CopySample, CostModel, StepCost, StepSample
from policies.fitting import solve_non_negative

TRUTH = (4e-4, 2e-5, 3e-9, 6e-5, 8e-8)  # base, β, γ, δ, ε
SLOWER = tuple(20 * c for c in TRUTH)


def seconds_of(truth: tuple[float, ...], prefill: int, attended: float, rows: int, context: int) -> float:
    return sum(c * f for c, f in zip(truth, (1, prefill, attended, rows, context), strict=True))


def steps(
    truth: tuple[float, ...], *, seed: int, noise: float = 0.05, prefills: float = 0.4
) -> Iterator[StepSample]:
    """Of a mixed workload, without end; `prefills` of them carry a chunk of a prompt."""
    draw = random.Random(seed)
    while True:
        rows = draw.randint(1, 32)
        context = sum(draw.randint(10, 2000) for _ in range(rows))
        count = int(2 ** draw.uniform(1, 10)) if draw.random() < prefills else 0
        attended = count * (draw.randint(0, 1000) + count / 2)
        features = count, attended, rows, context
        yield StepSample(*features, seconds_of(truth, *features) * math.exp(draw.gauss(0, noise)))


def decode(rows: int, context: int, seconds: float) -> StepSample:
    return StepSample(0, 0.0, rows, context, seconds)


def learned(samples: Iterator[StepSample], count: int, into: StepCost | None = None) -> StepCost:
    cost = into or StepCost()
    for _, sample in zip(range(count), samples, strict=False):
        cost.observe(sample)
    return cost


counts = st.integers(0, 10**6)
step_samples = st.builds(
    StepSample,
    prefill_tokens=counts,
    attended=st.floats(0, 1e12),
    decode_rows=counts,
    decode_context=st.integers(0, 10**9),
    seconds=st.floats(0, 1e5),
    copies=st.integers(0, 100),
    copied_bytes=st.integers(0, 2**40),
)
tiers = st.sampled_from(["device", "host", "disk"])
copy_samples = st.builds(
    CopySample,
    source=tiers,
    target=tiers,
    bytes=st.integers(0, 2**40),
    seconds=st.floats(0, 1e5),
    queued_seconds=st.floats(0, 10),
)


# --- steps ------------------------------------------------------------------------------------------------------------


@given(st.lists(step_samples, max_size=60), counts, counts, counts, st.integers(1, 4096))
def test_whatever_was_observed_costs_are_finite_and_grow_with_the_work(
    samples: list[StepSample], cached: int, count: int, rows: int, chunk: int
) -> None:
    cost = CostModel.calibrated(samples).steps
    assert all(0 <= c < math.inf for c in cost.coefficients)
    once = cost.recompute_seconds(cached, count, chunk, rows, rows * 100)
    assert 0 <= once < math.inf
    assert cost.recompute_seconds(cached + 1, count, chunk, rows, rows * 100) >= once
    assert cost.recompute_seconds(cached, count + 1, chunk, rows, rows * 100) >= once
    assert cost.recompute_seconds(cached, count, chunk, rows + 1, rows * 100 + 100) >= once
    assert cost.recompute_seconds(cached, count, chunk + 1, rows, rows * 100) <= once
    assert 0 <= cost.added_seconds(cached, count) <= once


def test_coefficients_are_recovered_from_noisy_steps() -> None:
    """Through 5 % of noise: what each kind of step costs, and what a prompt adds to steps that run anyway."""
    cost = learned(steps(TRUTH, seed=1), 2000)
    for features in ((0, 0, 1, 100), (0, 0, 32, 30_000), (16, 128, 8, 4_000), (1000, 5e5, 1, 100)):
        assert cost.step_seconds(*features) == pytest.approx(seconds_of(TRUTH, *features), rel=0.05)
    assert cost.added_seconds(0, 512) == pytest.approx(
        seconds_of((0, *TRUTH[1:]), 512, 512**2 / 2, 0, 0), 0.05
    )


def test_coefficients_are_recovered_exactly_from_steps_without_noise() -> None:
    cost = learned(steps(TRUTH, seed=2, noise=0.0), 2000)
    assert cost.coefficients[: len(TRUTH)] == pytest.approx(TRUTH, rel=0.01)


def beside(samples: Iterator[StepSample], copy: float, byte: float) -> Iterator[StepSample]:
    """These, but each fourth with copies beside it, which take so long each, and by the byte."""
    for number, sample in enumerate(samples):
        count = number % 4 == 0 and number // 4 % 3 + 1
        size = count * (number * 7919 % 50 + 1) * 50_000
        seconds = sample.seconds + copy * count + byte * size
        yield replace(sample, seconds=seconds, copies=int(count), copied_bytes=size)


@pytest.mark.parametrize(("copy", "byte"), [(1e-3, 1e-10), (1e-4, 1e-9)])
def test_what_copies_take_from_steps_is_learned_and_not_taken_for_the_steps_own(
    copy: float, byte: float
) -> None:
    cost = learned(beside(steps(TRUTH, seed=2), copy, byte), 2000)
    assert cost.beside_seconds(2, 4_000_000) == pytest.approx(2 * copy + 4e6 * byte, rel=0.1)
    for features in ((0, 0, 1, 100), (0, 0, 32, 30_000), (1000, 5e5, 1, 100)):
        assert cost.step_seconds(*features) == pytest.approx(seconds_of(TRUTH, *features), rel=0.05)


def test_copies_that_take_nothing_from_steps_soon_count_for_hardly_anything() -> None:
    cost = learned(beside(steps(TRUTH, seed=2), 0.0, 0.0), 500)
    assert cost.beside_seconds(1, 10**6) < 0.05 * cost.step_seconds(0, 0, 8, 8000)


def test_a_few_steps_give_the_scale_and_the_prior_gives_the_shape() -> None:
    """After one step of a device 100 times as fast as the prior has it, everything is about 100 times as fast."""
    before, cost = StepCost(), StepCost()
    cost.observe(decode(8, 1000, before.step_seconds(0, 0.0, 8, 1000) / 100))
    assert cost.recompute_seconds(0, 1000, 512) == pytest.approx(before.recompute_seconds(0, 1000, 512) / 100)
    assert cost.samples == 1


def test_a_night_of_decoding_leaves_what_prefill_costs() -> None:
    cost = learned(steps(TRUTH, seed=3), 1000)
    before = cost.recompute_seconds(500, 1000, 512)
    learned(steps(TRUTH, seed=4, prefills=0.0), 5000, into=cost)
    assert cost.recompute_seconds(500, 1000, 512) == pytest.approx(before, rel=0.03)


def test_one_size_of_batch_all_night_leaves_what_others_cost() -> None:
    cost = learned(steps(TRUTH, seed=5), 1000)
    for _ in range(5000):
        cost.observe(decode(20, 10_000, seconds_of(TRUTH, 0, 0, 20, 10_000)))
    assert cost.step_seconds(0, 0.0, 1, 100) == pytest.approx(seconds_of(TRUTH, 0, 0, 1, 100), rel=0.05)


def test_steps_hit_by_another_process_are_ignored() -> None:
    cost = StepCost()
    for number, sample in zip(range(2000), steps(TRUTH, seed=6), strict=False):
        hit = number > 200 and number % 10 == 0
        cost.observe(StepSample(*_features(sample), sample.seconds * 30) if hit else sample)
    for features in ((0, 0, 8, 4_000), (200, 2e4, 4, 2_000)):
        assert cost.step_seconds(*features) == pytest.approx(seconds_of(TRUTH, *features), rel=0.05)


def _features(sample: StepSample) -> tuple[int, float, int, int]:
    return sample.prefill_tokens, sample.attended, sample.decode_rows, sample.decode_context


def test_a_device_that_becomes_20_times_slower_is_followed_within_16_steps() -> None:
    """Of a kind; and the other kinds, which nobody has seen since, are believed to have become slower too."""
    cost = learned(steps(TRUTH, seed=7), 1000)
    for _ in range(16):
        cost.observe(decode(8, 4_000, seconds_of(SLOWER, 0, 0, 8, 4_000)))
    assert cost.step_seconds(0, 0.0, 8, 4_000) == pytest.approx(seconds_of(SLOWER, 0, 0, 8, 4_000), rel=0.05)
    assert cost.step_seconds(256, 2e5, 1, 900) == pytest.approx(seconds_of(SLOWER, 256, 2e5, 1, 900), rel=0.2)


def test_and_when_it_recovers_that_is_followed_too() -> None:
    cost = learned(steps(TRUTH, seed=8), 500)
    learned(steps(SLOWER, seed=9), 500, into=cost)
    learned(steps(TRUTH, seed=10), 500, into=cost)
    assert cost.step_seconds(0, 0.0, 8, 4_000) == pytest.approx(seconds_of(TRUTH, 0, 0, 8, 4_000), rel=0.05)


def test_when_only_prompts_become_slower_decoding_stays_as_it_was() -> None:
    slower = (TRUTH[0], 20 * TRUTH[1], 20 * TRUTH[2], *TRUTH[3:])
    cost = learned(steps(TRUTH, seed=11), 1000)
    learned(steps(slower, seed=12), 600, into=cost)
    for features in ((0, 0, 8, 4_000), (600, 3e5, 4, 2_000)):
        assert cost.step_seconds(*features) == pytest.approx(seconds_of(slower, *features), rel=0.1)


def test_a_slow_drift_is_followed() -> None:
    cost = StepCost()
    pace, source = 1.0, steps(TRUTH, seed=13)
    for _ in range(3000):
        pace *= 1.0002
        sample = next(source)
        cost.observe(StepSample(*_features(sample), sample.seconds * pace))
    assert cost.step_seconds(0, 0.0, 8, 4_000) == pytest.approx(
        pace * seconds_of(TRUTH, 0, 0, 8, 4_000), rel=0.15
    )


def test_who_asks_when_makes_no_difference() -> None:
    asked, unasked = StepCost(), StepCost()
    for _, sample in zip(range(300), steps(TRUTH, seed=14), strict=False):
        asked.observe(sample)
        asked.step_seconds(100, 5e3, 3, 300)
        unasked.observe(sample)
    assert asked.coefficients == unasked.coefficients


def test_recomputing_is_the_sum_of_its_steps() -> None:
    cost = learned(steps(TRUTH, seed=15), 500)
    chunks = [(300, 256), (556, 256), (812, 188)]
    expected = sum(cost.step_seconds(n, n * (c + n / 2), 5, 2_000) for c, n in chunks)
    assert cost.recompute_seconds(300, 700, 256, 5, 2_000) == pytest.approx(expected)
    assert cost.recompute_seconds(300, 0, 256, 5, 2_000) == 0


def test_an_empty_step_teaches_nothing() -> None:
    cost = StepCost()
    cost.observe(StepSample(0, 0.0, 0, 0, 5.0))
    assert cost.samples == 0


# --- copies -----------------------------------------------------------------------------------------------------------


def copied(
    cost: CopyCost, source: str, target: str, latency: float, bandwidth: float, count: int = 400
) -> None:
    draw = random.Random(16)
    for _ in range(count):
        size = draw.randint(1, 64) * 98_304
        seconds = (latency + size / bandwidth) * math.exp(draw.gauss(0, 0.05))
        cost.observe(CopySample(source, target, size, seconds, queued_seconds=draw.random()))


@given(st.lists(copy_samples, max_size=60), tiers, st.integers(1, 2**40), st.integers(1, 2**40))
def test_whatever_was_copied_costs_are_finite_and_grow_with_the_bytes(
    samples: list[CopySample], source: str, size: int, copy_bytes: int
) -> None:
    cost = CostModel.calibrated(samples).copies
    once = cost.reload_seconds(source, size, copy_bytes)
    assert 0 <= once < math.inf
    assert cost.reload_seconds(source, size + 1, copy_bytes) >= once
    assert cost.reload_seconds(source, size, copy_bytes, ahead_bytes=1) >= once
    assert cost.reload_seconds(source, size, copy_bytes + 1) <= once


def test_latency_and_bandwidth_of_each_route_are_recovered() -> None:
    cost = CopyCost()
    copied(cost, "host", "device", 1e-4, 8e9)
    copied(cost, "disk", "device", 2e-3, 5e8)
    assert cost.seconds("host", "device", 4 * 2**20) == pytest.approx(1e-4 + 4 * 2**20 / 8e9, rel=0.05)
    assert cost.seconds("disk", "device", 2**20) == pytest.approx(2e-3 + 2**20 / 5e8, rel=0.05)


def test_a_reload_waits_for_what_is_queued_and_pays_the_latency_of_each_copy() -> None:
    cost = CopyCost()
    one = cost.seconds("disk", "device", 1000)
    assert cost.reload_seconds("disk", 4000, 1000) == pytest.approx(4 * one)
    assert cost.reload_seconds("disk", 4000, 1000, ahead_bytes=2000) == pytest.approx(6 * one)
    assert cost.reload_seconds("disk", 0, 1000) == 0


def test_a_reload_waits_as_the_last_loads_of_its_tier_did() -> None:
    """The median of nine: once slow is forgotten at once, slow for long is learned, and so is its end."""
    cost = CopyCost()
    plain = {tier: cost.reload_seconds(tier, 4000, 1000) for tier in ("host", "disk")}
    for waited in (0.002, 0.002, 5.0, 0.002):
        cost.observe_load("host", 1.0, 1.0 + waited)
    assert cost.reload_seconds("host", 4000, 1000) == pytest.approx(plain["host"] + 0.002)
    assert cost.reload_seconds("disk", 4000, 1000) == plain["disk"]
    for waited in [5.0] * 5 + [0.001] * 5:
        cost.observe_load("host", 1.0, 1.0 + waited)
    assert cost.reload_seconds("host", 4000, 1000) == pytest.approx(plain["host"] + 0.001)


def test_copies_that_overlap_shorten_a_reload_by_as_large_a_part_whatever_its_size() -> None:
    """But a single copy overlaps with nothing."""
    cost = CopyCost()
    one = cost.seconds("disk", "device", 1000)
    for copies in (25, 25, 8):
        cost.observe_load("disk", copies * one, copies * one / 2)
    for copies in (2, 5, 100):
        assert cost.reload_seconds("disk", copies * 1000, 1000) == pytest.approx(copies * one / 2)
    assert cost.reload_seconds("disk", 1000, 1000) == pytest.approx(one)
    assert cost.reload_seconds("disk", 1, 1000) == cost.seconds("disk", "device", 1)


def test_a_route_never_taken_goes_by_the_other_direction_and_else_by_its_kind() -> None:
    cost = CopyCost()
    assert cost.seconds("host", "device", 10**9) == pytest.approx(10**9 / 5e9, rel=0.01)
    assert cost.seconds("disk", "device", 10**9) == pytest.approx(10**9 / 1e9, rel=0.01)
    copied(cost, "device", "host", 1e-5, 2e9)
    assert cost.seconds("host", "device", 10**9) == pytest.approx(10**9 / 2e9, rel=0.05)
    assert cost.seconds("disk", "host", 10**9) == pytest.approx(10**9 / 1e9, rel=0.01)


def test_a_disk_that_becomes_20_times_slower_is_followed_within_16_copies() -> None:
    cost = CopyCost()
    copied(cost, "disk", "device", 1e-4, 2e9)
    copied(cost, "disk", "device", 2e-3, 1e8, count=16)
    assert cost.seconds("disk", "device", 4 * 2**20) == pytest.approx(2e-3 + 4 * 2**20 / 1e8, rel=0.15)


def test_a_copy_of_which_nothing_arrived_teaches_nothing() -> None:
    cost = CopyCost()
    cost.observe(CopySample("disk", "device", 0, 30.0, 0.0))
    assert cost.seconds("disk", "device", 2**20) == CopyCost().seconds("disk", "device", 2**20)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_negative_solution_is_held_at_zero() -> None:
    assert solve_non_negative([[2.0, 1.0], [1.0, 2.0]], [3.0, 0.0]) == [1.5, 0.0]
    assert solve_non_negative([[2.0, 1.0], [1.0, 2.0]], [3.0, 3.0]) == pytest.approx([1.0, 1.0])
    assert solve_non_negative([[1.0]], [-1.0]) == [0.0]
