"""From traces to figures, by hand-made traces."""

import pytest

from bench import figures
from bench.peers.wire import Trace


def trace(*times: float, first: int = 0) -> Trace:
    return Trace([first + i for i in range(len(times))], list(times))


def test_a_prefill_lasts_until_the_last_stream_has_its_first_token() -> None:
    assert figures.prefill_seconds([trace(0.1, 0.2), trace(0.5, 0.6), trace(0.3)]) == 0.5


def test_decode_counts_only_while_every_stream_runs() -> None:
    """Neither the others' prefill before it, nor the tail of those that end later."""
    early, late = trace(1.0, 2.0, 3.0, 4.0), trace(2.0, 3.0, 4.0, 5.0)
    assert figures.decode_window([early, late]) == (2.0, 4)


def test_the_first_token_is_the_prefills_so_one_stream_decodes_one_token_less_than_it_has() -> None:
    assert figures.decode_window([trace(1.0, 1.5, 2.0)]) == (1.0, 2)


@pytest.mark.parametrize("late", [3.0, 2.0])
def test_streams_that_never_ran_together_are_unmeasurable(late: float) -> None:
    with pytest.raises(figures.Unmeasurable, match=r"began at .* ended at 2\.000 s"):
        figures.decode_window([trace(1.0, 2.0), trace(late, late + 1)])


def test_agreement_is_the_share_of_streams_with_the_same_first_tokens() -> None:
    reference = [trace(*range(10)), trace(*range(10), first=5)]
    assert figures.agreement(reference, reference) == 1.0
    assert figures.agreement([reference[0], trace(*range(10), first=6)], reference) == 0.5


def test_agreement_ignores_how_many_more_tokens_each_peer_had_time_for() -> None:
    assert figures.agreement([trace(*range(8))], [trace(*range(64))]) == 1.0


def test_agreement_of_different_jobs_is_our_bug() -> None:
    with pytest.raises(ValueError, match="zip"):
        figures.agreement([trace(1.0)], [])


def test_a_ratio_is_of_medians_and_none_without_both_sides() -> None:
    assert figures.ratio([1.0, 100.0, 3.0], [1.5]) == 2.0
    assert figures.ratio([], [1.0]) is None
    assert figures.ratio([1.0], []) is None
