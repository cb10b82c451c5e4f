"""Who is let in: a middleware that checks the `Host`, the API key, its role, and its limits, in that order.

A path that does not exist needs a key too. What keys are: app/keys.py; limits: app/rate.py; hosts: app/hosts.py.
"""

import asyncio

from aiohttp import web
from aiohttp.hdrs import AUTHORIZATION, HOST
from aiohttp.typedefs import Handler

from app.errors import ApiError
from app.hosts import may_name
from app.keys import KeyTable
from app.rate import Allowances, OverLimit
from app.salt import tenant_of
from app.served import SERVED

OPEN = frozenset({"/livez", "/readyz"})
"""Probes have no key. They say nothing but whether the server works."""

FOR_ADMINS = ("/admin/", "/metrics")
LIMITED = frozenset({"/v1/chat/completions", "/v1/completions"})
ALLOWANCES: web.AppKey[Allowances] = web.AppKey("allowances", Allowances)


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    _check_host(request)
    keys = request.app[SERVED].keys
    if not keys.demanded or request.path in OPEN:
        return await handler(request)
    key = keys.find(tenant_of(request.headers))
    if key is None:
        raise _stranger(request)
    _check_role(request.path, key)
    if request.path not in LIMITED:
        return await handler(request)
    try:
        with request.app[ALLOWANCES].taking(key, asyncio.get_running_loop().time()):
            return await handler(request)
    except OverLimit as over:
        headers = {"Retry-After": str(over.retry_after)}
        raise ApiError(429, str(over), code=over.code, headers=headers) from over


def _check_host(request: web.Request) -> None:
    server = request.app[SERVED].server
    if not may_name(request.headers.get(HOST), server.host, server.allowed_hosts):
        message = "this server does not go by that name; its operator can add it to server.allowed_hosts"
        raise ApiError(421, message, code="host_not_allowed")


def _stranger(request: web.Request) -> ApiError:
    said = AUTHORIZATION in request.headers
    message = "no such API key" if said else "an API key is needed: Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _check_role(path: str, key: KeyTable) -> None:
    if path.startswith(FOR_ADMINS) and key.role != "admin":
        raise ApiError(403, "this API key is not an admin's", code="admin_only")
