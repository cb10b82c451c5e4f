"""Is it up, is it ready, what does it serve: `/livez`, `/readyz`, `/health`, `/v1/models`, `/metrics`."""

from typing import Any

from aiohttp import web

from app.errors import ApiError, draining
from app.metrics import METRICS
from app.served import SERVED, Served
from engine.request import EngineDead
from engine.state import device_bytes, policies, tier_bytes


async def livez(http: web.Request) -> web.Response:
    """200 while the event loop turns and the engine lives: otherwise restart the process."""
    _refuse_when_dead(http.app[SERVED])
    return web.json_response({"status": "alive"})


async def readyz(http: web.Request) -> web.Response:
    """200 while new requests are taken: otherwise send them elsewhere."""
    served = http.app[SERVED]
    _refuse_when_dead(served)
    if not served.ready:
        raise draining()
    return web.json_response({"status": "ready"})


async def health(http: web.Request) -> web.Response:
    """As vLLM has it: an empty 200 while the engine lives."""
    _refuse_when_dead(http.app[SERVED])
    return web.Response()


def _refuse_when_dead(served: Served) -> None:
    if served.engine.failure is not None:
        raise EngineDead


async def models(http: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [_model(http.app[SERVED])]})


async def model(http: web.Request) -> web.Response:
    served = http.app[SERVED]
    name = http.match_info["name"]
    if name != served.model.name:
        raise ApiError(404, f"The model {name!r} does not exist here.", code="model_not_found", param="model")
    return web.json_response(_model(served))


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.model.name,
        "object": "model",
        "created": served.model.created,
        "owned_by": "sluice",
        "max_model_len": served.context,
    }


async def metrics(http: web.Request) -> web.Response:
    engine = http.app[SERVED].engine
    devices = device_bytes(engine.fleet, engine.block_bytes)
    http.app[METRICS].observe_tiers(devices, tier_bytes(engine.fleet, engine.block_bytes))
    http.app[METRICS].policies.show(policies(engine.fleet))
    body, content_type = http.app[METRICS].exposition(engine.fleet)
    return web.Response(body=body, headers={"Content-Type": content_type})
