"""The built-in victims keep what their docstrings promise."""

from dataclasses import dataclass

from policies.preemption import VICTIMS
from tests.policies.view import View


@dataclass(frozen=True)
class Offered:
    """Implements policies.preemption.Offer."""

    price: float = 1.0
    frees: int = 1


def first(policy: str, *views: View, prices: dict[int, float] | None = None) -> int:
    """Who goes first, by number."""
    victim, priced = VICTIMS[policy], prices or {}
    return min(views, key=lambda view: victim(view, Offered(priced.get(view.number, 1.0)))).number


def test_last_admitted_takes_the_newest_admission_not_the_newest_arrival() -> None:
    assert first("last_admitted", View(1, admitted_as=7), View(2, admitted_as=3), View(3, admitted_as=5)) == 1


def test_fewest_output_takes_the_longest_prompt_among_equals() -> None:
    views = [View(1, output_tokens=3), View(2, output_tokens=1), View(3, output_tokens=1, prompt_tokens=90)]
    assert first("fewest_output", *views) == 3


def test_least_computed_takes_who_loses_least() -> None:
    assert first("least_computed", View(1, computed_tokens=30), View(2, computed_tokens=10)) == 2


def test_lowest_priority_takes_the_least_urgent_class_before_the_priority_within_it() -> None:
    views = [View(1, class_rank=1), View(2, class_rank=0, priority=9), View(3, class_rank=1, priority=2)]
    assert first("lowest_priority", *views) == 3


def test_cheapest_resume_takes_the_lowest_price_per_block() -> None:
    assert first("cheapest_resume", View(1), View(2), View(3), prices={1: 3.0, 2: 0.5, 3: 1.0}) == 2


def test_every_policy_says_what_it_is_for() -> None:
    for policy in VICTIMS.values():
        assert "Source:" in (policy.__doc__ or "")
