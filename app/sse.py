"""Server-sent events: one response, frames written one by one, and a sign of life in long silences.

The write buffer's limit is zero (`app/connections.py`), so a frame that the socket does not take at once makes the
writer wait; what the engine produces meanwhile is merged in its stream. So a slow reader costs one frame here, and
never blocks anyone else, and it is cut off in the end. What frames say: `app/chat.py`, `app/completions.py`.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web
from aiohttp.http import StreamWriter

from app.loop import end_task

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment. It goes between frames, never into one."""


class ReaderGone(Exception):
    """The client has left, or its connection was cut."""


def frame(payload: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(payload, separators=(",", ":")).encode()


class EventStream:
    """`await open()`, `await send(frame)` …, then `await end()` or `abort()`; aiohttp gets `response`."""

    def __init__(self, http: web.Request, ping_seconds: float) -> None:
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        self._http = http
        self._seconds = ping_seconds
        self._loop = asyncio.get_running_loop()
        self._sent = self._loop.time()

    async def open(self) -> None:
        """Sends the headers now, before anything waits for the engine."""
        try:
            await self.response.prepare(self._http)
        except ConnectionError as error:  # the reader left before there was a word to read
            raise ReaderGone from error
        await self.send(b"")

    async def send(self, frames: bytes) -> None:
        """Writes whole frames, waiting for the socket to take them. Raises ReaderGone."""
        transport, writer = self._http.transport, self._http.writer
        if transport is None:
            raise ReaderGone
        assert isinstance(writer, StreamWriter)
        self._sent = self._loop.time()
        try:
            await writer.write(frames, drain=False)  # never waits: few frames do
            if transport.get_write_buffer_size():
                await writer.drain()
        except ConnectionError as error:
            self.abort()
            raise ReaderGone from error

    @asynccontextmanager
    async def pinging(self) -> AsyncIterator[None]:
        """While the block runs, a comment breaks every silence of `ping_seconds`."""
        task = asyncio.create_task(self._ping())
        try:
            yield
        finally:
            with suppress(ReaderGone):  # the block sees that itself
                await end_task(task)

    async def _ping(self) -> None:
        while True:
            silent = self._loop.time() - self._sent
            if silent >= self._seconds:
                await self.send(PING)
            else:
                await asyncio.sleep(self._seconds - silent)

    async def end(self) -> None:
        """Says that the answer is complete."""
        await self.send(DONE)

    def abort(self) -> None:
        """Cuts the connection, so that a broken answer never looks like a whole one."""
        if self._http.transport is not None:
            self._http.transport.abort()
