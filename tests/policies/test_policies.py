"""The built-in policies keep what their docstrings promise."""

from policies.order import ORDERS
from policies.preemption import VICTIMS
from tests.policies.view import View


def test_fcfs_puts_earlier_arrivals_first() -> None:
    views = [View(3), View(1), View(2)]
    assert [view.number for view in sorted(views, key=ORDERS["fcfs"])] == [1, 2, 3]


def test_last_admitted_takes_the_newest_admission_not_the_newest_arrival() -> None:
    views = [View(1, admitted_as=7), View(2, admitted_as=3), View(3, admitted_as=5)]
    assert VICTIMS["last_admitted"](views) is views[0]


def test_every_policy_says_what_it_is_for() -> None:
    for policy in (*ORDERS.values(), *VICTIMS.values()):
        assert "Source:" in (policy.__doc__ or "")
