"""For operators: what the engine is doing, and ending or preempting a request. Of the cache: app/admin_cache.py.

Nothing here waits for the engine.
"""

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
        raise _unknown(request_id)
    return web.json_response({"id": request_id, "state": "cancelled"})


async def preempt(http: web.Request) -> web.Response:
    """Makes a request give its place up now: it is saved as far as tiers allow, waits, and comes back in its turn."""
    request_id, engine = http.match_info["id"], http.app[SERVED].engine
    if not engine.preempt(request_id):
        if request_id not in {each["id"] for each in engine.requests()}:
            raise _unknown(request_id)
        message = f"request {request_id!r} is waiting: there is nothing to take from it"
        raise ApiError(409, message, code="request_not_running")
    return web.json_response({"id": request_id, "state": "preempted"})


def _unknown(request_id: str) -> ApiError:
    message = f"there is no running or waiting request {request_id!r}; /admin/requests lists them"
    return ApiError(404, message, code="request_not_found")
