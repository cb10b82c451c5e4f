"""Reading a request's body, within the time that `server.read_timeout_seconds` gives it."""

import asyncio
from typing import TypeVar

from aiohttp import web
from aiohttp.hdrs import CONTENT_ENCODING, ORIGIN
from pydantic import BaseModel, ConfigDict

from app.errors import ApiError
from app.served import SERVED

MAX_OPERATORS_BYTES = 2**14
"""Of a body at `/admin`: all of them are small, and each mistake in one becomes an object."""

Body = TypeVar("Body", bound=BaseModel)


class Nothing(BaseModel):
    """The body of a call that needs none."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


async def read_body(http: web.Request) -> bytes:
    """The whole body. Raises ApiError (408: it came too slowly; 415: it is compressed), or aiohttp's own 413."""
    if http.headers.get(CONTENT_ENCODING, "identity").lower() != "identity":
        raise ApiError(415, "bodies must not be compressed", code="unsupported_media_type")
    seconds = http.app[SERVED].server.read_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            return await http.read()
    except TimeoutError as error:
        raise ApiError(
            408, f"the body did not arrive within {seconds:g} seconds", code="slow_body"
        ) from error


async def read_json(http: web.Request, kind: type[Body]) -> Body:
    """An operator's. Only JSON that says so: a web page elsewhere can make a browser send anything but that."""
    if http.content_type != "application/json":
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
    body = await read_body(http)
    if len(body) > MAX_OPERATORS_BYTES:
        message = f"the body has more than the {MAX_OPERATORS_BYTES} bytes that are taken here"
        raise ApiError(413, message, code="body_too_large")
    return kind.model_validate_json(body)


async def read_json_if_any(http: web.Request, kind: type[Body]) -> Body:
    """As `read_json`, but a request without a body is one with {}, unless a browser sent it: that says its `Origin`."""
    if not http.body_exists and ORIGIN not in http.headers:
        return kind()
    return await read_json(http, kind)
