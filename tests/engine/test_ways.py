"""Ways back: what is predicted decides, each way really is what it says, and none changes a token.

A scripted runner's tokens are right only if every position of every block that it reads is (tests/fakes.py).
"""

from typing import Any

import pytest

from engine.events import Resumed
from engine.policy_set import PolicyConfig
from engine.sequence import Sequence, State
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, DISK, HOST, Loss
from policies.cost import CopySample, StepSample
from policies.decisions import Kind
from policies.order import still_to_compute
from policies.pricing import RECOMPUTE, RELOAD, Standing, ways
from policies.promotion import Promotion
from tests.engine.driving import UNFORESEEN, Driver, core_config, request
from tests.engine.test_core import expected_tokens

PROMPT = range(1, 42)  # ten full blocks of four, and one token
QUICK, SLOW = 1e-6, 10.0


def driver(resume: str, *, load_seconds: float = 1e-3, step_seconds: float = 1e-3, **more: Any) -> Driver:
    """Tiers of 64 blocks, of which one copy has four; samples say how long copies and prefill steps take."""
    residency = ResidencyConfig(host_blocks=64, disk_blocks=64, transaction_blocks=4, copy_blocks=4)
    policies = PolicyConfig(victim="cheapest_resume", resume=resume, parameters=UNFORESEEN)
    made = Driver(
        core_config(residency=residency, policies=policies, **more),
        calibration=(
            *(StepSample(n, n * n / 2, 0, 0, step_seconds * n) for n in (4, 8, 16) for _ in range(8)),
            *(StepSample(0, 0.0, n, 40 * n, step_seconds) for n in (1, 2, 4) for _ in range(8)),
            *(CopySample(tier, DEVICE, 4000, load_seconds, 0.0) for tier in (HOST, DISK) for _ in range(8)),
        ),
    )
    made.tier_up()
    made.prompt_copies = False
    return made


def preempted(made: Driver, id: str = "a") -> Sequence:
    """A request that has given up its place, with everything saved and nothing of it on the device."""
    made.arrive(request(id, PROMPT, max_tokens=12))
    while len(made.deltas.get((id, 0), ())) < 4:
        assert made.step() or made.copy()
    made.copies()
    (sequence,) = made.core.sequences[id]
    made.arrive(request("other", range(60, 70), max_tokens=40))  # so that the device has something to do
    made.step()
    made.preempt(id)
    assert sequence.state is State.WAITING
    made.prune(DEVICE)
    while sequence.state is State.WAITING:
        assert made.copy() or made.step()
    return sequence


def finish(made: Driver, id: str = "a") -> Resumed:
    made.finish()
    assert made.tokens(id) == expected_tokens(request(id, PROMPT, max_tokens=12))
    (resumed,) = [each for each in made.resumed if each.request_id == id]
    return resumed


@pytest.mark.parametrize("load_first", [True, False])
@pytest.mark.parametrize("max_outstanding", [1, 2])
def test_a_split_computes_its_head_and_loads_the_rest(load_first: bool, max_outstanding: int) -> None:
    """At least a block each, whichever is over first; and nothing that was loaded is computed."""
    made = driver("split", max_outstanding=max_outstanding)
    sequence = preempted(made)
    assert sequence.state is State.RUNNING
    assert sequence.head_end >= 4
    head = sequence.head_end
    loads = [copy for copy, *_ in made.store.under_way if copy.target == DEVICE]
    assert sum(len(copy.sources) for copy in loads) >= 1
    if load_first:
        made.copies()
        assert sequence.head_end or sequence.computed > head
    else:
        while sequence.computed < head:
            assert made.step()
        assert sequence.head_end == head, "it must wait for what loads"
    assert finish(made).way == "split"
    assert 4 <= sequence.recomputed_tokens < 41
    assert made.core.scheduler.counts.resumptions["split", HOST] == 1


def test_what_a_split_lacks_is_computed() -> None:
    """A block in the middle of what loads does not come: what came before it counts, the rest is computed again."""
    made = driver("split", step_seconds=1e-2)
    made.lost = lambda copy, place: Loss.CORRUPT if copy.target == DEVICE and place.depth >= 6 else None
    sequence = preempted(made)
    assert sequence.head_end == 4
    assert finish(made).way == "split"
    assert made.core.scheduler.counts.reload_failures == 0


def test_what_a_newcomers_split_lacks_does_not_count_as_cached() -> None:
    """Ten blocks are found, the first is computed meanwhile; of the others five come, or all."""
    cached = []
    for lost in (False, True):
        made = driver("split", step_seconds=1e-2)
        made.arrive(request("before", PROMPT, max_tokens=1))
        made.finish()
        made.prune(DEVICE)
        if lost:
            made.lost = lambda copy, place: Loss.CORRUPT if place.depth == 6 else None
        made.arrive(request("a", PROMPT, max_tokens=12))
        made.finish()
        assert made.tokens("a") == expected_tokens(request("a", PROMPT, max_tokens=12))
        cached.append(made.finished["a", 0].cached_tokens)
        told = [each.decision.kind for each in made.decided if each.request_id == "a"]
        assert told.count(Kind.LOAD_FAILED) == lost
    assert cached == [36, 20]


def test_a_split_that_gets_nothing_computes_everything() -> None:
    made = driver("split")
    made.lost = lambda copy, place: Loss.CORRUPT if copy.target == DEVICE else None
    sequence = preempted(made)
    finish(made)
    assert sequence.recomputed_tokens >= 44 - 4


def test_a_split_may_be_preempted_half_way() -> None:
    """Copies still write to its blocks then, which are nobody's until these have ended."""
    made = driver("split")
    sequence = preempted(made)
    assert sequence.head_end
    made.preempt("a")
    assert sequence.state is State.WAITING
    made.finish()
    assert made.tokens("a") == expected_tokens(request("a", PROMPT, max_tokens=12))


def test_a_split_may_be_cancelled_half_way() -> None:
    made = driver("split")
    assert preempted(made).head_end
    made.cancel("a")
    made.finish()


def test_a_tier_that_goes_down_under_a_split_costs_only_time() -> None:
    """Its copies may hang for ever with their hands on the sequence's blocks: it goes on with others."""
    made = driver("split")
    made.prune(HOST)
    sequence = preempted(made)
    made.copies()
    made.preempt("a")
    made.prune(DEVICE)
    made.prune(HOST)
    while not sequence.head_end:
        assert made.step() or made.copy()
    if any(copy.source == DISK for copy, *_ in made.store.under_way):
        made.tier_down()
        assert sequence.state is State.WAITING
    made.finish()
    assert made.tokens("a") == expected_tokens(request("a", PROMPT, max_tokens=12))


@pytest.mark.parametrize(
    ("load", "step", "way"),
    [(QUICK, SLOW, "reload"), (SLOW, QUICK, "recompute"), (0.02, 0.0005, "split")],
)
def test_the_cheapest_way_is_taken(load: float, step: float, way: str) -> None:
    """Loading ten blocks against computing forty positions, by what calibration has seen of both."""
    made = driver("cheapest", load_seconds=load, step_seconds=step)
    sequence = preempted(made)
    admitted = [each.decision for each in made.decided if each.decision.kind is Kind.ADMITTED][-1]
    assert admitted.chosen == way
    assert {each.name for each in admitted.alternatives} == {"reload", "split", "recompute"}
    assert min(admitted.alternatives, key=lambda each: each.price).name == way
    resumed = finish(made)
    assert resumed.way == way
    assert resumed.predicted_seconds > 0
    assert resumed.actual_seconds > 0
    assert resumed.regret_seconds is not None
    assert (sequence.recomputed_tokens > 1) == (way != "reload")  # the step under way counts for one


def test_what_comes_in_after_it_is_in_what_is_predicted() -> None:
    """The step in which it is computed again has the newcomers' prompts too."""
    assert predicted_beside(late=100) > 1.5 * predicted_beside(late=1)


def predicted_beside(late: int) -> float:
    """Seconds of a recompute, when a prompt of so many tokens is taken in after it."""
    made = driver("recompute", max_batch_tokens=256)
    made.arrive(request("a", PROMPT, max_tokens=12))
    while len(made.deltas.get(("a", 0), ())) < 4:
        assert made.step() or made.copy()
    made.preempt("a")
    made.prune(DEVICE)
    made.arrive(request("late", range(100, 100 + late), max_tokens=2))
    (sequence,) = made.core.sequences["a"]
    while sequence.state is State.WAITING:
        assert made.step()
    return finish(made).predicted_seconds


@pytest.mark.parametrize("max_outstanding", [1, 2])
@pytest.mark.parametrize("way", ["reload", "recompute"])
def test_a_way_back_is_predicted_until_its_sequence_runs(way: str, max_outstanding: int) -> None:
    """A load that is sooner done than the step beside it ends with that; who is computed again waits for the one that
    was told before. Steps take as long as the samples say.
    """
    residency = ResidencyConfig(host_blocks=64, copy_blocks=4)
    policies = PolicyConfig(resume=way, parameters=UNFORESEEN)
    steps = [StepSample(n, n * n / 2, 0, 0, 1e-3) for n in (4, 8, 16)] + [StepSample(0, 0.0, 1, 9, 1e-3)] * 3
    steps.append(StepSample(0, 0.0, 1, 9, 1e-3, copies=1, copied_bytes=4000))  # what a copy takes is hidden
    made = Driver(
        core_config(residency=residency, policies=policies, max_outstanding=max_outstanding),
        calibration=(*steps * 8, *[CopySample(HOST, DEVICE, 4000, 1e-6, 0.0)] * 8),
    )
    made.tick, made.runner.seconds, made.store.seconds = 0.0, 1e-3, 1e-6
    made.arrive(request("a", range(1, 6), max_tokens=12))
    while len(made.deltas.get(("a", 0), ())) < 4:
        assert made.step() or made.copy()
    made.copies()
    made.arrive(request("other", range(60, 62), max_tokens=40))
    made.step()
    made.preempt("a")
    made.prune(DEVICE)
    made.finish()
    (resumed,) = made.resumed
    count = 2 if (way, max_outstanding) == ("recompute", 2) else 1
    assert resumed.actual_seconds == pytest.approx(1e-3 * count, rel=0.01)
    assert resumed.predicted_seconds == pytest.approx(1e-3 * count, rel=0.15)


def test_who_is_loaded_joins_the_first_step_that_is_made_after() -> None:
    made = driver("cheapest")
    made.arrive(request("a", PROMPT, max_tokens=12))
    made.step()
    situation = made.core.scheduler.valuation.situation(made.core.scheduler.running)
    nobody = made.core.scheduler.valuation.situation(())
    assert nobody.joins(0.3) == 0.3
    beside = situation._replace(next_seconds=2.0, step_seconds=1.0, ahead_seconds=0.0)
    assert [beside.joins(at) for at in (0.0, 2.0, 2.5, 3.5)] == [2.0, 2.0, 3.0, 4.0]
    behind = beside._replace(ahead_seconds=0.5)
    assert [behind.joins(at) for at in (0.0, 0.6, 2.6)] == [0.5, 2.5, 3.5]
    assert (beside.token_seconds, behind.token_seconds) == (1.0, 3.0)
    made.finish()


def test_decisions_turn_when_a_tier_becomes_slow_and_turn_back() -> None:
    """A dozen copies that take long are enough to compute instead; a dozen quick ones to load again."""
    made = driver("cheapest", load_seconds=1e-3, step_seconds=0.01)
    made.tick, made.runner.seconds, made.prompt_copies = 1e-6, 0.05, True
    chosen = []
    for round, seconds in enumerate([1e-3] * 3 + [60.0] * 14 + [1e-3] * 30):
        made.store.seconds = seconds
        id = f"r{round}"
        made.arrive(request(id, [round] * 41, max_tokens=8))
        while len(made.deltas.get((id, 0), ())) < 4:
            assert made.step() or made.copy()
        made.copies()
        made.prune(DEVICE)
        made.preempt(id)
        made.prune(DEVICE)
        made.finish()
        chosen += [each.way for each in made.resumed if each.request_id == id]
    assert chosen[:3] == ["reload"] * 3
    assert "recompute" in chosen[3:17]
    assert chosen[-1] == "reload"


@pytest.mark.parametrize(("load", "step", "saved"), [(QUICK, SLOW, True), (SLOW, QUICK, False)])
def test_who_is_computed_again_more_cheaply_is_not_saved(load: float, step: float, saved: bool) -> None:
    """What is on its way to a slow tier holds its blocks on the device, and nobody would load it."""
    made = driver("cheapest", load_seconds=load, step_seconds=step, every_tokens=1000)
    flights = made.core.scheduler.residency.flights
    made.arrive(request("a", PROMPT, max_tokens=12))
    while len(made.deltas.get(("a", 0), ())) < 4:
        assert made.step()
    assert flights.spilling == 0
    made.preempt("a")
    assert (flights.spilling > 0) == saved
    made.finish()
    assert made.tokens("a") == expected_tokens(request("a", PROMPT, max_tokens=12))


@pytest.mark.parametrize(("load", "more"), [(QUICK, True), (SLOW, False)])
def test_nothing_is_saved_ahead_of_need_behind_a_slow_way_down(load: float, more: bool) -> None:
    made = driver("cheapest", load_seconds=load, every_tokens=4)
    flights = made.core.scheduler.residency.flights
    made.arrive(request("a", PROMPT, max_tokens=12))
    while not flights.spilling:
        assert made.step()
    first = flights.spilling
    while len(made.deltas.get(("a", 0), ())) < 10:
        assert made.step()
    assert (flights.spilling > first) == more
    made.finish()


def test_nobody_gives_way_to_a_peer_only_to_be_computed_again() -> None:
    """All of it could be loaded; on a slow tier it would not be."""
    for load, step, whole in ((QUICK, SLOW, True), (SLOW, QUICK, False)):
        made = driver("cheapest", load_seconds=load, step_seconds=step)
        made.arrive(request("a", PROMPT, max_tokens=12))
        while len(made.deltas.get(("a", 0), ())) < 4:
            assert made.step() or made.copy()
        valuation, running = made.core.scheduler.valuation, made.core.scheduler.running
        assert valuation.comes_back_whole(running[0], valuation.situation(running)) == whole
        made.finish()


def test_the_victim_is_whose_way_back_costs_least() -> None:
    """With nowhere to save, the one with the longest context is spared, though it came last."""
    policies = PolicyConfig(victim="cheapest_resume", resume="recompute", parameters=UNFORESEEN)
    made = Driver(core_config(blocks=24, policies=policies))
    made.arrive(request("short", range(5), max_tokens=60), request("long", range(20, 61), max_tokens=40))
    while not made.core.scheduler.counts.preemptions:
        assert made.step()
    (victim,) = [each for each in made.decided if each.decision.kind is Kind.PREEMPTED][:1]
    prices = {each.name: each.price for each in victim.decision.alternatives}
    assert prices[victim.request_id] == min(prices.values())
    made.finish()


@pytest.mark.parametrize(("resume", "charged"), [("recompute", 0.0), ("reload", 1.0)])
def test_saving_is_in_the_price_weighted_of_those_alone_who_would_be_saved(
    resume: str, charged: float
) -> None:
    made = driver(resume, every_tokens=1000)
    made.arrive(request("a", PROMPT, max_tokens=12))
    while not made.deltas:
        assert made.step()
    valuation, (sequence,) = made.core.scheduler.valuation, made.core.scheduler.running

    def price(saved: int) -> float:
        sequence.saved = saved
        frees = len(sequence.table)
        return frees * valuation.price(sequence, frees, valuation.situation((sequence,)))

    for weight in (1.0, 8.0):
        sequence.weight = weight
        saving = price(saved=0) - price(saved=len(sequence.table))
        assert saving == pytest.approx(charged * weight * valuation.saving_seconds(len(sequence.table)))


def test_who_has_nothing_to_save_does_not_wait_for_what_others_save() -> None:
    made = driver("reload", every_tokens=1000)
    made.arrive(request("a", PROMPT, max_tokens=12), request("b", range(60, 90), max_tokens=12))
    while len(made.deltas) < 2:
        assert made.step()
    scheduler = made.core.scheduler
    (sequence, *_), valuation = scheduler.running, scheduler.valuation
    sequence.saved = len(sequence.table)
    before = valuation.price(sequence, 1, valuation.situation(scheduler.running))
    made.preempt("b")
    assert valuation.saving_seconds() > 0, "b's blocks are on their way down"
    sequence.saved = len(sequence.table)
    alone = valuation.price(sequence, 1, valuation.situation(scheduler.running))
    assert alone <= before


@pytest.mark.parametrize("resume", ["recompute", "reload"])
def test_what_no_tier_keeps_of_a_preempted_one_is_still_to_compute(resume: str) -> None:
    made = driver(resume, max_sequences=1)
    made.use_policies(order="sjf")
    made.arrive(request("a", PROMPT, max_tokens=12))
    while not made.deltas:
        assert made.step()
    made.arrive(request("shorter", range(60, 70), max_tokens=3))
    made.preempt("a")
    made.copies()
    made.prune(DEVICE)
    (sequence,) = made.core.sequences["a"]
    assert sequence.state is State.WAITING
    assert sequence.snapshot
    computed = sequence.snapshot.computed
    kept = computed if resume == "reload" else 0
    made.core.scheduler.life.intake.match(sequence)
    assert (sequence.kept_tokens, still_to_compute(sequence)) == (kept, len(sequence.tokens) - kept)
    promotion = Promotion(kv_blocks_tokens=computed)
    assert promotion.reason_at_enqueue(sequence) == ("kv_held" if kept else None)
    made.tier_down(HOST)
    made.tier_down(DISK)
    made.core.scheduler.life.intake.match(sequence)
    assert (sequence.kept_tokens, still_to_compute(sequence)) == (0, len(sequence.tokens))
    made.finish()


def test_prompts_under_way_delay_what_is_computed_again_but_not_what_is_loaded() -> None:
    made = driver("cheapest", max_batch_tokens=16)
    valuation, running = made.core.scheduler.valuation, made.core.scheduler.running
    made.arrive(request("a", range(60), max_tokens=2))
    while running[0].computed < 16:
        made.step()
    situation = valuation.situation(running)
    assert situation.prompts_seconds == valuation.costs.steps.added_seconds(
        running[0].scheduled, running[0].remaining
    )
    standing = Standing(device_tokens=4, below=((HOST, 9),), below_tokens=36, total=40)
    alone = situation._replace(prompts_seconds=0.0)
    beside, without = (
        {way.name: way.seconds for way in ways(standing, 1.0, each, (RECOMPUTE, RELOAD))}
        for each in (situation, alone)
    )
    assert beside[RECOMPUTE] == pytest.approx(without[RECOMPUTE] + situation.prompts_seconds)
    assert beside[RELOAD] == without[RELOAD]
    made.finish()
    assert valuation.situation(running).prompts_seconds == 0.0


@pytest.mark.parametrize(("copy_seconds", "stands_still"), [(QUICK, True), (SLOW, False)])
def test_who_lacks_a_block_waits_for_one_on_its_way_down_unless_the_tier_is_slow(
    copy_seconds: float, stands_still: bool
) -> None:
    """The blocks of one that has ended are being saved, and the two others fill the rest of the pool."""
    made = driver("cheapest", load_seconds=copy_seconds, blocks=20)
    made.arrive(
        request("a", PROMPT, max_tokens=2),
        request("b", range(50, 58), max_tokens=60),
        request("c", range(70, 78), max_tokens=60),
    )
    scheduler = made.core.scheduler
    while ("a", 0) not in made.finished:
        assert made.step()
    assert scheduler.residency.leaving >= 4
    while scheduler.counts.preemptions == 0 and made.step():
        pass
    assert (scheduler.counts.preemptions == 0) == stands_still
    assert scheduler.residency.leaving >= 4
    made.finish()


@pytest.mark.parametrize("resume", ["recompute", "reload"])
def test_the_last_that_runs_may_give_way_to_itself_while_another_is_loaded_and_ready(resume: str) -> None:
    """Then nobody computes in that step, and no copy need be under way: the one that is ready must start."""
    policies = PolicyConfig(resume=resume, parameters=UNFORESEEN)
    residency = ResidencyConfig(host_blocks=64)
    made = Driver(core_config(blocks=13, policies=policies, residency=residency, every_tokens=1000))
    made.arrive(request("first", range(1, 30), max_tokens=2))
    made.finish()
    made.prune(DEVICE)
    made.prompt_copies = False
    made.arrive(request("alone", range(50, 62), max_tokens=30))
    made.step()
    made.arrive(
        request("loads", range(1, 30), max_tokens=2)
    )  # what the host has, which takes all blocks left
    (alone,) = made.core.sequences["alone"]
    scheduler = made.core.scheduler
    while scheduler.pool.available or alone.scheduled < len(alone.table) * 4:
        assert made.step()
    assert [each.request.id for each in scheduler.loading] == ["loads"]
    made.copies()
    made.finish()
    assert alone.preemptions > 0
    for id, prompt, tokens in (("alone", range(50, 62), 30), ("loads", range(1, 30), 2)):
        assert made.tokens(id) == expected_tokens(request(id, prompt, max_tokens=tokens))
