"""Each routing policy does what its weights say; hot prefixes spill, headroom is kept, pools keep apart until full."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.greedy import bound, greedy, optimum
from policies.routing import HYBRID, ROUTINGS, Routing, Scored, Weights, belonging, route
from tests.policies.replicas import Candidate, place_all

NAMES = sorted(ROUTINGS)


def chosen(name: str, *candidates: Candidate) -> int:
    return ROUTINGS[name](candidates).replica


SCENE = (
    # the least charged, but what is there has long to go
    Candidate(0, requests=3, placed=9, charged_seconds=2.0, backlog_seconds=9.0),
    # the least predicted
    Candidate(1, requests=3, placed=9, charged_seconds=4.0, backlog_seconds=2.0),
    # has most of the prompt
    Candidate(
        2, requests=3, placed=9, charged_seconds=5.0, backlog_seconds=7.0, saved_seconds=0.9, cached_tokens=90
    ),
    # the session's home, of which little is left
    Candidate(3, requests=3, placed=9, charged_seconds=6.0, backlog_seconds=8.0, session_home=True),
    # its turn
    Candidate(4, requests=3, placed=7, charged_seconds=7.0, backlog_seconds=10.0),
    # for such sizes
    Candidate(5, requests=3, placed=9, charged_seconds=7.0, backlog_seconds=11.0, limit_tokens=1000),
    # a little more load than the least, but all is weighed
    Candidate(
        6, requests=3, placed=9, charged_seconds=8.0, backlog_seconds=2.5, saved_seconds=0.8, cached_tokens=80
    ),
)


@pytest.mark.parametrize(
    ("name", "replica", "reason"),
    [
        ("round_robin", 4, "its turn"),
        ("least_load", 0, "least load charged"),
        ("predicted_load", 1, "least load predicted"),
        ("cache_aware", 2, "90 of 100 prompt tokens are on its device"),
        ("session", 3, "its session was there"),
        ("size_classes", 5, "it is for such sizes"),
    ],
)
def test_each_policy_has_a_character_in_the_same_scene(name: str, replica: int, reason: str) -> None:
    placed = ROUTINGS[name](SCENE)
    assert (placed.replica, placed.reason) == (replica, reason)
    assert [each.name for each in placed.alternatives if each.price == placed.score] == [f"replica {replica}"]


def test_hybrid_weighs_what_a_cache_saves_against_load() -> None:
    alike = [replace(each, limit_tokens=0) for each in SCENE]
    assert chosen("hybrid", *alike) == 6
    assert chosen("hybrid", *SCENE) == 5, "where there are size classes it heeds them"


def test_hybrid_sends_who_delays_many_to_where_few_are_and_who_delays_few_away_from_long_prompts() -> None:
    """A replica with many short ones, and one with few, of whom one has a long prompt under way."""
    many, few = Candidate(0, requests=40, backlog_seconds=4.0), Candidate(1, requests=3, backlog_seconds=6.0)
    long = (
        replace(many, disturbed_seconds=40 * 3.0),
        replace(few, disturbed_seconds=3 * 3.0, ahead_seconds=2.0),
    )
    short = (
        replace(many, disturbed_seconds=40 * 0.01),
        replace(few, disturbed_seconds=0.03, ahead_seconds=0.1),
    )
    assert chosen("hybrid", *long) == 1
    assert route(long).reason == "its prefill delays others least"
    assert chosen("hybrid", *short) == 0


@pytest.mark.parametrize(("later", "replica"), [(2.9, 1), (3.1, 0)])
def test_hybrid_counts_a_second_of_one_who_waits_three_times_its_own(later: float, replica: int) -> None:
    """It stands also for those who come while it waits."""
    delays, waits = Candidate(0, behind_seconds=1.0), Candidate(1, ahead_seconds=later)
    assert chosen("hybrid", delays, waits) == replica


@pytest.mark.parametrize("name", NAMES)
def test_alternatives_are_all_replicas_with_the_score_of_each(name: str) -> None:
    placed = ROUTINGS[name](SCENE)
    assert sorted(each.name for each in placed.alternatives) == [f"replica {each.number}" for each in SCENE]
    assert placed.score == min(each.price for each in placed.alternatives)


@pytest.mark.parametrize("name", NAMES)
@given(order=st.permutations(SCENE))
def test_the_answer_does_not_depend_on_the_order_of_candidates(name: str, order: list[Candidate]) -> None:
    assert ROUTINGS[name](order) == ROUTINGS[name](SCENE)


def test_ties_go_to_fewer_requests_then_fewer_ever_placed_then_the_lowest_number() -> None:
    one, two, three = Candidate(1, requests=2, placed=5), Candidate(2, requests=1, placed=9), Candidate(3)
    three = replace(three, requests=1, placed=4)
    assert route([one, two, three]).replica == 3
    assert (route([one, two]).replica, route([one, two]).reason) == (2, "a tie: fewest requests")
    assert route([two, three]).reason == "a tie: fewest ever placed"
    assert route([Candidate(8), Candidate(7)]).replica == 7
    assert route([Candidate(8), Candidate(7)]).reason == "a tie: lowest number"
    assert route([one]).reason == "the only replica"


def test_a_device_that_cannot_hold_the_prompt_never_gets_it() -> None:
    small, large = Candidate(0, capacity_tokens=100), Candidate(1, backlog_seconds=1e9, waiting=8)
    for name in NAMES:
        assert chosen(name, small, replace(large, placed=99, requests=99, charged_seconds=9.0)) == 1
    assert route([small]).reason == "no device could hold its prompt"
    assert route([small, large]).reason == "no other device could hold its prompt"


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["least_load", "predicted_load", "round_robin", "hybrid"])
def test_64_equal_prompts_at_once_are_spread_evenly(name: str, replicas: int) -> None:
    placed = place_all(ROUTINGS[name], [Candidate(number) for number in range(replicas)], [0.1] * 64)
    counts = Counter(each.replica for each in placed)
    assert len(counts) == replicas
    assert max(counts.values()) - min(counts.values()) <= 1


works = st.lists(st.integers(1, 100).map(float), min_size=1, max_size=8)


@given(works, st.integers(2, 4))
def test_least_load_is_within_two_less_one_mth_of_the_optimum(work: list[float], replicas: int) -> None:
    assert optimum(work, replicas) <= greedy(work, replicas) <= bound(replicas) * optimum(work, replicas)


def test_the_worst_case_of_least_load_is_reached() -> None:
    for replicas in (2, 3):
        work = [1.0] * (replicas * (replicas - 1)) + [float(replicas)]
        assert greedy(work, replicas) == bound(replicas) * optimum(work, replicas)


class TestSaturation:
    @pytest.mark.parametrize("name", ["cache_aware", "session", "hybrid"])
    @pytest.mark.parametrize(("waiting", "forecast"), [(1, 0.0), (0, 9_900.0)])
    def test_a_saturated_replica_has_no_credit(self, name: str, waiting: int, forecast: float) -> None:
        home = Candidate(0, saved_seconds=0.9, session_home=True, backlog_seconds=0.5, requests=9)
        other = Candidate(1, backlog_seconds=0.1, requests=1)
        assert chosen(name, home, other) == 0
        placed = ROUTINGS[name]([replace(home, waiting=waiting, forecast_tokens=forecast), other])
        assert placed.replica == 1
        assert placed.reason == "replica 0, which has its prefix or session, is saturated"

    @pytest.mark.parametrize("name", ["cache_aware", "session", "hybrid"])
    def test_equal_hot_prompts_do_not_pile_up(self, name: str) -> None:
        """Sixty requests for one prefix that replica 0 has; three replicas, each with room for twenty-some."""
        replicas = [Candidate(number, capacity_tokens=4000) for number in range(3)]
        replicas[0] = replace(replicas[0], saved_seconds=0.9, cached_tokens=90, session_home=True)
        placed = place_all(ROUTINGS[name], replicas, [0.2] * 60, tokens=150.0)
        counts = Counter(each.replica for each in placed)
        assert placed[0].replica == 0
        assert counts[0] == max(counts.values())
        assert max(counts.values()) <= 24, "what fits in 4,000 positions less headroom"

    def test_an_idle_replica_is_not_saturated_by_one_large_request(self) -> None:
        home = Candidate(0, size_tokens=9_900.0, session_home=True, saved_seconds=0.9)
        assert chosen("hybrid", Candidate(1, size_tokens=9_900.0), home) == 0


class TestHeadroom:
    NEARLY_FULL = Candidate(0, forecast_tokens=9_000.0, backlog_seconds=1.0)
    OTHER = Candidate(1, forecast_tokens=5_000.0, backlog_seconds=1.3)

    def test_the_last_share_of_a_capacity_is_for_the_urgent(self) -> None:
        both = self.NEARLY_FULL, self.OTHER
        assert ROUTINGS["hybrid"](both).replica == 1
        assert ROUTINGS["hybrid"](both).reason == "room soonest"
        assert ROUTINGS["hybrid"]([replace(each, urgent=True) for each in both]).replica == 0

    def test_it_keeps_even_those_out_whose_prefix_is_there(self) -> None:
        cached = replace(self.NEARLY_FULL, saved_seconds=0.9)
        assert chosen("hybrid", cached, self.OTHER) == 1
        assert chosen("cache_aware", replace(cached, backlog_seconds=2.0), self.OTHER) == 1

    def test_without_headroom_all_are_alike(self) -> None:
        assert replace(ROUTINGS["hybrid"], headroom=0.0)([self.NEARLY_FULL, self.OTHER]).replica == 0

    @pytest.mark.parametrize("headroom", [-0.1, 1.0, float("nan")])
    def test_a_share_that_makes_no_sense_is_refused(self, headroom: float) -> None:
        with pytest.raises(ValueError, match="headroom"):
            Scored(HYBRID, headroom)


class TestPools:
    BURST = Candidate(0, role="burst", limit_tokens=1000, backlog_seconds=5.0)
    LONG = Candidate(1, role="long", backlog_seconds=5.0)
    ANY = Candidate(2, role="any", backlog_seconds=5.0)

    def test_sizes_above_the_burst_limit_belong_to_long_and_any_takes_both(self) -> None:
        for size, own in ((1000.0, {0, 2}), (1001.0, {1, 2})):
            sized = [replace(each, size_tokens=size) for each in (self.BURST, self.LONG, self.ANY)]
            assert belonging(sized) == own

    def test_a_pool_without_its_counterpart_takes_all_sizes(self) -> None:
        for only in (self.BURST, self.LONG):
            for size in (10.0, 5000.0):
                assert belonging([replace(only, size_tokens=size)]) == {only.number}
                assert belonging([replace(only, size_tokens=size), replace(self.ANY, size_tokens=size)]) == {
                    only.number,
                    2,
                }

    def test_of_several_limits_the_smallest_that_fits_is_the_requests_own(self) -> None:
        limits = {0: 500, 1: 2000, 2: 8000}
        for size, own in ((500.0, 0), (501.0, 1), (2001.0, 2), (9999.0, 2)):
            sized = [
                Candidate(number, limit_tokens=limit, size_tokens=size) for number, limit in limits.items()
            ]
            assert belonging(sized) == {own}

    @pytest.mark.parametrize("name", ["size_classes", "hybrid"])
    @pytest.mark.parametrize(("size", "own", "other"), [(150.0, BURST, LONG), (1500.0, LONG, BURST)])
    def test_requests_keep_to_their_pool_until_it_is_saturated_and_spill_either_way(
        self, name: str, size: float, own: Candidate, other: Candidate
    ) -> None:
        own, other = (replace(each, size_tokens=size) for each in (own, other))
        idle = replace(other, backlog_seconds=0.0)
        assert chosen(name, own, idle) == own.number
        placed = ROUTINGS[name]([replace(own, waiting=1), idle])
        assert (placed.replica, placed.reason) == (idle.number, "those for its size are saturated")
        full = replace(idle, waiting=1, forecast_tokens=9_999.0)
        assert chosen(name, replace(own, waiting=1), full) == own.number, "to spill there gains nothing"

    def test_policies_without_that_weight_know_no_pools(self) -> None:
        assert chosen("predicted_load", self.BURST, replace(self.LONG, backlog_seconds=4.0)) == 1


def test_a_plug_in_is_a_callable_like_ours() -> None:
    policies: list[Routing] = [*ROUTINGS.values()]
    assert all(policy([Candidate(3)]).replica == 3 for policy in policies)


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_weights_are_not_negative(wrong: float) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Weights(backlog=wrong)
