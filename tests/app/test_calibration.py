"""Calibration measures what a cost model needs, within its time, and leaves nothing that a sequence could notice."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from app.calibration import Shape, TabledRunner, calibrate, shapes
from engine.model.loading import Loaded, load_model
from engine.plan import Plan, StepResult
from engine.runner import BlockTables
from engine.scheduler import SchedulerConfig
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, HOST
from kvstore.memory import MemoryTier, host_tier, pool_tier
from policies.cost import CopySample, CostModel, StepSample
from tests.engine.models import BLOCK, CPU, SHIPPED, greedy, random_tokens, runner_for

TRUTH = (4e-4, 2e-5, 3e-9, 6e-5, 8e-8)  # base, β, γ, δ, ε
CONFIG = SchedulerConfig(block_size=BLOCK, blocks=512, max_batch_tokens=2048, max_sequences=64)


@dataclass(frozen=True)
class Done:
    result: StepResult

    def collect(self) -> StepResult:
        return self.result


class TimedRunner:
    """Takes as long as the true coefficients say, times `slowness`, on a clock of its own."""

    exact = True

    def __init__(self, config: SchedulerConfig, context: int, slowness: float = 1.0) -> None:
        self.now = 0.0
        self.plans: list[Plan] = []
        self.tables = BlockTables(config.max_sequences, -(-context // config.block_size), config.block_size)
        self._config, self._slowness = config, slowness

    def launch(self, plan: Plan) -> Done:
        self.plans.append(plan)
        for placement in plan.placements:
            self.tables.place(placement)
        work = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
        for row in plan.rows:
            self.tables.write(row)
            assert max(row.blocks) < self._config.blocks
            work[1:] += Shape(1, row.start, len(row.tokens)).work
        seconds = float(work @ TRUTH) * self._slowness
        self.now += seconds
        return Done(StepResult(plan.step, (), (), seconds, 0.0))


def tier(name: str, blocks: int) -> MemoryTier:
    return MemoryTier(name, np.zeros((blocks, 64), dtype=np.uint8))


def measured(runner: TimedRunner, config: SchedulerConfig, budget: float = 0.8) -> list[StepSample]:
    samples = calibrate(
        runner, config, tier(DEVICE, config.blocks), None, budget_seconds=budget, clock=lambda: runner.now
    )
    return [sample for sample in samples if isinstance(sample, StepSample)]


def test_a_model_is_known_after_it() -> None:
    runner = TimedRunner(CONFIG, context=2048)
    cost = CostModel.calibrated(measured(runner, CONFIG)).steps
    assert cost.coefficients[: len(TRUTH)] == pytest.approx(TRUTH, rel=0.03)
    assert runner.now < 1.0


def test_it_takes_its_time_and_no_more() -> None:
    """On a device so slow that a long prompt would take seconds, only what fits is measured."""
    runner = TimedRunner(CONFIG, context=2048, slowness=50.0)
    samples = measured(runner, CONFIG)
    assert 0.2 < runner.now < 1.2
    assert any(sample.prefill_tokens for sample in samples)
    assert all(sample.prefill_tokens < 1024 for sample in samples)


def test_of_a_step_that_takes_longer_than_all_its_time_one_is_measured() -> None:
    runner = TimedRunner(CONFIG, context=2048, slowness=1e5)
    assert len(measured(runner, CONFIG)) == len(runner.plans) == 1


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("context", [8, 32, 100, 2048])
@pytest.mark.parametrize("sequences", [1, 5])
def test_small_pools_short_contexts_and_few_sequences_are_kept_within(
    blocks: int, context: int, sequences: int
) -> None:
    """The runner's tables assert that no row is longer than they are."""
    config = replace(CONFIG, blocks=blocks, max_sequences=sequences, max_batch_tokens=64)
    runner = TimedRunner(config, min(context, blocks * config.block_size))
    measured(runner, config)
    for plan in runner.plans:
        assert sum(len(row.tokens) for row in plan.rows) <= 64
        assert all(row.start + len(row.tokens) <= context for row in plan.rows)


def test_no_shape_is_listed_twice() -> None:
    for context in (16, 32, 240, 4096, 100_000):
        listed = shapes(CONFIG, context)
        assert len(listed) == len(set(listed))


def test_copies_between_device_and_host_are_measured_both_ways() -> None:
    config = replace(CONFIG, residency=ResidencyConfig(host_blocks=20, copy_blocks=8))
    runner = TimedRunner(config, context=2048)
    samples = calibrate(runner, config, tier(DEVICE, 512), tier(HOST, 20), clock=lambda: runner.now)
    copies = [sample for sample in samples if isinstance(sample, CopySample)]
    assert {(copy.source, copy.target) for copy in copies} == {(DEVICE, HOST), (HOST, DEVICE)}
    assert {copy.bytes for copy in copies} == {64, 2 * 64, 8 * 64}
    assert all(copy.seconds > 0 for copy in copies)


@pytest.fixture(scope="module")
def shipped() -> Loaded:
    return load_model(SHIPPED, device=CPU, dtype="auto")


def test_tokens_after_a_calibration_are_those_without(
    shipped: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real runner and real tiers; what the calibration left in the pool is overwritten before it is read."""
    prompt = random_tokens(50, shipped.config.vocab_size, seed=1)
    config = replace(CONFIG, blocks=64, max_sequences=2, residency=ResidencyConfig(copy_blocks=4))
    untouched = greedy(shipped, prompt, 20)

    def calibrated(loaded: Loaded, **sizes: int) -> TabledRunner:
        runner = runner_for(loaded, **{**sizes, "kv_blocks": 64})
        device = pool_tier(runner.pool)
        host = host_tier(8, device.block_bytes, pinned=False)
        samples = calibrate(runner, config, device, host, budget_seconds=60.0)  # on a busy machine too
        assert any(isinstance(sample, StepSample) and sample.prefill_tokens for sample in samples)
        assert any(isinstance(sample, CopySample) and sample.bytes for sample in samples)
        return runner

    monkeypatch.setattr("tests.engine.models.runner_for", calibrated)
    assert greedy(shipped, prompt, 20) == untouched
