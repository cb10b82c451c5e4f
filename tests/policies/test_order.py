"""Orders put first whom their docstrings promise, and let only whom they say take another's place."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.order import ORDERS, Hybrid, Mlq, Order, still_to_compute
from policies.promotion import Promotion
from tests.policies.view import View

views = st.builds(
    View,
    number=st.integers(0, 100),
    arrived=st.floats(0, 1000),
    prompt_tokens=st.integers(1, 100_000),
    output_tokens=st.integers(0, 5000),
    priority=st.integers(-3, 3),
    class_rank=st.integers(0, 3),
    matched_tokens=st.integers(0, 1000),
    kept_tokens=st.integers(0, 1000),
    expected_remaining_tokens=st.floats(0, 5000),
    tenant_service=st.floats(0, 1e6),
)


def in_order(order: Order, *waiters: View) -> list[int]:
    return [view.number for view in sorted(waiters, key=lambda view: (order(view), view.number))]


def test_fcfs_puts_earlier_arrivals_first() -> None:
    assert in_order(ORDERS["fcfs"](), View(3), View(1), View(2)) == [1, 2, 3]


def test_priority_puts_lower_numbers_first_then_earlier_arrivals() -> None:
    waiters = (
        View(1, arrived=1.0, priority=2),
        View(2, arrived=2.0, priority=-1),
        View(3, arrived=0.5, priority=2),
    )
    assert in_order(ORDERS["priority"](), *waiters) == [2, 3, 1]


def test_sjf_counts_rounds_of_decoding_and_what_is_computed_before() -> None:
    short_answer = View(1, prompt_tokens=6400, expected_remaining_tokens=10)
    long_answer = View(2, prompt_tokens=64, expected_remaining_tokens=40)
    assert in_order(ORDERS["sjf"](), short_answer, long_answer) == [2, 1]  # 60 rounds and 40.5
    assert in_order(ORDERS["sjf"](prefill_tokens_per_round=640), short_answer, long_answer) == [1, 2]


def test_sjf_counts_only_what_is_left_of_a_preempted_sequence() -> None:
    preempted = View(1, prompt_tokens=6400, output_tokens=500, kept_tokens=6900, expected_remaining_tokens=10)
    assert ORDERS["sjf"]()(preempted) == (10.0,)


def test_cache_aware_goes_by_the_share_that_is_cached_not_by_its_length() -> None:
    long_but_half = View(1, prompt_tokens=8000, matched_tokens=4000)
    short_but_nearly_all = View(2, prompt_tokens=100, matched_tokens=96)
    assert in_order(ORDERS["cache_aware"](), long_but_half, short_but_nearly_all) == [2, 1]


def test_cache_aware_settles_equal_shares_by_arrival() -> None:
    assert in_order(ORDERS["cache_aware"](), View(2, arrived=2.0), View(1, arrived=1.0)) == [1, 2]


def test_fair_puts_the_tenant_first_that_was_served_least() -> None:
    greedy, modest = View(1, arrived=1.0, tenant_service=500.0), View(2, arrived=2.0, tenant_service=100.0)
    assert in_order(ORDERS["fair"](), greedy, modest, View(3, arrived=1.5, tenant_service=500.0)) == [2, 1, 3]


def test_hybrid_goes_by_class_before_anything_else() -> None:
    urgent = View(2, arrived=100.0, class_rank=0, prompt_tokens=90_000, expected_remaining_tokens=4000.0)
    assert in_order(ORDERS["hybrid"](), View(1, class_rank=1, expected_remaining_tokens=1.0), urgent) == [
        2,
        1,
    ]


def test_hybrid_goes_by_work_left_less_what_is_cached() -> None:
    long, short = View(1, expected_remaining_tokens=200.0), View(2, expected_remaining_tokens=20.0)
    assert in_order(ORDERS["hybrid"](), long, short) == [2, 1]
    cold, cached = View(1, prompt_tokens=9000), View(2, prompt_tokens=9000, matched_tokens=8000)
    assert in_order(ORDERS["hybrid"](), cold, cached) == [2, 1]


def test_hybrid_holds_what_is_generated_against_what_is_left() -> None:
    """Half through, the rest weighs 1 + 5 ÷ 2 times as much; at its end, nearly six times; without it, as before."""
    fresh = View(1, prompt_tokens=0, expected_remaining_tokens=100.0)
    halfway = View(2, prompt_tokens=0, kept_tokens=100, output_tokens=100, expected_remaining_tokens=100.0)
    ending = View(3, prompt_tokens=0, kept_tokens=990, output_tokens=990, expected_remaining_tokens=10.0)
    assert Hybrid().work_seconds(fresh) == pytest.approx(2.0)
    assert Hybrid().work_seconds(halfway) == pytest.approx(7.0)
    assert Hybrid().work_seconds(ending) == pytest.approx(0.2 * 5.95)
    assert Hybrid(spent_weight=0).work_seconds(halfway) == pytest.approx(2.0)


def test_hybrid_displaces_within_a_class_one_with_much_more_work() -> None:
    waiter = View(2, prompt_tokens=0, expected_remaining_tokens=50.0)
    more, less = (View(1, prompt_tokens=0, expected_remaining_tokens=left) for left in (101.0, 99.0))
    assert Hybrid().displaces(waiter, more)
    assert not Hybrid().displaces(waiter, less)
    assert not Hybrid().displaces(View(2, arrived=1000.0, prompt_tokens=0), more), "it came much later"
    assert not Hybrid(displacement=0).displaces(waiter, more)
    assert Hybrid(displacement=0).displaces(waiter, View(1, class_rank=1))


@given(views, views)
def test_hybrid_lets_nobody_by_who_came_later_than_the_waiters_work_divided_by_ageing(
    waiter: View, later: View
) -> None:
    """The bound of its docstring, within a class."""
    order = Hybrid(cache_credit=0.0)
    newcomer = View(
        101,
        arrived=waiter.arrived + order.work_seconds(waiter) / order.ageing + 1.0,
        class_rank=waiter.class_rank,
        prompt_tokens=later.prompt_tokens,
        expected_remaining_tokens=later.expected_remaining_tokens,
    )
    assert order(waiter) < order(newcomer)


class TestMlq:
    def test_short_prompts_enter_at_the_top_and_long_ones_skip_levels(self) -> None:
        order = Mlq(quantum_tokens=2, prefill_tokens_per_round=100)
        entries = {1: 0, 200: 0, 201: 1, 400: 1, 401: 2, 800: 2, 801: 3, 10**9: 7}
        assert {tokens: order.level(View(1, prompt_tokens=tokens)) for tokens in entries} == entries

    def test_each_level_gives_twice_the_tokens_of_the_one_above(self) -> None:
        order = Mlq(quantum_tokens=8)
        levels = {0: 0, 7: 0, 8: 1, 23: 1, 24: 2, 55: 2, 56: 3}
        assert {tokens: order.level(View(1, output_tokens=tokens)) for tokens in levels} == levels

    def test_demotions_are_capped(self) -> None:
        order = Mlq(quantum_tokens=8, prefill_tokens_per_round=1, max_demotions=2)
        assert order.level(View(1, prompt_tokens=1, output_tokens=10**6)) == 2
        assert order.level(View(1, prompt_tokens=16, output_tokens=10**6)) == 3

    def test_within_a_level_the_first_that_arrived_is_first(self) -> None:
        order = Mlq()
        assert in_order(order, View(2, arrived=2.0), View(1, arrived=1.0, output_tokens=5)) == [1, 2]

    @given(views, st.integers(0, 5000))
    def test_a_sequence_never_rises_as_it_generates(self, view: View, more: int) -> None:
        order = Mlq()
        later = View(1, prompt_tokens=view.prompt_tokens, output_tokens=view.output_tokens + more)
        assert 0 <= order.level(view) <= order.level(later) < order.levels

    @given(views)
    def test_the_closed_form_is_the_loop(self, view: View) -> None:
        """Levels, counted one by one as the docstring says it."""
        order = Mlq()
        entry, rounds = 0, view.prompt_tokens / order.prefill_tokens_per_round
        while entry < order.levels - 1 and order.quantum_tokens * 2**entry < rounds:
            entry += 1
        level, left = entry, view.output_tokens
        while level - entry < order.max_demotions and left >= order.quantum_tokens * 2**level:
            left -= order.quantum_tokens * 2**level
            level += 1
        assert order.level(view) == min(level, order.levels - 1)


class TestDisplacing:
    @pytest.mark.parametrize("name", ["fcfs", "sjf", "cache_aware", "fair"])
    @given(waiter=views, runner=views)
    def test_the_patient_orders_never_displace(self, name: str, waiter: View, runner: View) -> None:
        assert not ORDERS[name]().displaces(waiter, runner)

    def test_priority_displaces_a_strictly_worse_one(self) -> None:
        displaces = ORDERS["priority"]().displaces
        assert displaces(View(2, priority=0), View(1, priority=1))
        assert not displaces(View(1, priority=1), View(2, priority=1))

    def test_mlq_displaces_from_a_worse_level(self) -> None:
        displaces = ORDERS["mlq"]().displaces
        assert displaces(View(2), View(1, output_tokens=1000))
        assert not displaces(View(1), View(2, output_tokens=3))

    def test_hybrid_displaces_a_strictly_less_urgent_class(self) -> None:
        displaces = ORDERS["hybrid"](displacement=0).displaces
        assert displaces(View(2, class_rank=0, expected_remaining_tokens=9e9), View(1, class_rank=1))
        assert not displaces(View(1, expected_remaining_tokens=1.0), View(2, expected_remaining_tokens=9e9))

    @pytest.mark.parametrize("name", ORDERS)
    @given(one=views, other=views)
    def test_no_two_take_each_others_place(self, name: str, one: View, other: View) -> None:
        """Else they would swap for ever; and whoever displaces stands before the one displaced."""
        order = ORDERS[name]()
        assert not (order.displaces(one, other) and order.displaces(other, one))
        if order.displaces(one, other):
            assert order(one) < order(other)


@pytest.mark.parametrize("name", ORDERS)
class TestAllOrders:
    def test_keys_are_the_same_each_time_and_of_one_length(self, name: str) -> None:
        one, other = View(1, prompt_tokens=70, output_tokens=3), View(2, matched_tokens=8, priority=3)
        assert ORDERS[name]()(one) == ORDERS[name]()(one)
        assert len(ORDERS[name]()(one)) == len(ORDERS[name]()(other))

    def test_two_of_the_same_parameters_are_equal(self, name: str) -> None:
        assert ORDERS[name]() == ORDERS[name]()

    def test_its_docstring_says_what_to_expect(self, name: str) -> None:
        said = ORDERS[name].__doc__ or ""
        for word in ("Key:", "isplaces", "Service bound", "Worst case", "Source:"):
            assert word in said, f"{name} does not say: {word}"


@given(views)
def test_what_is_still_to_compute_is_never_negative_nor_more_than_is_known(view: View) -> None:
    assert 0 <= still_to_compute(view) <= view.prompt_tokens + view.output_tokens


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ORDERS["sjf"](prefill_tokens_per_round=0),
        lambda: ORDERS["mlq"](quantum_tokens=0),
        lambda: ORDERS["mlq"](prefill_tokens_per_round=0),
        lambda: ORDERS["mlq"](max_demotions=-1),
        lambda: ORDERS["mlq"](levels=0),
        lambda: ORDERS["hybrid"](prefill_seconds=-1.0),
        lambda: ORDERS["hybrid"](decode_seconds=float("nan")),
        lambda: ORDERS["hybrid"](cache_credit=-0.1),
        lambda: ORDERS["hybrid"](ageing=-1.0),
        lambda: ORDERS["hybrid"](spent_weight=-1.0),
        lambda: ORDERS["hybrid"](displacement=0.5),
        lambda: Promotion(wait_seconds=-1.0),
        lambda: Promotion(service_tokens=-1),
    ],
)
def test_parameters_that_make_no_sense_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must (not )?be"):
        wrong()
