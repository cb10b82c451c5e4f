"""Reading a request's body, within the time that `server.read_timeout_seconds` gives it."""

import asyncio

from aiohttp import web

from app.errors import ApiError
from app.served import SERVED


async def read_body(http: web.Request) -> bytes:
    """The whole body. Raises ApiError (408: it came too slowly), or aiohttp's own 413."""
    seconds = http.app[SERVED].server.read_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            return await http.read()
    except TimeoutError as error:
        raise ApiError(
            408, f"the body did not arrive within {seconds:g} seconds", code="slow_body"
        ) from error
