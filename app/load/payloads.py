"""The events of a streamed answer as a client reads them: JSON payloads, up to [DONE]."""

import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientResponse


class BrokenOff(Exception):
    """The stream ended without [DONE]."""


async def payloads(response: ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event. Raises BrokenOff, and ValueError where it is none."""
    async for line in response.content:
        name, _, data = line.strip().partition(b":")
        if name != b"data":  # a blank line, or a comment that keeps the connection alive
            continue
        if data.strip() == b"[DONE]":
            return
        yield json.loads(data)
    raise BrokenOff("the stream ended without [DONE]")
