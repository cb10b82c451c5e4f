"""Rounds end, every move pays and lessens Σ load², and nothing is sent back and forth."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import inf
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.rebalancing import REBALANCINGS, Limits, Move, Round, cache_size, load_pairs
from tests.policies.replicas import Load, Movable

FREE = Limits(cooldown_seconds=10.0, max_moves=3, moves_per_round=1000, min_gain=1.0)


def replicas_with(movables: list[Movable], count: int, capacity: int = 10_000) -> list[Load]:
    """Whose backlogs and positions are those of their sequences."""
    return [
        Load(
            number,
            backlog_seconds=sum(each.load_seconds for each in movables if each.replica == number),
            used_tokens=sum(each.tokens for each in movables if each.replica == number),
            capacity_tokens=capacity,
        )
        for number in range(count)
    ]


def named(movables: list[Movable]) -> dict[str, Movable]:
    return {each.request: each for each in movables}


class Watched(Movable):
    """Counts how often anybody is asked for what."""

    asked: ClassVar[Counter[str]] = Counter()
    __eq__, __hash__ = object.__eq__, object.__hash__  # a dataclass's would ask for all

    def __getattribute__(self, name: str) -> Any:
        Watched.asked[name] += 1
        return super().__getattribute__(name)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Load], list[Movable]]:
    """Seconds are in quarters, so that sums are exact."""
    count = draw(st.integers(2, 6))
    sequences = st.builds(
        Movable,
        request=st.just(""),
        replica=st.integers(0, count - 1),
        load_seconds=st.integers(0, 80).map(lambda quarters: quarters / 4),
        tokens=st.integers(0, 60),
        size_tokens=st.integers(0, 90).map(float),
        cost_seconds=st.integers(0, 12).map(lambda quarters: quarters / 4),
        moves=st.integers(0, 4),
        moved_at=st.sampled_from([-inf, 80.0, 95.0]),
        waits=st.booleans(),
    )
    movables = [
        replace(each, request=f"r{at}") for at, each in enumerate(draw(st.lists(sequences, max_size=25)))
    ]
    loads = replicas_with(movables, count, capacity=draw(st.sampled_from([200, 600, 10_000])))
    return [
        replace(
            each,
            accepting=draw(st.sampled_from([True, True, True, False])),
            role=draw(st.sampled_from(["any", "burst"])),
            limit_tokens=draw(st.sampled_from([0, 0, 50])),
            slots_left=draw(st.sampled_from([0, 1, 100])),
        )
        for each in loads
    ], movables


def squares(seconds: dict[int, Fraction]) -> Fraction:
    return sum((each * each for each in seconds.values()), Fraction(0))


class TestLoadPairs:
    @given(situations())
    def test_each_move_lessens_the_sum_of_squares_repays_its_cost_and_has_room(
        self, situation: tuple[list[Load], list[Movable]]
    ) -> None:
        loads, movables = situation
        found = load_pairs(loads, movables, 100.0, FREE)
        sequences, replicas = named(movables), {each.number: each for each in loads}
        seconds = {each.number: Fraction(each.backlog_seconds) for each in loads}
        used = {each.number: float(each.used_tokens) for each in loads}
        slots = {each.number: each.slots_left for each in loads}
        assert max(Counter(move.request for move in found.moves).values(), default=0) <= 1
        for move in found.moves:
            each, before = sequences[move.request], squares(seconds)
            source, target = replicas[move.source], replicas[move.target]
            assert each.replica == move.source
            assert source.accepting
            assert target.accepting
            assert source.role == target.role
            gap = seconds[move.source] - seconds[move.target]
            seconds[move.source] -= Fraction(each.load_seconds)
            seconds[move.target] += Fraction(each.load_seconds)
            assert squares(seconds) < before
            assert abs(gap) - abs(seconds[move.source] - seconds[move.target]) == move.gain_seconds
            assert move.gain_seconds > move.cost_seconds * FREE.min_gain
            used[move.source] -= each.tokens
            used[move.target] += max(each.tokens, each.size_tokens)
            assert used[move.target] <= target.capacity_tokens
            slots[move.source] += not each.waits
            slots[move.target] -= not each.waits
            assert slots[move.target] >= 0
            assert not target.limit_tokens or each.size_tokens <= target.limit_tokens
            assert each.moves < FREE.max_moves
            assert each.moved_at <= 90.0

    @given(situations())
    def test_the_first_move_is_the_nearest_to_half_of_all_that_may_move_there(
        self, situation: tuple[list[Load], list[Movable]]
    ) -> None:
        loads, movables = situation
        for move in load_pairs(loads, movables, 100.0, FREE).moves[:1]:
            source, target = (next(e for e in loads if e.number == n) for n in (move.source, move.target))
            gap = source.backlog_seconds - target.backlog_seconds
            free = min(target.limit_tokens or inf, target.capacity_tokens - target.used_tokens)
            candidates = [
                (abs(each.load_seconds - gap / 2), each.cost_seconds, each.moves, each.request)
                for each in movables
                if each.replica == move.source
                and each.moves < 3
                and each.moved_at <= 90.0
                and 0 < each.load_seconds < gap
                and (each.waits or target.slots_left)
                and max(each.tokens, each.size_tokens) <= free
                and gap - abs(gap - 2 * each.load_seconds) > each.cost_seconds
            ]
            assert min(candidates)[-1] == move.request

    def test_few_of_many_are_looked_at_for_a_move(self) -> None:
        movables = [Watched(f"r{number}", 0, load_seconds=1 + number / 1000) for number in range(1000)]
        Watched.asked.clear()
        assert len(load_pairs([Load(0, 1500.0), Load(1, 1497.0)], movables, 0.0, FREE).moves) == 1
        assert 1 <= Watched.asked["size_tokens"] <= 5

    def test_those_of_one_load_are_priced_once_a_round(self) -> None:
        movables = [Watched(f"r{number}", 0) for number in range(1000)]
        Watched.asked.clear()
        limits = replace(FREE, moves_per_round=4)
        assert len(load_pairs([Load(0, 1000.0), Load(1)], movables, 0.0, limits).moves) == 4
        assert 1000 <= Watched.asked["cost_seconds"] <= 1020

    @given(situations())
    def test_rounds_end_though_costs_rest_and_limits_are_nothing(
        self, situation: tuple[list[Load], list[Movable]]
    ) -> None:
        """Round after round on what the last one left, until none has a move: Σ load² has fallen each time."""
        loads, movables = situation
        movables = [replace(each, cost_seconds=0.0, moves=0) for each in movables]
        limits = Limits(cooldown_seconds=0.0, max_moves=10**9, moves_per_round=3, min_gain=1.0)
        before = Fraction(10**9)
        while True:
            now = squares({each.number: Fraction(each.backlog_seconds) for each in loads})
            assert now < before
            before = now
            found = load_pairs(loads, movables, 100.0, limits)
            assert len(found.moves) <= 3
            if not found.moves:
                break
            movables = moved(movables, found, at=100.0)
            loads = [
                replace(old, backlog_seconds=new.backlog_seconds, used_tokens=new.used_tokens)
                for old, new in zip(loads, replicas_with(movables, len(loads)), strict=True)
            ]

    @given(st.lists(st.integers(1, 40).map(float), min_size=1, max_size=20), st.integers(2, 4))
    def test_free_moves_end_within_the_bound_of_jump_optimal_schedules(
        self, seconds: list[float], count: int
    ) -> None:
        movables = [Movable(f"r{at}", 0, load_seconds=each) for at, each in enumerate(seconds)]
        limits = replace(FREE, cooldown_seconds=0.0, max_moves=10**9)
        while found := load_pairs(replicas_with(movables, count), movables, 0.0, limits).moves:
            movables = moved(movables, Round(found), at=0.0)
        highest = max(each.backlog_seconds for each in replicas_with(movables, count))
        least = max(sum(seconds) / count, *seconds)  # no placement is below that
        assert highest <= (2 - 2 / (count + 1)) * least * (1 + 1e-9)

    def test_the_highest_gives_to_the_lowest_and_the_second_to_the_second(self) -> None:
        movables = [
            Movable(f"{replica}.{at}", replica, load_seconds=1.0)
            for replica, many in enumerate((12, 1, 9, 4))
            for at in range(many)
        ]
        limits = replace(FREE, moves_per_round=2)
        moves = load_pairs(replicas_with(movables, 4), movables, 0.0, limits).moves
        assert [(move.source, move.target) for move in moves] == [(0, 1), (2, 3)]
        assert moves[0].reason == "12 s here, 1 s there"

    def test_the_sequence_nearest_to_half_the_gap_moves(self) -> None:
        movables = [Movable(f"{load:.0f} s", 0, load_seconds=load) for load in (1.0, 4.0, 7.0, 11.0)]
        loads = [Load(0, backlog_seconds=12.0), Load(1)]
        move = load_pairs(loads, movables, 0.0, FREE).moves[0]
        assert (move.request, move.gain_seconds) == ("7 s", 10.0), "12 against 0 becomes 5 against 7"

    def test_one_that_is_the_whole_gap_stays(self) -> None:
        only = [Movable("a", 0, load_seconds=9.0)]
        assert load_pairs(replicas_with(only, 2), only, 0.0, FREE) == Round()

    def test_a_gain_must_be_above_so_many_times_the_cost(self) -> None:
        movables = [Movable(name, 0, load_seconds=2.0, cost_seconds=2.0) for name in "ab"]
        loads = replicas_with(movables, 2)
        assert len(load_pairs(loads, movables, 0.0, replace(FREE, min_gain=1.9)).moves) == 1, "it gains 4 s"
        assert not load_pairs(loads, movables, 0.0, replace(FREE, min_gain=2.0)).moves

    def test_none_moves_to_where_it_has_no_room_as_long_as_it_will_be(self) -> None:
        movables = [Movable(name, 0, tokens=10, size_tokens=80.0) for name in "ab"]
        loads = replicas_with(movables, 2, capacity=79)
        assert not load_pairs(loads, movables, 0.0, FREE).moves
        assert load_pairs([loads[0], replace(loads[1], capacity_tokens=80)], movables, 0.0, FREE).moves

    def test_who_runs_moves_to_where_a_slot_is_left_and_who_waits_needs_none(self) -> None:
        runs, waits = Movable("runs", 0, load_seconds=4.0), Movable("waits", 0, load_seconds=3.0, waits=True)
        for slots, first in ((0, "waits"), (1, "runs")):
            loads = [Load(0, 8.0), Load(1, slots_left=slots)]
            assert load_pairs(loads, [runs, waits], 0.0, FREE).moves[0].request == first
        assert not load_pairs([Load(0, 8.0), Load(1, slots_left=0)], [runs], 0.0, FREE).moves

    def test_oscillating_load_does_not_send_sequences_back_and_forth(self) -> None:
        """Load that comes and goes by turns on either replica, for 200 periods of 1 s; ten sequences could move."""
        movables = [Movable(f"r{at}", at % 2, load_seconds=1.0) for at in range(10)]
        limits = Limits(cooldown_seconds=10.0, max_moves=3, moves_per_round=4, min_gain=1.0)
        times: dict[str, list[float]] = {each.request: [] for each in movables}
        for period in range(200):
            now = float(period)
            loads = replicas_with(movables, 2)
            loads[period % 2] = replace(
                loads[period % 2], backlog_seconds=loads[period % 2].backlog_seconds + 8
            )
            found = load_pairs(loads, movables, now, limits)
            for move in found.moves:
                times[move.request].append(now)
            movables = moved(movables, found, at=now)
        assert any(times.values())
        for each in times.values():
            assert len(each) <= 3
            assert all(later - earlier >= 10.0 for earlier, later in pairwise(each))


def moved(movables: list[Movable], found: Round, at: float) -> list[Movable]:
    by: dict[str, Move] = {move.request: move for move in found.moves}
    return [
        replace(each, replica=by[each.request].target, moves=each.moves + 1, moved_at=at)
        if each.request in by
        else each
        for each in movables
    ]


class TestCacheSize:
    SMALL = Load(0, limit_tokens=1000)
    MIDDLE = Load(1, limit_tokens=4000)
    LARGE = Load(2, limit_tokens=0, capacity_tokens=50_000)

    def moves(self, loads: list[Load], *movables: Movable) -> list[tuple[str, int]]:
        return [(move.request, move.target) for move in cache_size(loads, movables, 0.0, FREE).moves]

    def test_one_that_crosses_its_limit_moves_up_to_the_smallest_class_that_it_fits_in(self) -> None:
        loads = [self.LARGE, self.SMALL, self.MIDDLE]
        assert self.moves(loads, Movable("at", 0, tokens=1000, size_tokens=9000.0)) == []
        assert self.moves(loads, Movable("over", 0, tokens=1001, size_tokens=1500.0)) == [("over", 1)]
        assert self.moves(loads, Movable("longer", 0, tokens=4001, size_tokens=1500.0)) == [("longer", 2)]
        assert self.moves(loads, Movable("far", 0, tokens=1001, size_tokens=6000.0)) == [("far", 2)]

    def test_it_moves_exactly_once(self) -> None:
        loads = [self.SMALL, self.MIDDLE, self.LARGE]
        grown = Movable("r", 0, tokens=1001, size_tokens=1500.0)
        moves = 0
        for tokens in range(1001, 6000, 50):
            each = replace(grown, tokens=tokens, size_tokens=max(1500.0, tokens))
            for move in cache_size(loads, [each], 0.0, FREE).moves:
                grown, moves = replace(grown, replica=move.target, crossed=True), moves + 1
        assert (grown.replica, moves) == (1, 1)

    def test_where_all_that_it_fits_in_are_full_it_stays_and_is_counted(self) -> None:
        full = [self.SMALL, replace(self.MIDDLE, used_tokens=9_000), replace(self.LARGE, used_tokens=49_000)]
        each = Movable("r", 0, tokens=1001, size_tokens=1500.0)
        assert cache_size(full, [each], 0.0, FREE) == Round(stayed=1)
        one_full = [*full[:2], self.LARGE]
        assert self.moves(one_full, each) == [("r", 2)], "the next class above has room"

    def test_the_highest_class_keeps_what_is_above_all_limits_and_counts_nothing(self) -> None:
        loads = [self.SMALL, self.MIDDLE]
        assert cache_size(loads, [Movable("r", 1, tokens=5000, size_tokens=6000.0)], 0.0, FREE) == Round()
        assert self.moves(loads, Movable("r", 0, tokens=1001, size_tokens=6000.0)) == [("r", 1)]

    def test_a_replica_that_does_not_accept_takes_none(self) -> None:
        loads = [self.SMALL, replace(self.MIDDLE, accepting=False)]
        each = Movable("r", 0, tokens=1001, size_tokens=1500.0)
        assert cache_size(loads, [each], 0.0, FREE) == Round(stayed=1)
        assert self.moves([*loads, self.LARGE], each) == [("r", 2)]

    def test_what_is_above_all_limits_goes_to_the_highest_that_accepts(self) -> None:
        loads = [self.SMALL, self.MIDDLE, replace(self.LARGE, accepting=False)]
        assert self.moves(loads, Movable("r", 0, tokens=1001, size_tokens=6000.0)) == [("r", 1)]

    def test_who_leaves_the_middle_makes_room_for_who_comes_from_below(self) -> None:
        loads = [self.SMALL, replace(self.MIDDLE, used_tokens=9_500), self.LARGE]
        movables = [
            Movable("below", 0, tokens=1001, size_tokens=1500.0),
            Movable("middle", 1, tokens=4100, size_tokens=5000.0),
        ]
        assert self.moves(loads, *movables) == [("middle", 2), ("below", 1)]

    def test_equal_classes_take_turns_by_backlog(self) -> None:
        loads = [self.SMALL, self.MIDDLE, replace(self.MIDDLE, number=2)]
        movables = [Movable(name, 0, tokens=1001, size_tokens=1500.0) for name in "abcd"]
        assert Counter(target for _, target in self.moves(loads, *movables)) == {1: 2, 2: 2}

    def test_a_round_has_no_more_moves_than_it_may_and_the_others_are_not_counted(self) -> None:
        movables = [Movable(name, 0, tokens=1001, size_tokens=1500.0) for name in "abcd"]
        found = cache_size(
            [self.SMALL, self.MIDDLE], movables, 0.0, replace(FREE, moves_per_round=3, cooldown_seconds=1e9)
        )
        assert (len(found.moves), found.stayed) == (3, 0)

    @given(situations())
    def test_no_move_goes_down_nor_where_there_is_no_room(
        self, situation: tuple[list[Load], list[Movable]]
    ) -> None:
        loads, movables = situation
        replicas, sequences = {each.number: each for each in loads}, named(movables)
        free = {each.number: float(each.capacity_tokens - each.used_tokens) for each in loads}
        for move in cache_size(loads, movables, 0.0, FREE).moves:
            each = sequences[move.request]
            assert each.tokens > replicas[move.source].limit_tokens > 0
            assert (replicas[move.target].limit_tokens or inf) > replicas[move.source].limit_tokens
            free[move.source] += each.tokens
            free[move.target] -= max(each.tokens, each.size_tokens)
            assert free[move.target] >= 0


@given(situations(), st.sampled_from(sorted(REBALANCINGS)))
def test_the_same_snapshot_gives_the_same_round_in_whatever_order_it_comes(
    situation: tuple[list[Load], list[Movable]], name: str
) -> None:
    loads, movables = situation
    policy = REBALANCINGS[name]
    assert policy(loads, movables, 100.0, FREE) == policy(loads[::-1], movables[::-1], 100.0, FREE)


def test_none_moves_nothing() -> None:
    movables = [Movable(name, 0) for name in "abc"]
    assert REBALANCINGS["none"](replicas_with(movables, 2), movables, 0.0, FREE) == Round()


@pytest.mark.parametrize("wrong", [{"cooldown_seconds": -1.0}, {"max_moves": -1}, {"min_gain": 0.5}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(FREE, **wrong)  # type: ignore[arg-type]  # one of its fields each


def test_every_policy_says_what_it_is_for() -> None:
    for policy in REBALANCINGS.values():
        for word in ("Worst case:", "Source:"):
            assert word in (policy.__doc__ or ""), policy


def test_a_long_one_does_not_move_to_where_it_delays_many_unless_the_gap_repays_that() -> None:
    few, many = Load(0, 10.0, requests=2), Load(1, 0.0, requests=42)
    long, light = Movable("long", 0, 4.0, disturbs_seconds=3.0), Movable("light", 0, 1.0)
    moved = load_pairs([few, many], [long, light], 0.0, Limits())
    assert [move.request for move in moved.moves] == ["light"]
    careless = load_pairs([few, many], [long, light], 0.0, Limits(disturbance=0.0))
    assert [move.request for move in careless.moves][:1] == ["long"]
    alike = load_pairs([few, replace(many, requests=2)], [long, light], 0.0, Limits())
    assert [move.request for move in alike.moves][:1] == ["long"]


def test_loads_that_differ_little_stay_where_a_least_gap_is_asked_for() -> None:
    loads, movable = [Load(0, 10.0), Load(1, 6.0)], Movable("a", 0, 1.0)
    assert load_pairs(loads, [movable], 0.0, Limits(least_gap=0.3)).moves
    assert not load_pairs(loads, [movable], 0.0, Limits(least_gap=0.5)).moves
