"""Saved ahead of a preemption: who is likely to give way owes little when it does, and no token changes for it."""

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from app.policy_metrics import PolicyMetrics
from engine.policy_set import PolicyConfig
from engine.records import StepAccounts
from engine.sequence import State
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, DISK, HOST
from policies.decisions import Kind
from tests.engine.driving import UNFORESEEN, Driver, core_config, request
from tests.engine.test_core import expected_tokens

REQUESTS = [request(f"r{n}", range(20 * n, 20 * n + 17), max_tokens=24) for n in range(4)]


TIERS = ResidencyConfig(host_blocks=64, copy_blocks=4)


def driver(
    ahead_steps: int, *, blocks: int = 30, victim: str = "last_admitted", residency: ResidencyConfig = TIERS
) -> Driver:
    """Nothing is saved by length or time: only ahead of a preemption, or at it."""
    policies = PolicyConfig(victim=victim, resume="reload", parameters=UNFORESEEN)
    return Driver(
        core_config(
            blocks=blocks,
            policies=policies,
            residency=residency,
            every_tokens=1000,
            every_seconds=1e9,
            ahead_steps=ahead_steps,
        )
    )


def owed_at_the_first_preemption(made: Driver) -> int:
    """Blocks whose copies down begin with the first preemption."""
    made.arrive(*REQUESTS)
    begun = 0
    while not made.core.scheduler.counts.preemptions:
        made.copies()
        assert not made.store.under_way
        assert made.step()
        begun = sum(len(copy.sources) for copy, *_ in made.store.under_way if copy.source == DEVICE)
    return begun


def finish(made: Driver) -> None:
    made.finish()
    for each in REQUESTS:
        assert made.tokens(each.id) == expected_tokens(each)


@pytest.mark.parametrize("victim", ["last_admitted", "cheapest_resume"])
@pytest.mark.parametrize("blocks", [26, 30, 34])
def test_tokens_are_those_without_pressure(victim: str, blocks: int) -> None:
    made = driver(8, victim=victim, blocks=blocks)
    made.arrive(*REQUESTS)
    finish(made)
    assert made.core.scheduler.counts.preemptions > 0
    assert made.core.scheduler.counts.saved_ahead_blocks > 0


def test_what_is_saved_ahead_is_told_with_each_step_and_counted_in_metrics() -> None:
    made, registry = driver(8), CollectorRegistry()
    accounts, metrics = StepAccounts(made.core.scheduler), PolicyMetrics(registry, {"engine": "0"}, (), {})
    made.arrive(*REQUESTS)
    while made.step():
        metrics.observe_step(accounts.record(made.accounts[-1]))
    saved = made.core.scheduler.counts.saved_ahead_blocks
    assert saved > 0
    assert registry.get_sample_value("sluice:saved_ahead_blocks_total", {"engine": "0"}) == saved


def test_a_preemption_owes_less() -> None:
    """One full block and the tail, at most, of those that it would owe otherwise."""
    late, ahead = driver(0), driver(8)
    before, owed = owed_at_the_first_preemption(late), owed_at_the_first_preemption(ahead)
    assert late.core.scheduler.counts.saved_ahead_blocks == 0
    assert owed <= 2 < before
    told = [each.decision for each in ahead.decided if each.decision.kind is Kind.SAVED_AHEAD]
    assert told
    assert "blocks will be missing in 8 steps" in told[0].reason
    finish(late)
    finish(ahead)


def test_nobody_is_saved_ahead_while_there_is_room() -> None:
    made = driver(8, blocks=64)
    made.arrive(*REQUESTS)
    finish(made)
    assert made.core.scheduler.counts.saved_ahead_blocks == 0


@pytest.mark.parametrize("residency", [replace(TIERS, pinned_share=0.01), replace(TIERS, spilling_blocks=4)])
def test_it_takes_no_more_than_its_share(residency: ResidencyConfig) -> None:
    """Neither of a tier, nor of the copies on their way: what cannot wait finds room."""
    made = driver(8, residency=residency)
    made.arrive(*REQUESTS)
    finish(made)
    assert made.core.scheduler.counts.preemptions > 0
    assert made.core.scheduler.counts.saved_ahead_blocks == 0


def test_what_is_needed_next_comes_up_from_the_disk_before_its_turn() -> None:
    """While those who run leave it no slot: disk → host, before it is admitted."""
    made = driver(0, blocks=64, residency=replace(TIERS, disk_blocks=64, transaction_blocks=4))
    made.tier_up()
    made.arrive(REQUESTS[0])
    made.finish()
    made.prune(DEVICE)
    made.prune(HOST)
    tiers = made.core.scheduler.residency
    assert len(tiers.disk) > 0
    assert len(tiers.host) == 0
    others = [request(f"o{n}", range(50 + n, 60 + n), max_tokens=20) for n in range(8)]
    made.arrive(*others, request("again", REQUESTS[0].prompt, max_tokens=4))
    made.step()
    made.copies()
    (waiter,) = made.core.sequences["again"]
    assert waiter.state is State.WAITING
    assert len(tiers.host) >= 4
    made.finish()
    assert made.core.scheduler.counts.hit_tokens[HOST] > 0
    assert made.core.scheduler.counts.hit_tokens[DISK] == 0
