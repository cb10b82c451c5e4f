"""The built-in victims keep what their docstrings promise."""

from policies.preemption import VICTIMS
from tests.policies.view import View


def test_last_admitted_takes_the_newest_admission_not_the_newest_arrival() -> None:
    views = [View(1, admitted_as=7), View(2, admitted_as=3), View(3, admitted_as=5)]
    assert VICTIMS["last_admitted"](views) is views[0]


def test_every_policy_says_what_it_is_for() -> None:
    for policy in VICTIMS.values():
        assert "Source:" in (policy.__doc__ or "")
