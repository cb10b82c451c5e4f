"""How often the dear questions are asked in one step: by who gives way, not by how many run or lack a block."""

from collections import Counter
from typing import Any

import pytest

from engine.policy_set import PolicyConfig
from engine.valuation import Valuation
from kvstore.below import ResidencyConfig
from kvstore.flights import Flights
from policies.cost import CopyCost
from policies.pricing import RECOMPUTE, RELOAD, SPLIT, Situation, Standing, ways
from policies.resume import RESUMES
from tests.engine.driving import UNFORESEEN, Driver, core_config, request

RUNNING = 24


def counted(monkeypatch: pytest.MonkeyPatch, kind: type, *names: str) -> Counter[str]:
    """How often these methods are called from now on."""
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(kind, name)

        def call(self: Any, *asked: Any, **named: Any) -> Any:
            calls[name] += 1
            return real(self, *asked, **named)

        monkeypatch.setattr(kind, name, call)

    for name in names:
        count(name)
    return calls


def crowded(order: str) -> Driver:
    """All run in step, so that all lack a block at once; half of the blocks that they come to need."""
    policies = PolicyConfig(
        order=order,
        victim="cheapest_resume",
        resume="cheapest",
        prediction="max_tokens",
        parameters=UNFORESEEN,
    )
    driver = Driver(
        core_config(
            blocks=RUNNING * 6,
            max_batch_tokens=256,
            max_sequences=RUNNING,
            policies=policies,
            residency=ResidencyConfig(host_blocks=1000, spilling_blocks=1000),
        )
    )
    driver.arrive(*(request(f"r{n}", range(n, n + 8), 40) for n in range(2 * RUNNING)))
    return driver


@pytest.mark.parametrize("order", ["sjf", "hybrid"])
def test_what_is_on_its_way_out_is_counted_once_and_after_each_preemption(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = crowded(order)
    calls = counted(monkeypatch, Flights, "leaving")
    counts, most_lacking = driver.core.scheduler.counts, 0
    while driver.core.scheduler.waiting:
        driver.copies()
        lacking = sum(s.remaining > 0 and s.computed % 4 == 3 for s in driver.core.scheduler.running)
        most_lacking = max(most_lacking, lacking)
        before, preempted = calls["leaving"], counts.preemptions
        assert driver.step()
        asked, gone = calls["leaving"] - before, counts.preemptions - preempted
        assert asked <= 2 + 2 * gone  # as they grow, and as the first in line wants a place
    assert counts.preemptions > 0
    assert most_lacking > RUNNING // 2


def test_who_is_beside_a_victim_is_summed_up_as_often_as_somebody_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = crowded("hybrid")
    calls = counted(monkeypatch, Valuation, "situation", "price", "stake")
    counts = driver.core.scheduler.counts
    while driver.core.scheduler.waiting:
        driver.copies()
        before, preempted, loaded = calls["situation"], counts.preemptions, counts.resumptions.total()
        assert driver.step()
        gone = counts.preemptions - preempted + counts.resumptions.total() - loaded
        loading = len(driver.core.scheduler.loading)
        assert calls["situation"] - before <= 3 + 3 * gone + loading
    assert counts.preemptions > 0


@pytest.mark.parametrize("blocks", [2, 16, 512])
def test_where_loading_is_quick_a_split_is_priced_without_a_search(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = crowded("fcfs")
    calls = counted(monkeypatch, CopyCost, "reload_seconds")
    standing = Standing(0, (("host", blocks),), 4 * blocks, 4 * blocks)
    situation = driver.core.scheduler.valuation.situation(driver.core.scheduler.running)
    found = ways(standing, 1.0, situation, RESUMES["cheapest"]().enabled)
    assert [each.name for each in found] == [RELOAD, SPLIT, RECOMPUTE]
    assert found[1].first_fetched == 1
    assert calls["reload_seconds"] <= 3


@pytest.mark.parametrize("slowness", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("blocks", range(2, 40))
def test_a_split_is_where_computing_and_loading_end_together(blocks: int, slowness: float) -> None:
    """The search finds what looking at every head finds: the first that computing ends last of, or the one before."""
    situation = crowded("fcfs").core.scheduler.valuation.situation(())
    slow = situation._replace(copies=Slow(slowness * 1e-5))
    found = ways(Standing(0, (("host", blocks),), 4 * blocks, 4 * blocks), 1.0, slow, (SPLIT,))[0]
    everywhere = [seconds_split_at(head, blocks, slow) for head in range(1, blocks)]
    assert found.seconds == pytest.approx(min(everywhere))


class Slow:
    """Copies that take so long a byte, and nothing else."""

    def __init__(self, byte: float) -> None:
        self._byte = byte

    def seconds(self, source: str, target: str, size: int) -> float:
        return size * self._byte

    def reload_seconds(self, source: str, size: int, copy_bytes: int, ahead_bytes: int = 0) -> float:
        return size * self._byte


def seconds_split_at(head: int, blocks: int, situation: Situation) -> float:
    count = head * situation.block_tokens
    chunks = -(-count // situation.chunk)
    computing = chunks * situation.step_seconds + situation.steps.added_seconds(0, count)
    return max(computing, (blocks - head) * situation.block_bytes * situation.copies.reload_seconds("", 1, 1))
