"""The core, driven by hand: continuous batching, chunks, preemption, prefix reuse, stops, refusals."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.events import Arrived, Cancelled
from engine.policy_set import PolicyConfig
from engine.request import FinishReason, Request
from engine.scheduler import PASSED_OVER
from engine.waiting import STALE
from policies.decisions import Kind
from tests.engine.driving import EOS, UNFORESEEN, Driver, core_config, request
from tests.fakes import hashed, saying


def expected_tokens(asked: Request, choice: int = 0) -> tuple[int, ...]:
    """What the scripted runner says to a request alone, with all the room there is."""
    driver = Driver(core_config(blocks=1000, max_batch_tokens=1000))
    driver.arrive(asked)
    driver.finish()
    return driver.tokens(asked.id, choice)


def test_a_request_gets_its_tokens_and_leaves_nothing() -> None:
    driver = Driver(core_config())
    driver.arrive(request("a", [1, 2, 3], max_tokens=5))
    driver.finish()
    assert len(driver.tokens("a")) == 5
    assert driver.reason("a") is FinishReason.LENGTH
    assert driver.core.scheduler.pool.held == 0


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
@pytest.mark.parametrize("max_outstanding", [1, 2, 3])
def test_tokens_do_not_depend_on_chunks_or_on_steps_ahead(chunk: int, max_outstanding: int) -> None:
    asked = request("a", range(1, 40), max_tokens=20)
    driver = Driver(
        core_config(max_batch_tokens=max(chunk, 1), max_outstanding=max_outstanding, max_sequences=1)
    )
    driver.arrive(asked)
    driver.finish()
    assert driver.tokens("a") == expected_tokens(asked)


def test_prefill_is_mixed_with_decode_under_one_budget() -> None:
    driver = Driver(core_config(max_batch_tokens=8))
    driver.arrive(request("a", [1, 2], max_tokens=30))
    driver.step()
    driver.arrive(request("b", range(10, 40), max_tokens=3))
    driver.finish()
    sizes = [[len(row.tokens) for row in plan.rows] for plan in driver.runner.plans]
    assert [1, 7] in sizes
    assert all(sum(size) <= 8 for size in sizes)


@pytest.mark.parametrize("max_outstanding", [1, 2])
def test_preempted_sequences_say_what_they_would_have_said(max_outstanding: int) -> None:
    """A pool of about 0.3 × demand: preemptions happen, all finish, tokens are those of a run without pressure."""
    driver = Driver(core_config(blocks=20, max_outstanding=max_outstanding))
    asked = [request(f"r{i}", range(i, i + 5), max_tokens=30, seed=i) for i in range(16)]
    driver.arrive(*asked)
    driver.finish()
    assert driver.core.scheduler.counts.preemptions > 0
    recomputed = sum(f.recomputed_tokens for f in driver.finished.values())
    assert recomputed > 0
    assert driver.runner.computed_positions - recomputed == 16 * (5 + 30 - 1)
    for each in asked:
        assert driver.tokens(each.id) == expected_tokens(each)


def test_who_lacks_a_block_waits_for_one_behind_it_that_lacks_none_and_ends_soon() -> None:
    """Whatever the order: the one behind it would have been the victim, two tokens before its end."""
    policies = PolicyConfig(parameters={"admission": {"wait_steps": 4}})
    driver = Driver(core_config(blocks=9, policies=policies))
    driver.arrive(request("first", range(7), max_tokens=11), request("other", range(40, 48), max_tokens=8))
    for _ in range(3):
        driver.step()
    driver.arrive(request("last", range(20, 25), max_tokens=4))
    driver.finish()
    spared = [each.request_id for each in driver.decided if each.decision.kind is Kind.SPARED]
    assert spared == ["other"]
    assert driver.core.scheduler.counts.preemptions == 0


def test_the_largest_request_the_pool_can_hold_finishes() -> None:
    driver = Driver(core_config(blocks=5, block_size=4))
    driver.arrive(*(request(f"r{i}", range(10 + i, 20 + i), max_tokens=10) for i in range(4)))
    driver.finish()
    assert all(len(driver.tokens(f"r{i}")) == 10 for i in range(4))


def test_a_request_beyond_the_pool_is_refused_at_the_door() -> None:
    driver = Driver(core_config(blocks=5, block_size=4))
    driver.arrive(request("a", range(11), max_tokens=10))
    assert driver.rejected["a"].code == "context_length_exceeded"
    assert "20 tokens" in driver.rejected["a"].message
    assert driver.core.idle


def test_a_full_queue_refuses_and_forgets() -> None:
    driver = Driver(core_config(max_queue=2, max_sequences=1))
    driver.arrive(*(request(f"r{i}", [i, i + 1]) for i in range(5)))
    assert {r.code for r in driver.rejected.values()} == {"queue_full"}
    assert len(driver.rejected) == 2
    driver.finish()


def test_the_next_turn_of_a_chat_finds_prompt_and_answer_cached() -> None:
    driver = Driver(core_config())
    driver.arrive(request("a", range(1, 11), max_tokens=7))
    driver.finish()
    turn = [*range(1, 11), *driver.tokens("a"), 50, 51]
    driver.arrive(request("b", turn))
    driver.finish()
    assert driver.finished["b", 0].cached_tokens == 16
    assert driver.tokens("b") == expected_tokens(request("b", turn))


def test_a_whole_cached_prompt_still_computes_its_last_token() -> None:
    driver = Driver(core_config())
    for name in "ab":
        driver.arrive(request(name, range(8)))
        driver.finish()
    assert driver.finished["b", 0].cached_tokens == 4
    assert driver.tokens("a") == driver.tokens("b")


def test_a_salt_keeps_tenants_apart() -> None:
    driver = Driver(core_config())
    for name, salt in [("a", "x"), ("b", "y"), ("c", "x")]:
        driver.arrive(request(name, range(20), salt=salt))
        driver.finish()
    assert [driver.finished[name, 0].cached_tokens for name in "abc"] == [0, 0, 16]


def test_equal_prompts_at_once_are_computed_once() -> None:
    """The second waits for the blocks that the first is computing."""
    driver = Driver(core_config(max_batch_tokens=64))
    driver.arrive(request("warm", [1]))
    driver.arrive(*(request(f"r{i}", range(40), max_tokens=4, seed=i) for i in range(4)))
    driver.finish()
    assert [driver.finished[f"r{i}", 0].cached_tokens for i in range(4)] == [0, 36, 36, 36]


def test_a_step_passes_over_a_bounded_number_of_waiters() -> None:
    """Those behind a waiter whose prefix is being computed may go first, but not from far down the queue."""
    driver = Driver(core_config(max_batch_tokens=64, max_sequences=80))
    driver.arrive(request("warm", [1]))
    near, far = request("near", [50]), request("far", [51])
    family = [request(f"r{i}", range(40), max_tokens=2, seed=i) for i in range(PASSED_OVER + 2)]
    driver.arrive(*family[:3], near, *family[3:], far)
    driver.step()
    assert {s.request.id for s in driver.core.scheduler.running} == {"warm", "r0", "near"}
    driver.finish()
    assert all(driver.tokens(each.id) == expected_tokens(each) for each in (*family, near, far))


def test_a_waiter_whose_prefix_has_been_computed_meanwhile_goes_before_one_that_shares_nothing() -> None:
    driver = Driver(core_config(max_sequences=1, policies=PolicyConfig(order="cache_aware")))
    driver.arrive(
        request("leader", range(1, 42), max_tokens=4),
        request("stranger", range(50, 91), max_tokens=4),
        request("follower", [*range(1, 41), 95, 96], max_tokens=4),
    )
    driver.finish()
    assert [id for id, _ in driver.finished] == ["leader", "follower", "stranger"]


def test_equal_answers_share_their_blocks() -> None:
    """Two sequences that say the same keep one copy: the second's block gives way to the first's."""
    driver = Driver(core_config(max_batch_tokens=64), saying([7, 8, 9]))
    driver.arrive(request("warm", [1]))
    driver.arrive(*(request(name, range(6), max_tokens=20, seed=i) for i, name in enumerate("ab")))
    for _ in range(12):
        driver.step()
    tables = [s.table for s in driver.core.scheduler.running]
    assert len(tables) == 2
    assert tables[0][:2] == tables[1][:2]
    driver.finish()
    assert driver.tokens("a") == driver.tokens("b")


def test_choices_share_the_prompt_and_differ() -> None:
    driver = Driver(core_config())
    driver.arrive(request("a", range(20), n=3))
    driver.finish()
    assert len({driver.tokens("a", choice) for choice in range(3)}) == 3
    assert driver.runner.computed_positions < 2 * 20 + 3 * 8


@pytest.mark.parametrize("max_outstanding", [1, 2])
def test_end_of_sequence_ends_it_and_is_not_text(max_outstanding: int) -> None:
    driver = Driver(core_config(max_outstanding=max_outstanding), saying([5, 6, EOS, 7]))
    driver.arrive(request("a", [0] * 4, max_tokens=50))
    driver.finish()
    assert driver.tokens("a") == (5, 6, EOS)
    assert driver.text("a") == "FG"
    assert driver.reason("a") is FinishReason.STOP


def test_ignore_eos_goes_on() -> None:
    driver = Driver(core_config(), saying([5, 6, EOS, 7]))
    driver.arrive(request("a", [0] * 4, max_tokens=9, ignore_eos=True))
    driver.finish()
    assert len(driver.tokens("a")) == 9


def test_a_stop_string_ends_it_and_is_cut() -> None:
    driver = Driver(core_config(), saying([0, 1, 2, 3]))  # ABCD
    driver.arrive(request("a", [0] * 4, max_tokens=50, stop=("CDA",)))
    driver.finish()
    assert driver.text("a") == "AB"
    assert driver.deltas["a", 0][-1].stop_reason == "CDA"


def test_min_tokens_keeps_stops_away() -> None:
    driver = Driver(core_config(), saying([0, 1, 2, 3]))
    driver.arrive(request("a", [0] * 4, max_tokens=50, min_tokens=6, stop=("C",)))
    driver.finish()
    assert len(driver.tokens("a")) == 7
    driver = Driver(core_config(), hashed(100))
    driver.arrive(*(request(f"r{i}", [i], max_tokens=60, min_tokens=40) for i in range(8)))
    driver.finish()
    assert all(len(driver.tokens(f"r{i}")) >= 40 for i in range(8))


def test_a_cancelled_request_frees_its_blocks_at_once() -> None:
    driver = Driver(core_config())
    driver.arrive(request("a", range(20), max_tokens=40), request("b", range(30, 40)))
    driver.step()
    driver.cancel("a")
    held = {block for s in driver.core.scheduler.running for block in s.table}
    assert driver.core.scheduler.pool.held == len(held)
    assert driver.reason("a") is FinishReason.CANCELLED
    driver.finish()
    assert driver.tokens("b") == expected_tokens(request("b", range(30, 40)))


@pytest.mark.parametrize("order", ["hybrid", "fair"])
def test_waiters_that_left_do_not_pile_up_behind_one_that_cannot_move(order: str) -> None:
    policies = PolicyConfig(order=order, parameters=UNFORESEEN)
    driver = Driver(core_config(max_sequences=1, max_queue=3, policies=policies))
    driver.arrive(request("a", [1], max_tokens=100), request("b", [2]))
    for i in range(10 * STALE):
        driver.core.handle(Arrived(request(f"r{i}", [i])), driver.now)
        driver.core.handle(Cancelled(f"r{i}"), driver.now)
    line = driver.core.scheduler.life.line
    assert len(line._heap) + sum(map(len, line._behind.values())) <= STALE + 3
    assert max(len(line._by_service), len(line._by_time)) <= STALE + 3
    driver.finish()
    assert driver.tokens("b") == expected_tokens(request("b", [2]))


def test_those_that_were_served_do_not_pile_up_behind_one_that_starves() -> None:
    parameters: dict[str, dict[str, float]] = {
        **UNFORESEEN,
        "promotion": {"service_tokens": 10**9, "wait_seconds": 1e9},
    }
    policies = PolicyConfig(order="priority", parameters=parameters)
    driver = Driver(core_config(max_sequences=1, policies=policies))
    driver.arrive(request("first", [1], max_tokens=2), replace(request("starves", [2]), priority=9))
    for i in range(3 * STALE):
        driver.arrive(request(f"r{i}", [i], max_tokens=2))
        while driver.core.scheduler.waiting > 1:
            driver.step()
    line = driver.core.scheduler.life.line
    assert max(len(line._by_service), len(line._by_time)) <= STALE + 3
    driver.finish()
    assert len(driver.finished) == 3 * STALE + 2


@pytest.mark.parametrize("max_outstanding", [1, 2])
def test_sampled_tokens_are_those_that_clients_got(max_outstanding: int) -> None:
    """A row computed for a sequence that had ended meanwhile draws a token that nobody gets."""
    driver = Driver(core_config(max_outstanding=max_outstanding), saying([5, 6, EOS, 7]))
    driver.arrive(*(request(f"r{i}", [0] * 4, max_tokens=50) for i in range(5)))
    driver.finish()
    drawn = sum(row.samples for plan in driver.runner.plans for row in plan.rows)
    assert (drawn > 15) == (max_outstanding > 1)
    assert sum(account.sampled_tokens for account in driver.accounts) == 15


def test_cancelling_nobody_does_nothing() -> None:
    driver = Driver(core_config())
    driver.cancel("nobody")
    assert driver.core.idle


def test_logprobs_come_with_their_tokens() -> None:
    driver = Driver(core_config())
    driver.arrive(request("a", [1], logprobs=0), request("b", [2]))
    driver.finish()
    assert sum(len(d.logprobs) for d in driver.deltas["a", 0]) == 8
    assert sum(len(d.logprobs) for d in driver.deltas["b", 0]) == 0


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 25), st.integers(0, 3)), min_size=1, max_size=12
    ),
    blocks=st.integers(14, 40),
    budget=st.integers(1, 64),
    max_outstanding=st.integers(1, 3),
)
def test_any_mix_under_pressure_equals_no_pressure(
    prompts: list[tuple[int, int, int]], blocks: int, budget: int, max_outstanding: int
) -> None:
    driver = Driver(core_config(blocks=blocks, max_batch_tokens=budget, max_outstanding=max_outstanding))
    asked = [
        request(f"r{i}", [family] * 5 + list(range(length)), max_tokens, seed=i % 3)
        for i, (length, max_tokens, family) in enumerate(prompts)
        if length + 5 + max_tokens <= blocks * 4
    ]
    driver.arrive(*asked)
    driver.finish()
    for each in asked:
        assert driver.tokens(each.id) == expected_tokens(each)


class Comings(RuleBasedStateMachine):
    """Requests come, steps end, clients leave, in any order: the books balance after every event."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(core_config(blocks=16, max_queue=20, max_outstanding=2))
        self.count = 0

    @rule(
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 30),
        family=st.integers(0, 2),
        n=st.integers(1, 3),
    )
    def arrive(self, length: int, max_tokens: int, family: int, n: int) -> None:
        self.count += 1
        self.driver.arrive(request(f"r{self.count}", [family] * length, max_tokens, n=n))

    @precondition(lambda self: self.count > 0)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.driver.cancel(f"r{data.draw(st.integers(1, self.count))}")

    @rule(steps=st.integers(1, 20))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.driver.step()

    @invariant()
    def work_is_under_way_unless_idle(self) -> None:
        assert self.driver.core.idle or self.driver._under_way

    def teardown(self) -> None:
        self.driver.finish()


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
