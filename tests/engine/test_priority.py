"""An operator changes a request's priority: its place in the line, its class, its snapshot, and a replay of it."""

from dataclasses import replace

import pytest
from pydantic_core import from_json

from engine.events import Reprioritised
from engine.policy_set import PolicyConfig
from engine.recording import EVENTS, line
from engine.request import ServiceClass
from engine.sequence import State
from policies.decisions import Kind
from tests.engine.driving import UNFORESEEN, Driver, core_config, request

URGENT = ServiceClass("now", 0, 4.0)
ORDINARY = ServiceClass("later", 1, 1.0)


def driver(order: str = "priority", max_sequences: int = 1) -> Driver:
    policies = PolicyConfig(order=order, parameters=UNFORESEEN)
    return Driver(core_config(policies=policies, max_sequences=max_sequences))


def arrive(driven: Driver, *names: str, n: int = 1) -> None:
    for name in names:
        made = request(name, range(6), 4, n=n)
        driven.arrive(replace(made, priority=5, service=ORDINARY))


def started(driven: Driver) -> list[str]:
    """Who was admitted, in the order of their first admissions."""
    names = [each.request_id for each in driven.decided if each.decision.kind is Kind.ADMITTED]
    return list(dict.fromkeys(names))


@pytest.mark.parametrize(("priority", "order"), [(-1, ["a", "d", "b", "c"]), (9, ["a", "b", "c", "d"])])
def test_a_waiter_stands_by_its_new_priority(priority: int, order: list[str]) -> None:
    """Before those with worse ones, whether or not it displaces who runs."""
    driven = driver()
    arrive(driven, "a", "b", "c", "d")
    driven.reprioritise("d", priority, ORDINARY)
    driven.finish()
    assert started(driven) == order


def test_a_waiter_may_also_fall_behind() -> None:
    driven = driver()
    arrive(driven, "a", "b", "c")
    driven.reprioritise("b", 9, ORDINARY)
    driven.finish()
    assert started(driven) == ["a", "c", "b"]


def test_a_better_class_goes_first_by_an_order_of_classes() -> None:
    driven = driver("hybrid")
    arrive(driven, "a", "b", "c")
    driven.reprioritise("c", 5, URGENT)
    driven.finish()
    assert started(driven) == ["a", "c", "b"]
    assert driven.finished["c", 0].service == "now"


def test_a_preempted_request_keeps_its_new_priority_and_its_answer() -> None:
    """Its snapshot was taken before."""
    truth = driver()
    arrive(truth, "a")
    truth.finish()
    driven = driver()
    arrive(driven, "a")
    driven.step()
    driven.preempt("a")
    driven.reprioritise("a", -1, URGENT)
    driven.step()
    driven.preempt("a")
    (sequence,) = driven.core.sequences["a"]
    assert (sequence.priority, sequence.class_name) == (-1, "now")
    driven.finish()
    assert driven.finished["a", 0].preemptions == 2
    assert driven.tokens("a") == truth.tokens("a")


def test_all_choices_of_a_request_follow_and_one_that_ended_is_ignored() -> None:
    driven = driver(max_sequences=2)
    arrive(driven, "a", n=3)
    driven.reprioritise("a", -7, URGENT)
    assert [s.priority for s in driven.core.sequences["a"]] == [-7] * 3
    assert {s.state for s in driven.core.sequences["a"]} == {State.RUNNING, State.WAITING}
    driven.finish()
    driven.reprioritise("a", 1, ORDINARY)
    driven.reprioritise("nobody", 1, ORDINARY)
    told = [each.decision for each in driven.decided if each.decision.kind is Kind.REPRIORITISED]
    assert [each.chosen for each in told] == ["now"] * 3


def test_a_recording_holds_it() -> None:
    event = Reprioritised("a", -1, URGENT)
    _, kind, raw, _ = from_json(line(0.0, event, []))
    assert EVENTS[kind].validate_python(raw) == event


def test_promotions_class_and_tenant_are_in_the_accounts() -> None:
    """Whoever has waited for ten tokens of others' service goes first."""
    parameters: dict[str, dict[str, float]] = {**UNFORESEEN, "promotion": {"service_tokens": 10}}
    policies = PolicyConfig(order="priority", parameters=parameters)
    driven = Driver(core_config(max_sequences=1, policies=policies))
    driven.arrive(replace(request("a", range(6), 40), priority=-1))
    driven.arrive(replace(request("b", range(6), 4), priority=5, tenant="t", service=ORDINARY))
    driven.finish()
    assert driven.finished["b", 0].promotions == 1
    assert driven.core.scheduler.counts.promotions["service"] == 1
    assert (driven.finished["b", 0].service, driven.finished["b", 0].tenant) == ("later", "t")
