"""A short answer takes the place of a long one of its class, where that one loses nothing by it; else it waits."""

import pytest

from engine.policy_set import PolicyConfig
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, HOST
from policies.cost import CopySample, StepSample
from policies.decisions import Kind
from tests.engine.driving import UNFORESEEN, Driver, core_config, request

STEPS = tuple(StepSample(tokens, 0.0, 1, 40, 0.01 + 0.001 * tokens) for tokens in range(16))
ROOM = ResidencyConfig(host_blocks=64)


def served(
    residency: ResidencyConfig | None,
    resume: str = "reload",
    order: str = "hybrid",
    displacement: float = 2.0,
    *,
    shorts: int = 1,
    copy_seconds: float = 0.0,
) -> Driver:
    """One place: a long answer has it when short ones come, together. Copies are believed to take so long."""
    parameters = {**UNFORESEEN, "hybrid": {"displacement": displacement, "ageing": 0.0}}
    policies = PolicyConfig(
        order=order, resume=resume, victim="cheapest_resume", prediction="max_tokens", parameters=parameters
    )
    copies = [CopySample(HOST, DEVICE, size, copy_seconds, 0.0) for size in (4_000, 40_000)] * 8
    driver = Driver(
        core_config(max_sequences=1, policies=policies, residency=residency),
        calibration=(*STEPS, *(copies if copy_seconds else ())),
    )
    driver.arrive(request("long", range(20), 60))
    for _ in range(8):
        driver.step()
    driver.arrive(
        request("short", range(50, 56), 3), *(request(f"{n}", range(6), 3) for n in range(1, shorts))
    )
    driver.finish()
    driver.core.check()
    return driver


def first(driver: Driver) -> str:
    """Who ended first."""
    return min(driver.finished.values(), key=lambda each: each.finished).request


def test_a_short_answer_goes_before_a_long_one_that_is_loaded_again() -> None:
    driver = served(ROOM)
    long = driver.finished["long", 0]
    assert first(driver) == "short"
    assert (long.preemptions, long.recomputed_tokens) == (1, 0)
    assert long.reloaded_tokens > 0
    assert driver.core.scheduler.counts.preemptions_by["displaced"] == 1
    reasons = [each.decision.reason for each in driver.decided if each.decision.kind is Kind.PREEMPTED]
    assert reasons == ["short goes before it"]


@pytest.mark.parametrize(
    ("residency", "resume"),
    [
        (None, "reload"),  # nowhere to load from
        (ResidencyConfig(host_blocks=4), "reload"),  # no room for it
        (ResidencyConfig(host_blocks=64, spilling_blocks=1), "reload"),  # too much to save at once
        (ROOM, "recompute"),
    ],
)
def test_it_waits_where_the_long_one_would_be_computed_again(
    residency: ResidencyConfig | None, resume: str
) -> None:
    driver = served(residency, resume)
    assert first(driver) == "long"
    assert driver.core.scheduler.counts.preemptions == 0


def test_it_waits_where_nobody_is_to_be_displaced() -> None:
    assert first(served(ROOM, displacement=0.0)) == "long"


@pytest.mark.parametrize(("shorts", "waits"), [(1, True), (8, False)])
def test_what_is_too_dear_for_one_that_waits_may_be_worth_it_for_several(shorts: int, waits: bool) -> None:
    """A step is a second here: the answer that runs ends in a minute."""
    assert (first(served(ROOM, shorts=shorts, copy_seconds=60.0)) == "long") == waits


def test_the_answers_are_the_same_tokens() -> None:
    displaced, waited = served(ROOM), served(None)
    for name in ("long", "short"):
        assert displaced.tokens(name) == waited.tokens(name)
