"""For operators: what the engine is doing, and ending a request. Nothing here waits for the engine."""

from aiohttp import web

from app.errors import ApiError
from app.served import SERVED


async def state(http: web.Request) -> web.Response:
    served = http.app[SERVED]
    return web.json_response({"model": served.model.name} | served.engine.state())


async def requests(http: web.Request) -> web.Response:
    return web.json_response({"requests": http.app[SERVED].engine.requests()})


async def cancel(http: web.Request) -> web.Response:
    """Ends a request wherever it stands; its client gets an error."""
    request_id = http.match_info["id"]
    if not http.app[SERVED].engine.cancel(request_id):
        raise ApiError(
            404, f"there is no running or waiting request {request_id!r}", code="request_not_found"
        )
    return web.json_response({"id": request_id, "state": "cancelled"})
