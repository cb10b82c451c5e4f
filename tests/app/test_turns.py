"""A crowd is let in one by one, and the loop turns meanwhile."""

import asyncio
from itertools import pairwise

from app.turns import Turns


async def test_others_have_a_turn_between_two_of_a_crowd() -> None:
    turns, told = Turns(), list[str]()

    async def come(name: str) -> None:
        await turns.take()
        told.append(name)

    async def other() -> None:
        while told.count("other") < 100:
            told.append("other")
            await asyncio.sleep(0)

    crowd = [f"{number}" for number in range(20)]
    await asyncio.gather(other(), *map(come, crowd))
    assert [name for name in told if name != "other"] == crowd, "first come, first let in"
    for one, next_one in pairwise(crowd):
        assert "other" in told[told.index(one) : told.index(next_one)]


async def test_who_leaves_while_it_waits_holds_nobody_up() -> None:
    turns = Turns()
    waiting = [asyncio.ensure_future(turns.take()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[1].cancel()
    await asyncio.wait_for(waiting[2], 5)
    assert [each.cancelled() for each in waiting] == [True, True, False]
    next_one = asyncio.ensure_future(turns.take())
    await asyncio.sleep(0)
    assert not next_one.done(), "it has its turn after the loop's"
    await asyncio.wait_for(next_one, 5)
