"""Promotion gives its reason, and none while it is off."""

from policies.promotion import Promotion
from tests.policies.view import View

PREEMPTED = View(1, preemptions=3, resume_seconds=2.5, kept_tokens=4000)


def test_by_default_service_alone_promotes() -> None:
    assert Promotion().service_tokens > 0
    assert Promotion().wait_seconds == 0
    assert Promotion().reason_at_enqueue(PREEMPTED) is None


def test_it_promotes_at_the_threshold_and_not_before() -> None:
    assert Promotion(demotions=3).reason_at_enqueue(PREEMPTED) == "demotions"
    assert Promotion(demotions=4).reason_at_enqueue(PREEMPTED) is None
    assert Promotion(resume_seconds=2.5).reason_at_enqueue(PREEMPTED) == "resume_price"
    assert Promotion(resume_seconds=2.6).reason_at_enqueue(PREEMPTED) is None
    assert Promotion(kv_blocks_tokens=4000).reason_at_enqueue(PREEMPTED) == "kv_held"
    assert Promotion(kv_blocks_tokens=4001).reason_at_enqueue(PREEMPTED) is None


def test_of_several_reasons_it_gives_the_first() -> None:
    assert (
        Promotion(demotions=1, resume_seconds=0.1, kv_blocks_tokens=1).reason_at_enqueue(PREEMPTED)
        == "demotions"
    )


def test_newcomers_are_not_promoted() -> None:
    everything = Promotion(demotions=1, resume_seconds=0.1, kv_blocks_tokens=1)
    assert everything.reason_at_enqueue(View(1, kept_tokens=4000, resume_seconds=1.0)) is None
