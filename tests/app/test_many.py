"""Hundreds of clients at once: every answer complete, and the same as alone."""

import asyncio
from typing import Any

from tests.app.rig import Rig, rig
from tests.app.test_answers import joined
from tests.fakes import hashed

TEXT = "/v1/completions"
STREAMS = 200


def body(number: int) -> dict[str, Any]:
    return {
        "prompt": f"client {number} says {'hello ' * (number % 7)}",
        "max_tokens": 10 + number % 9,
        "seed": number,
    }


async def told(server: Rig, number: int) -> str:
    return joined(await server.stream(TEXT, **body(number)))[0]


async def test_many_streams_at_once_are_complete_and_right_under_pressure() -> None:
    """A pool far below demand: sequences are preempted, and no client notices."""
    async with rig(hashed(128), blocks=40, max_sequences=32, max_queue=STREAMS) as server:
        together = await asyncio.gather(*[told(server, number) for number in range(STREAMS)])
        assert server.engine.core.scheduler.counts.preemptions > 0
    async with rig(hashed(128)) as server:
        for number in range(0, STREAMS, 17):
            assert together[number] == await told(server, number)


async def test_one_more_than_fits_is_sent_away_and_all_others_are_served() -> None:
    async with rig(max_queue=20, max_sequences=4) as server:
        server.worker.gate.clear()
        calls = [asyncio.ensure_future(server.post(TEXT, **body(number))) for number in range(60)]
        await server.until(running=21)
        while sum(call.done() for call in calls) < 60 - 21:
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
        server.worker.gate.set()
        statuses = [status for status, _ in await asyncio.gather(*calls)]
    assert (statuses.count(200), statuses.count(429)) == (21, 39)
