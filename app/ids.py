"""The `x-request-id` of every answer: the client's own, if it is a sane one, else one of ours."""

import re
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler

HEADER = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
CLIENT_ID: web.RequestKey[str | None] = web.RequestKey("client_id")


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"


@web.middleware
async def request_ids(request: web.Request, handler: Handler) -> web.StreamResponse:
    said = request.headers.get(HEADER, "")
    request[CLIENT_ID] = said if _SANE.fullmatch(said) else None
    request[REQUEST_ID] = request[CLIENT_ID] or new_id("req")
    return await handler(request)


async def add_header(http: web.Request, response: web.StreamResponse) -> None:
    """A signal of aiohttp's: runs just before an answer's headers are sent."""
    if REQUEST_ID in http:
        response.headers[HEADER] = http[REQUEST_ID]
