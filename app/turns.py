"""Who comes in a crowd is let in by and by: meanwhile the event loop has turns for everybody else.

To accept a call (parse, check, tokenise, tell the core) takes some half a millisecond, and to read it from its
connection before that a tenth. Hundreds that arrive together would be accepted in one turn of the loop, and hold up
every stream for all of it.
"""

import asyncio
from collections import deque

READ_AT_ONCE = 32
"""New connections whose first request is read in one turn of the loop."""


class Door:
    """New connections are read a few in each turn of the loop, first come, first heard."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._came = 0  # in this turn
        self._held: deque[asyncio.Transport] = deque()

    def come(self, connection: asyncio.Transport) -> None:
        """It is new. Call it in `connection_made`."""
        self._came += 1
        if self._came == 1:
            self._loop.call_soon(self._next_turn)
        if self._came > READ_AT_ONCE or self._held:
            self._loop.call_soon(self._hold, connection)  # uvloop begins to read after `connection_made`

    def _next_turn(self) -> None:
        self._came = 0

    def _hold(self, connection: asyncio.Transport) -> None:
        if connection.is_closing():
            return
        connection.pause_reading()
        self._held.append(connection)
        if len(self._held) == 1:
            self._loop.call_soon(self._let_in)

    def _let_in(self) -> None:
        for _ in range(min(READ_AT_ONCE, len(self._held))):
            connection = self._held.popleft()
            if not connection.is_closing():
                connection.resume_reading()
        if self._held:
            self._loop.call_soon(self._let_in)


class Turns:
    """For one event loop. First come, first let in."""

    def __init__(self) -> None:
        self._gate = asyncio.Lock()

    async def take(self) -> None:
        """Returns in a turn of the loop in which it returns to nobody else."""
        async with self._gate:
            await asyncio.sleep(0)
