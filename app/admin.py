"""For operators: what the engine is doing; ending or preempting a request, and changing its priority.

Nothing here waits for the engine. Of replicas, and sending a request to another: app/admin_replicas.py. What was
decided about a request: app/admin_timeline.py. Of the cache: app/admin_cache.py. Of policies: app/admin_policies.py.
"""

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from app.bodies import Nothing, read_json, read_json_if_any
from app.errors import ApiError
from app.served import SERVED
from app.service_classes import Priority


class Priorities(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    priority: Priority  # lower first


async def state(http: web.Request) -> web.Response:
    served = http.app[SERVED]
    return web.json_response({"model": served.model.name} | served.engine.state())


async def requests(http: web.Request) -> web.Response:
    return web.json_response({"requests": http.app[SERVED].engine.requests()})


async def cancel(http: web.Request) -> web.Response:
    """Ends a request wherever it stands; its client gets an error."""
    await read_json_if_any(http, Nothing)
    request_id = http.match_info["id"]
    if not http.app[SERVED].engine.cancel(request_id):
        raise unknown_request(request_id)
    return web.json_response({"id": request_id, "state": "cancelled"})


async def preempt(http: web.Request) -> web.Response:
    """Makes a request give its place up now: it is saved as far as tiers allow, waits, and comes back in its turn."""
    await read_json_if_any(http, Nothing)
    request_id, engine = http.match_info["id"], http.app[SERVED].engine
    if not engine.preempt(request_id):
        if request_id not in {each["id"] for each in engine.requests()}:
            raise unknown_request(request_id)
        message = f"request {request_id!r} is waiting: there is nothing to take from it"
        raise ApiError(409, message, code="request_not_running")
    return web.json_response({"id": request_id, "state": "preempted"})


async def priority(http: web.Request) -> web.Response:
    """A request's priority from now on, and with it its class, unless its API key has one."""
    request_id, served = http.match_info["id"], http.app[SERVED]
    wanted = (await read_json(http, Priorities)).priority
    sequences = served.engine.fleet.sequences_of(request_id)
    if not sequences:
        raise unknown_request(request_id)
    service = served.classes.of(sequences[0].tenant, wanted)
    if not served.engine.reprioritise(request_id, wanted, service):
        raise ApiError(409, "the engine has died; nothing goes first any more", code="engine_dead")
    return web.json_response({"id": request_id, "priority": wanted, "class": service.name})


def unknown_request(request_id: str) -> ApiError:
    message = f"there is no running or waiting request {request_id!r}; /admin/requests lists them"
    return ApiError(404, message, code="request_not_found")
