"""The core with tiers below the device: what is saved comes back, whatever fails; nothing leaks, nobody is stuck.

A scripted runner's tokens are right only if every block that it reads is (tests/fakes.py), and its store spoils a
copy's target until the copy ends. So equal tokens mean that each reloaded block was the right one, in the right place.
"""

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.policy_set import PolicyConfig
from engine.request import Request
from engine.sequence import State
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, DISK, HOST, Loss
from policies.eviction import EVICTIONS
from policies.order import ORDERS
from policies.placement import PLACEMENTS
from policies.preemption import VICTIMS
from policies.resume import RESUMES
from tests.engine.driving import UNFORESEEN, Driver, core_config, request
from tests.engine.test_core import expected_tokens

PROMPT = range(1, 42)  # ten full blocks of four, and one token

SWITCHED = {
    "order": sorted(ORDERS),
    "victim": sorted(VICTIMS),
    "resume": sorted(RESUMES),
    "prediction": ["max_tokens", "histogram", "hint"],
    "eviction": sorted(EVICTIONS),
    "placement": sorted(PLACEMENTS),
}
"""Policies that change while they decide."""


def driver_with(host: int = 64, disk: int = 64, blocks: int = 64, **more: Any) -> Driver:
    """A driver whose tiers have these many blocks; a disk is up at once."""
    config = {key: more.pop(key) for key in ("pinned_share", "spilling_blocks") if key in more}
    chosen = {key: more.pop(key) for key in ("placement", "eviction", "resume") if key in more}
    if chosen and "policies" not in more:
        more["policies"] = PolicyConfig(parameters=UNFORESEEN, **chosen)
    residency = ResidencyConfig(host_blocks=host, disk_blocks=disk, transaction_blocks=4, **config)
    driver = Driver(core_config(blocks, residency=residency, **more))
    if disk:
        driver.tier_up()
    return driver


def routes(driver: Driver) -> Counter[tuple[str, str]]:
    """Blocks copied so far, by (source, target)."""
    return Counter({
        route: sum(len(copy.sources) for copy in driver.store.ended if (copy.source, copy.target) == route)
        for route in {(copy.source, copy.target) for copy in driver.store.ended}
    })  # fmt: skip


def run(driver: Driver, *asked: Request) -> None:
    driver.arrive(*asked)
    driver.finish()
    for each in asked:
        assert driver.tokens(each.id) == expected_tokens(each)


def steps_until(driver: Driver, id: str, tokens: int) -> None:
    """Until a running request has so many output tokens."""
    while len(driver.tokens(id) if (id, 0) in driver.deltas else ()) < tokens:
        assert driver.step()


# --- down: checkpoints and snapshots --------------------------------------------------------------------------------


def test_full_blocks_go_to_the_host_and_on_to_the_disk_while_it_runs() -> None:
    driver = driver_with()
    run(driver, request("a", PROMPT, max_tokens=24))
    assert routes(driver)[DEVICE, HOST] == 16  # 64 of 65 tokens have KV
    assert routes(driver)[HOST, DISK] == 16
    assert driver.core.scheduler.residency.quiet


@pytest.mark.parametrize(
    ("every_tokens", "every_seconds", "saved"), [(1000, 1000.0, 0), (12, 1000.0, 14), (1000, 8.0, 14)]
)
def test_it_is_saved_by_tokens_or_by_seconds_while_it_runs(
    every_tokens: int, every_seconds: float, saved: int
) -> None:
    """Of 41 tokens of prompt and 20 of answer; the driver's clock ticks once an event."""
    driver = driver_with(disk=0, every_tokens=every_tokens, every_seconds=every_seconds)
    driver.arrive(request("a", PROMPT, max_tokens=40))
    steps_until(driver, "a", 20)
    assert len(driver.core.scheduler.residency.host) == saved
    driver.finish()
    assert len(driver.core.scheduler.residency.host) == 20, "at its end all of it"


def test_a_preempted_sequence_comes_back_from_the_host_and_computes_nothing_again() -> None:
    driver = driver_with(disk=0)
    driver.arrive(request("a", PROMPT, max_tokens=24))
    steps_until(driver, "a", 8)
    driver.preempt("a")
    assert driver.core.sequences["a"][0].state is not State.RUNNING
    driver.copies()
    driver.prune(DEVICE)
    driver.finish()
    assert driver.tokens("a") == expected_tokens(request("a", PROMPT, max_tokens=24))
    ended = driver.finished["a", 0]
    assert (ended.preemptions, ended.recomputed_tokens) == (1, 1), "but for the row that was under way"
    assert driver.core.scheduler.counts.resumptions.keys() == {("reload", HOST)}
    assert driver.runner.computed_positions == len(PROMPT) + 23 + 1


def test_a_pool_of_a_third_of_demand_reloads_and_computes_nothing_again() -> None:
    driver = driver_with(host=1000, disk=0, blocks=20)
    run(driver, *(request(f"r{i}", range(i, i + 5), max_tokens=30, seed=i) for i in range(16)))
    counts = driver.core.scheduler.counts
    assert counts.preemptions > 10
    assert set(counts.resumptions) <= {("reload", HOST), ("reload", DEVICE)}
    assert sum(ended.recomputed_tokens for ended in driver.finished.values()) == 0


def test_with_steps_ahead_only_the_rows_under_way_are_computed_again() -> None:
    driver = driver_with(host=1000, disk=0, blocks=20, max_outstanding=2)
    run(driver, *(request(f"r{i}", range(i, i + 5), max_tokens=30, seed=i) for i in range(16)))
    again = sum(ended.recomputed_tokens for ended in driver.finished.values())
    assert 0 < again <= 8 * driver.core.scheduler.counts.preemptions
    assert driver.core.scheduler.counts.resumptions["reload", HOST] > 10


def test_without_a_host_it_comes_back_from_the_disk() -> None:
    driver = driver_with(host=0, disk=1000, blocks=20)
    run(driver, *(request(f"r{i}", range(i, i + 5), max_tokens=30, seed=i) for i in range(16)))
    assert driver.core.scheduler.counts.resumptions["reload", DISK] > 0
    assert routes(driver).keys() == {(DEVICE, DISK), (DISK, DEVICE)}
    assert sum(ended.recomputed_tokens for ended in driver.finished.values()) == 0


def test_host_and_disk_both_too_small_still_give_the_right_tokens() -> None:
    driver = driver_with(host=6, disk=7, blocks=20)
    run(driver, *(request(f"r{i}", range(i, i + 5), max_tokens=30, seed=i) for i in range(16)))
    assert driver.core.scheduler.counts.preemptions > 0
    assert driver.core.scheduler.residency.dropped_blocks > 0
    assert sum(ended.recomputed_tokens for ended in driver.finished.values()) > 0


def test_recompute_saves_nothing_more_and_takes_from_no_tier_below() -> None:
    driver = driver_with(host=1000, disk=0, blocks=20, resume="recompute")
    run(driver, *(request(f"r{i}", range(i, i + 5), max_tokens=30, seed=i) for i in range(16)))
    counts = driver.core.scheduler.counts
    assert counts.preemptions > 0
    assert (HOST, DEVICE) not in routes(driver)
    assert {tier for _, tier in counts.resumptions} <= {"none", DEVICE}


# --- up: prefixes of those who come later ----------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "disk", "tier"), [(64, 0, HOST), (64, 64, HOST), (0, 64, DISK)])
def test_a_returning_prompt_is_found_in_the_topmost_tier_that_has_it(host: int, disk: int, tier: str) -> None:
    driver = driver_with(host, disk)
    run(driver, request("a", PROMPT, max_tokens=4))
    driver.prune(DEVICE)
    run(driver, request("b", PROMPT, max_tokens=4))
    assert driver.finished["b", 0].cached_tokens == 40
    assert driver.core.scheduler.counts.hit_tokens == {tier: 40}


def test_what_has_left_the_host_is_found_on_disk_and_kept_in_the_host_again() -> None:
    driver = driver_with()
    run(driver, request("a", PROMPT, max_tokens=4))
    driver.prune(DEVICE)
    driver.prune(HOST)
    run(driver, request("b", PROMPT, max_tokens=4))
    assert driver.core.scheduler.counts.hit_tokens == {DISK: 40}
    driver.prune(DEVICE)
    run(driver, request("c", PROMPT, max_tokens=4))
    assert driver.core.scheduler.counts.hit_tokens == {DISK: 40, HOST: 40}


def test_those_who_wait_for_room_find_their_blocks_brought_up_from_the_disk() -> None:
    driver = driver_with(blocks=24, max_sequences=1)
    run(driver, request("a", PROMPT, max_tokens=4))
    driver.prune(DEVICE)
    driver.prune(HOST)
    driver.arrive(request("b", [7] * 30, max_tokens=40), request("c", PROMPT, max_tokens=4))
    driver.finish()
    assert routes(driver)[DISK, HOST] == 10
    assert driver.core.scheduler.counts.hit_tokens == {HOST: 40}
    assert driver.tokens("c") == expected_tokens(request("c", PROMPT, max_tokens=4))


def test_equal_prompts_fetch_once() -> None:
    driver = driver_with()
    run(driver, request("a", PROMPT, max_tokens=4))
    driver.prune(DEVICE)
    run(driver, *(request(f"b{i}", PROMPT, max_tokens=4) for i in range(4)))
    assert routes(driver)[HOST, DEVICE] == 10


def test_a_salt_separates_tenants_in_every_tier() -> None:
    for host, disk in ((64, 0), (0, 64)):
        driver = driver_with(host, disk)
        run(driver, request("a", PROMPT, max_tokens=4, salt="A"))
        driver.prune(DEVICE)
        driver.arrive(request("b", PROMPT, max_tokens=4, salt="B"))
        driver.finish()
        assert driver.finished["b", 0].cached_tokens == 0
        driver.arrive(request("a2", PROMPT, max_tokens=4, salt="A"))
        driver.finish()
        assert driver.finished["a2", 0].cached_tokens == 40


def test_a_restart_finds_what_the_disk_has() -> None:
    first = driver_with()
    run(first, request("a", PROMPT, max_tokens=24))
    records = tuple(entry.place for entry in first.core.scheduler.residency.disk.entries())
    second = driver_with(disk=0)
    second.core.scheduler.residency.disk.capacity = 64
    second.store.disk = first.store.disk
    second.tier_up(records=records)
    run(second, request("b", PROMPT, max_tokens=24))
    assert second.finished["b", 0].cached_tokens == 40


# --- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", list(Loss))
def test_what_is_lost_on_the_way_up_is_computed_again(loss: Loss) -> None:
    """Half of the blocks come, then one does not."""
    driver = driver_with(host=0)
    run(driver, request("a", PROMPT, max_tokens=4))
    driver.prune(DEVICE)
    driver.lost = lambda copy, place: loss if copy.target == DEVICE and place.depth == 5 else None
    run(driver, request("b", PROMPT, max_tokens=4))
    assert driver.core.scheduler.counts.reload_failures == 1
    assert driver.finished["b", 0].cached_tokens == 20
    driver.lost = lambda copy, place: None
    driver.prune(DEVICE)
    run(driver, request("c", PROMPT, max_tokens=4))
    assert driver.finished["c", 0].cached_tokens == 40, "what was computed again is saved again"


def test_a_tier_that_goes_down_half_way_sends_its_waiters_on() -> None:
    driver = driver_with(host=0)
    run(driver, request("a", PROMPT, max_tokens=4))
    driver.prune(DEVICE)
    driver.prompt_copies = False
    driver.arrive(request("b", PROMPT, max_tokens=4))
    assert driver.core.sequences["b"][0].state is State.LOADING
    hung = len(driver.store.under_way)
    driver.tier_down()
    while driver.step():
        pass
    assert driver.tokens("b") == expected_tokens(request("b", PROMPT, max_tokens=4)), (
        "it did not wait for the disk"
    )
    assert len(driver.store.under_way) == hung > 0
    driver.lost = lambda copy, place: Loss.DOWN
    driver.copies()
    driver.lost = lambda copy, place: None
    driver.tier_up()
    run(driver, request("c", range(50), max_tokens=4))
    assert driver.core.scheduler.residency.disk.up


def test_a_slot_that_a_hung_copy_may_still_write_is_nobodys() -> None:
    driver = driver_with(host=0, blocks=30)
    run(driver, request("a", PROMPT, max_tokens=4))
    driver.prune(DEVICE)
    driver.prompt_copies = False
    driver.arrive(request("b", PROMPT, max_tokens=4))
    targets = {place.slot for copy, *_ in driver.store.under_way for place in copy.targets}
    driver.cancel("b")
    driver.tier_down()
    driver.arrive(*(request(f"c{i}", [i] * 20, max_tokens=30) for i in range(8)))
    while driver.step():
        used = {block for sequence in driver.core.scheduler.running for block in sequence.table}
        assert not used & targets
    assert all((f"c{i}", 0) in driver.finished for i in range(8))
    driver.finish()


def test_writes_that_fail_are_counted_and_cost_nothing_else() -> None:
    driver = driver_with(host=0)
    driver.lost = lambda copy, place: Loss.FULL
    run(driver, request("a", PROMPT, max_tokens=24))
    assert driver.core.scheduler.residency.dropped_blocks > 0
    assert len(driver.core.scheduler.residency.disk) == 0
    driver.lost = lambda copy, place: None
    run(driver, request("b", PROMPT, max_tokens=24))
    assert len(driver.core.scheduler.residency.disk) > 0, "it takes again when there is room again"


def test_a_pool_full_of_half_resumed_sequences_cannot_deadlock() -> None:
    """Eight that each need most of the pool come back at once, while their copies end in the worst order."""
    driver = driver_with(host=1000, disk=0, blocks=24)
    asked = [request(f"r{i}", [i] * 60, max_tokens=20) for i in range(8)]
    driver.arrive(*asked)
    driver.prompt_copies = False
    for count in range(3000):
        if driver.core.idle:
            break
        if count % 7 == 0:
            for i in range(8):
                driver.preempt(f"r{i}")
        if not (driver.copy(-1) if count % 3 == 0 else driver.step()):
            driver.step() or driver.copy(-1)
    driver.finish()
    assert driver.core.scheduler.counts.preemptions > 20
    for each in asked:
        assert driver.tokens(each.id) == expected_tokens(each)


@pytest.mark.parametrize("placement", ["write_through", "selective", "on_evict"])
@pytest.mark.parametrize("eviction", ["lru", "lfu", "cost"])
def test_every_placement_and_eviction_keeps_the_books(placement: str, eviction: str) -> None:
    driver = driver_with(host=24, disk=40, blocks=24, placement=placement, eviction=eviction)
    asked = [request(f"r{i}", [i % 5] * (10 + i % 4 * 8), max_tokens=12, seed=i % 2) for i in range(40)]
    run(driver, *asked)
    assert routes(driver)[HOST, DISK] > 0
    assert len(driver.core.scheduler.residency.disk) <= 40


def test_on_evict_writes_only_what_the_host_has_no_room_for() -> None:
    driver = driver_with(host=64, disk=64, placement="on_evict")
    run(driver, request("a", PROMPT, max_tokens=4))
    assert routes(driver)[HOST, DISK] == 0
    run(driver, *(request(f"r{i}", [i] * 41, max_tokens=4) for i in range(8)))
    assert routes(driver)[HOST, DISK] > 0


def test_selective_writes_what_was_used_again() -> None:
    driver = driver_with(placement="selective")
    run(driver, request("a", PROMPT, max_tokens=4))
    assert routes(driver)[HOST, DISK] == 0
    run(driver, request("b", PROMPT, max_tokens=4))
    assert routes(driver)[HOST, DISK] == 10


def test_a_scan_turns_lru_over_and_lfu_not() -> None:
    left = {}
    for eviction in ("lru", "lfu"):
        driver = driver_with(host=30, disk=0, eviction=eviction)
        for turn in range(3):
            run(driver, request(f"a{turn}", PROMPT, max_tokens=4))
        run(driver, *(request(f"r{i}", [i] * 41, max_tokens=4) for i in range(10)))
        driver.prune(DEVICE)
        run(driver, request("again", PROMPT, max_tokens=4))
        left[eviction] = driver.finished["again", 0].cached_tokens
    assert left["lru"] == 0
    assert left["lfu"] >= 32


# --- any order of anything -------------------------------------------------------------------------------------------


TIGHT = PolicyConfig(
    parameters={
        "admission": {"risk": 1.0, "wait_steps": 2},
        "promotion": {"service_tokens": 60, "demotions": 3},
    }
)
"""Pressure, with bounds so narrow that promotions and what follows from them happen all the time."""


class Store(RuleBasedStateMachine):
    """Requests come and leave, steps and copies end in any order, copies fail, tiers fail and heal."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = driver_with(
            host=12, disk=20, blocks=16, max_queue=20, max_outstanding=2, spilling_blocks=6, policies=TIGHT
        )
        self.driver.prompt_copies = False
        self.driver.tick = 1e-4  # else every load seems to have waited for ages, and is avoided
        self.asked: dict[str, Request] = {}
        self.cancelled: set[str] = set()

    @rule(
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 30),
        family=st.integers(0, 2),
        n=st.integers(1, 2),
    )
    def arrive(self, length: int, max_tokens: int, family: int, n: int) -> None:
        asked = request(f"r{len(self.asked)}", [family] * length, max_tokens, n=n)
        self.asked[asked.id] = asked
        self.driver.arrive(asked)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.asked)))
        self.cancelled.add(id)
        self.driver.cancel(id)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.driver.preempt(data.draw(st.sampled_from(sorted(self.asked))))

    @rule(names=st.fixed_dictionaries({family: st.sampled_from(each) for family, each in SWITCHED.items()}))
    def switch(self, names: dict[str, str]) -> None:
        self.driver.use_policies(**names)

    @rule(steps=st.integers(1, 10))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.driver.step()

    @rule(which=st.integers(0, 10), lost=st.integers(0, 7))
    def copy_ends(self, which: int, lost: int) -> None:
        self.driver.lost = lambda copy, place: Loss.CORRUPT if lost == 7 and place.depth % 2 else None
        self.end(which)
        self.driver.lost = lambda copy, place: None

    def end(self, which: int) -> None:
        """Writes to the disk end in their order, as it has one writer; others in any."""
        under_way = self.driver.store.under_way
        if under_way:
            chosen = under_way[which % len(under_way)][0]
            if chosen.target == DISK:
                chosen = next(copy for copy, *_ in under_way if copy.target == DISK)
            self.driver.copy([copy for copy, *_ in under_way].index(chosen))

    @rule(tier=st.sampled_from([DEVICE, HOST, DISK]), blocks=st.integers(0, 4))
    def prune(self, tier: str, blocks: int) -> None:
        self.driver.prune(tier, blocks)

    @precondition(lambda self: self.driver.core.scheduler.residency.disk.up)
    @rule()
    def disk_fails(self) -> None:
        self.driver.tier_down()

    @precondition(lambda self: not self.driver.core.scheduler.residency.disk.up)
    @rule()
    def disk_heals(self) -> None:
        under_way = self.driver.store.under_way
        while those := [i for i, (copy, *_) in enumerate(under_way) if DISK in (copy.source, copy.target)]:
            self.end(those[0])
        self.driver.store.disk.clear()
        self.driver.tier_up()

    @invariant()
    def work_is_under_way_unless_idle(self) -> None:
        driver = self.driver
        assert driver.core.idle or driver._under_way or driver.store.under_way

    def teardown(self) -> None:
        self.driver.finish()
        assert self.driver.core.scheduler.residency.quiet
        for id, asked in self.asked.items():
            if id not in self.cancelled and id not in self.driver.rejected:
                for choice in range(asked.n):
                    assert self.driver.tokens(id, choice) == expected_tokens(asked, choice)


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_long_random_runs_lose_nothing_and_leave_nothing() -> None:
    """As the state machine, but long: 28 runs of 400 events, with everything that can go wrong going wrong often."""
    totals: Counter[str] = Counter()
    for seed in range(28):
        choose, machine = Random(seed), Store()
        for _ in range(400):
            _one_event(machine, choose)
            machine.work_is_under_way_unless_idle()
        machine.teardown()
        counts = machine.driver.core.scheduler.counts
        totals.update(
            {
                "cancelled": len(machine.cancelled),
                "preempted": counts.preemptions,
                "failed loads": counts.reload_failures,
                "reloaded": sum(n for (way, tier), n in counts.resumptions.items() if tier in (HOST, DISK)),
                "found below": counts.hit_tokens[HOST] + counts.hit_tokens[DISK],
                "computed again": counts.resumptions["recompute", "none"],
                "split": sum(n for (way, _), n in counts.resumptions.items() if way == "split"),
                "promoted": sum(counts.promotions.values()),
                "displaced": counts.preemptions_by["displaced"],
            }
        )
    assert all(totals[what] > 20 for what in totals), totals


def _one_event(machine: Store, choose: Random) -> None:
    driver, dice = machine.driver, choose.random()
    if dice < 0.14:
        machine.arrive(
            choose.randint(1, 30), choose.randint(1, 30), choose.randint(0, 2), choose.randint(1, 2)
        )
    elif dice < 0.19 and driver.core.sequences:
        id = choose.choice(sorted(driver.core.sequences))
        machine.cancelled.add(id)
        driver.cancel(id)
    elif dice < 0.20:
        machine.switch({family: choose.choice(names) for family, names in SWITCHED.items()})
    elif dice < 0.25 and driver.core.sequences:
        driver.preempt(choose.choice(sorted(driver.core.sequences)))
    elif dice < 0.60:
        driver.step()
    elif dice < 0.95:
        machine.copy_ends(choose.randint(0, 10), choose.randint(6, 7))
    elif dice < 0.98:
        machine.prune(choose.choice([DEVICE, HOST, DISK]), choose.randint(0, 4))
    elif driver.core.scheduler.residency.disk.up:
        machine.disk_fails()
    else:
        machine.disk_heals()
