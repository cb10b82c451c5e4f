"""What is remembered of requests: those at hand always, of those that ended the last."""

from engine.request import Finished, FinishReason
from engine.timeline import KEPT_DECISIONS, KEPT_REQUESTS, Timelines
from policies.decisions import Decision, Kind

DECISION = Decision(Kind.ADMITTED, "", "recompute", "a test")


def finished(request: str, choice: int = 0) -> Finished:
    return Finished(
        request, choice, FinishReason.STOP, 1, 1, 0, 0, 0, 0.0, 0.0, 0.0, 1.0, 0.0, token_times=[1.0]
    )


def test_who_is_at_hand_is_remembered_however_many_end_meanwhile() -> None:
    kept = Timelines()
    kept.note("long", 0, DECISION, 0.0)
    for number in range(KEPT_REQUESTS + 5):
        kept.note(f"r{number}", 0, DECISION, 0.0)
        kept.settled(finished(f"r{number}"), last=True)
    assert len(kept) == KEPT_REQUESTS + 1
    assert kept.get("long")
    assert kept.get("r4") is None
    assert kept.get("r5")


def test_a_request_has_ended_with_its_last_choice_and_later_news_is_still_its_own() -> None:
    kept = Timelines()
    kept.note("r", 1, DECISION, 0.0)
    kept.settled(finished("r", 1), last=False)
    kept.settled(finished("r", 0), last=True)
    kept.note("r", 0, DECISION, 1.0)
    timeline = kept.get("r")
    assert timeline
    assert [each.choice for each in timeline.finished] == [1, 0]
    assert [entry.at for entry in timeline.entries] == [0.0, 1.0]
    assert len(kept) == 1


def test_decisions_are_bounded_and_those_dropped_are_counted() -> None:
    kept = Timelines()
    for number in range(KEPT_DECISIONS + 7):
        kept.note("r", 0, DECISION, float(number))
    timeline = kept.get("r")
    assert timeline
    assert (len(timeline.entries), timeline.dropped, timeline.entries[0].at) == (KEPT_DECISIONS, 7, 7.0)


def test_token_times_are_not_kept() -> None:
    """A thousand long answers' would be megabytes."""
    kept = Timelines()
    told = finished("r")
    kept.settled(told, last=True)
    assert (timeline := kept.get("r"))
    assert timeline.finished[0].token_times == []
    assert told.token_times == [1.0], "others still need them"
