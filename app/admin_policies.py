"""For operators: `/admin/policies`, which policies decide, and others from now on. docs/policies.md says what they do.

Only names that were loaded at the start are taken: ours, and the configuration's plug-ins. Nothing is loaded over HTTP.
"""

from typing import Any

from aiohttp import web
from pydantic import ConfigDict, RootModel
from structlog.stdlib import get_logger

from app.bodies import read_json
from app.config_sources import did_you_mean, nearest
from app.errors import ApiError, bad_request
from app.served import SERVED, Served
from engine.policy_set import FAMILIES
from engine.state import policies

log = get_logger(__name__)


class Names(RootModel[dict[str, str]]):
    """A policy's name for each family that is to change."""

    model_config = ConfigDict(frozen=True, strict=True)


async def show(http: web.Request) -> web.Response:
    """Names in force; names that may be put in force; parameters, by policy, as the configuration has them."""
    return web.json_response(_state(http.app[SERVED]))


async def change(http: web.Request) -> web.Response:
    """Puts other policies in force: all that are asked for, or none."""
    served = http.app[SERVED]
    names = (await read_json(http, Names)).root
    _check(served, names)
    if served.engine.failure is not None:
        raise ApiError(409, "the engine has died; nothing decides any more", code="engine_dead")
    before = policies(served.engine.fleet)
    served.engine.use_policies(names)
    for family, name in names.items():
        if before[family] != name:
            log.info("policy_changed", family=family, before=before[family], policy=name)
    return web.json_response(_state(served))


def _check(served: Served, names: dict[str, str]) -> None:
    in_force, available = policies(served.engine.fleet), _available(served)
    for family, name in names.items():
        if family not in in_force:
            hint = did_you_mean(nearest(family, available))
            raise bad_request(f"there is no family of policies {family!r}{hint}", family)
        if name not in available[family]:
            raise bad_request(_unknown(family, name, available[family]), family, code="unknown_policy")


def _unknown(family: str, name: str, known: list[str]) -> str:
    if ":" in name:
        return f"{name!r} was not loaded at the start: name it in policies.also.{family} of the configuration"
    hint = did_you_mean(nearest(name, known))
    return f"there is no {family} policy {name!r}{hint or '; known are ' + ', '.join(known)}"


def _available(served: Served) -> dict[str, list[str]]:
    catalog = served.engine.fleet.common.catalog
    return {family: catalog.names(family) for family in FAMILIES}


def _state(served: Served) -> dict[str, Any]:
    return {
        "policies": policies(served.engine.fleet),
        "available": _available(served),
        "parameters": served.engine.fleet.common.config.parameters,
    }
