"""The built-in policies keep what their docstrings promise."""

from dataclasses import dataclass

from policies.order import ORDERS
from policies.preemption import VICTIMS


@dataclass(frozen=True)
class View:
    number: int
    arrived: float = 0.0
    admissions: int = 0
    admitted_as: int = -1
    prompt_tokens: int = 10
    output_tokens: int = 0
    computed_tokens: int = 0
    held_blocks: int = 0


def test_fcfs_puts_earlier_arrivals_first() -> None:
    views = [View(3), View(1), View(2)]
    assert [view.number for view in sorted(views, key=ORDERS["fcfs"])] == [1, 2, 3]


def test_last_admitted_takes_the_newest_admission_not_the_newest_arrival() -> None:
    views = [View(1, admitted_as=7), View(2, admitted_as=3), View(3, admitted_as=5)]
    assert VICTIMS["last_admitted"](views) is views[0]


def test_every_policy_says_what_it_is_for() -> None:
    for policy in (*ORDERS.values(), *VICTIMS.values()):
        assert "Source:" in (policy.__doc__ or "")
