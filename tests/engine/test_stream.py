"""A request's stream: readers are woken a few at a time, in turn, and miss nothing."""

import asyncio
from itertools import pairwise

import pytest

from engine import stream as stream_module
from engine.plan import Sampling
from engine.request import Delta, FinishReason, Request, Stopping
from engine.stream import WOKEN_AT_ONCE, Bell, Stream

CROWD = 3 * WOKEN_AT_ONCE + 1


def stream(number: int, bell: Bell) -> Stream:
    return Stream(Request(f"{number}", (1,), Sampling(), Stopping(9)), lambda _: False, bell)


def delta(token: int, reason: FinishReason | None = None) -> Delta:
    return Delta(0, f"{token}", (token,), (), reason)


async def test_a_crowd_of_readers_is_woken_a_few_in_each_turn_of_the_loop() -> None:
    bell = Bell(asyncio.get_running_loop())
    streams = [stream(number, bell) for number in range(CROWD)]
    told: list[int] = []

    async def read(number: int) -> None:
        while not streams[number].ended:
            await anext(streams[number])
            told.append(number)

    readers = [asyncio.ensure_future(read(number)) for number in range(CROWD)]
    await asyncio.sleep(0)
    for each in streams:
        each.feed(delta(1))
    counts = []
    while len(told) < CROWD:
        counts.append(len(told))
        await asyncio.sleep(0)
    assert max(later - one for one, later in pairwise(counts)) == WOKEN_AT_ONCE
    assert told == list(range(CROWD))
    for each in streams:
        each.feed(delta(2, FinishReason.LENGTH))
    await asyncio.gather(*readers)
    assert told == [*range(CROWD), *range(CROWD)]


async def test_what_comes_before_a_reader_is_woken_is_merged() -> None:
    bell = Bell(asyncio.get_running_loop())
    one = stream(0, bell)
    reader = asyncio.ensure_future(anext(one))
    await asyncio.sleep(0)
    for token in range(5):
        one.feed(delta(token))
    assert (await reader).token_ids == (0, 1, 2, 3, 4)


async def test_what_nobody_reads_is_copied_once_however_much_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was joined with each token: 64,000 unread ones took ten seconds of the event loop."""
    joined: list[int] = []
    join = stream_module._joined

    def noted(deltas: list[Delta]) -> Delta:
        joined.append(len(deltas))
        return join(deltas)

    monkeypatch.setattr(stream_module, "_joined", noted)
    one = stream(0, Bell(asyncio.get_running_loop()))
    for token in range(1000):
        one.feed(delta(token))
    assert (await anext(one)).token_ids == tuple(range(1000))
    assert joined == [1000]


async def test_news_that_nobody_waited_for_are_there_for_who_asks() -> None:
    bell = Bell(asyncio.get_running_loop())
    one = stream(0, bell)
    one.feed(delta(1))
    one.feed(delta(2, FinishReason.STOP))
    assert [each.token_ids async for each in one] == [(1, 2)]
