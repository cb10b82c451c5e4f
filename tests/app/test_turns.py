"""A crowd is let in one by one, and the loop turns meanwhile."""

import asyncio
import socket
from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import pytest

from app.loop import new_event_loop
from app.turns import READ_AT_ONCE, Door, Turns


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, new_event_loop])
def test_of_many_new_connections_a_few_are_read_in_a_turn(make_loop: Callable[[], AbstractEventLoop]) -> None:
    """And all are read in the end; also by uvloop, which begins to read a connection when it is made."""
    with asyncio.Runner(loop_factory=make_loop) as runner:
        read_by_turn = runner.run(_crowd(200))
    assert sum(read_by_turn.values()) == 200
    assert max(read_by_turn.values()) <= READ_AT_ONCE


async def _crowd(count: int) -> Counter[int]:
    """Clients that have all connected and asked before the server looks: how many it reads, by turn of its loop."""
    loop = asyncio.get_running_loop()
    door, read, turns, all_read = Door(loop), Counter[int](), [0], asyncio.Event()

    class Reader(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            door.come(cast(asyncio.Transport, transport))

        def data_received(self, data: bytes) -> None:
            read[turns[0]] += 1
            if read.total() == count:
                all_read.set()

    def turn() -> None:
        turns[0] += 1
        if not all_read.is_set():
            loop.call_soon(turn)

    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(count)]
        for client in clients:
            client.sendall(b"hello")
        server = await loop.create_server(Reader, sock=listener)
        turn()
        await asyncio.wait_for(all_read.wait(), 30)
        for client in clients:
            client.close()
        server.close()
    return read


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
