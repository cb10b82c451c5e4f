"""What is done to traces keeps sessions whole and what is shared shared; prompts are what their ids say."""

import pytest

from app.workload.prompts import Prompts
from app.workload.trace import TraceRequest, rate
from app.workload.transform import CannotTransform, at_rate, clipped, first, retimed, scaled, thin, until


def session(name: str, number: int, start: float, turns: int = 3) -> list[TraceRequest]:
    """A conversation that grows by a block a turn."""
    return [
        TraceRequest(
            number + turn,
            name,
            start + 10 * turn,
            prompt_tokens=512 * (turn + 1),
            output_tokens=100,
            block_runs=((number * 100, turn + 1),),
            block_size=512,
            after=number + turn - 1 if turn else None,
            think_seconds=5.0 if turn else 0.0,
        )
        for turn in range(turns)
    ]


TRACE = sorted(
    (each for index in range(200) for each in session(f"s{index}", index * 3, float(index))),
    key=lambda each: (each.arrival, each.number),
)


def test_thinning_keeps_whole_sessions_and_less_is_a_part_of_more() -> None:
    half, quarter = thin(TRACE, 0.5, seed=1), thin(TRACE, 0.25, seed=1)
    assert len(half) / len(TRACE) == pytest.approx(0.5, abs=0.1)
    assert {each.number for each in quarter} < {each.number for each in half}
    assert all(sum(other.session == each.session for other in half) == 3 for each in half)
    assert half == thin(TRACE, 0.5, seed=1) != thin(TRACE, 0.5, seed=2)


def test_a_lower_rate_is_fewer_sessions_and_a_higher_one_is_refused() -> None:
    assert rate(at_rate(TRACE, 0.5)) == pytest.approx(0.5, rel=0.15)
    with pytest.raises(CannotTransform, match="has 1 requests/s"):
        at_rate(TRACE, 2.0)


def test_retiming_is_poisson_at_the_rate_and_moves_followers_with_their_session() -> None:
    timed = retimed(TRACE, 4.0, seed=1)
    assert rate(timed) == pytest.approx(4.0, rel=0.2)
    by_number = {each.number: each for each in timed}
    for each in timed:
        if each.after is not None:
            assert each.arrival - by_number[each.after].arrival == pytest.approx(10.0)
            assert each.think_seconds == 5.0
    assert sorted(each.number for each in timed) == sorted(each.number for each in TRACE)


def test_scaling_turns_a_recorded_block_into_a_small_one() -> None:
    small = scaled(TRACE, 16)
    assert small[0].prompt_tokens == 16
    assert small[0].output_tokens == 3
    assert all(each.block_size == 16 and each.prompt_tokens == 16 * each.blocks for each in small)
    alone = TraceRequest(0, "x", 0.0, 1000, 10)
    assert (scaled([alone], 16)[0].prompt_tokens, scaled([alone], 16)[0].block_size) == (32, 0)


def test_clipping_shortens_answers_to_half_a_context_and_prompts_from_their_ends() -> None:
    (long,) = clipped([TraceRequest(0, "x", 0.0, 5000, 900, ((7, 10),), 512)], 1600)
    assert (long.prompt_tokens, long.output_tokens, long.block_runs) == (800, 800, ((7, 1),))
    (short,) = clipped([TraceRequest(0, "x", 0.0, 100, 50)], 1600)
    assert (short.prompt_tokens, short.output_tokens) == (100, 50)


def test_the_first_requests_and_the_first_seconds_leave_no_follower_alone() -> None:
    for part in (first(TRACE, 20), until(TRACE, 20.5)):
        numbers = {each.number for each in part}
        assert part
        assert all(each.after is None or each.after in numbers for each in part)
    assert len(until(TRACE, 20.5)) == 21 * 3


@pytest.mark.parametrize("vocabulary", [100, 4096, 65536])
def test_prompts_share_just_what_their_ids_share(vocabulary: int) -> None:
    one = TraceRequest(0, "a", 0.0, 1030, 5, ((1, 2),), 512)
    same = TraceRequest(1, "b", 1.0, 1100, 5, ((1, 2), (70, 1)), 512)
    alone = TraceRequest(2, "c", 2.0, 1030, 5)
    prompts = Prompts([one, same, alone], vocabulary, first_id=10)
    a, b, c = (prompts.tokens(each) for each in (one, same, alone))
    assert [len(a), len(b), len(c)] == [1030, 1100, 1030]
    assert a[:1024] == b[:1024]
    assert a[1024:1030] != b[1024:1030]
    assert c[:16] != a[:16]
    assert {*a, *b, *c} <= set(range(10, 10 + vocabulary))
    assert a[:512] != a[512:1024]


def test_an_answer_is_what_the_follower_goes_on_with() -> None:
    begun, going_on, _ = session("s", 0, 0.0)
    prompts = Prompts([begun, going_on], 4096)
    assert prompts.answer(begun) == prompts.tokens(going_on)[512:612]
    assert prompts.answer(going_on) == []
