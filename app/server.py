"""The aiohttp application: routes, middlewares, and the limits of its connections."""

import socket
from collections.abc import AsyncIterator
from threading import Lock

from aiohttp import web
from structlog.stdlib import get_logger

from app import (
    admin,
    admin_cache,
    admin_policies,
    admin_replicas,
    admin_timeline,
    admin_verify,
    calls,
    health,
    openapi,
    tokens,
)
from app.config import ServerSection
from app.connections import Runner
from app.descriptors import reserve
from app.errors import errors_as_json
from app.guard import ALLOWANCES, guard
from app.http_metrics import path_of
from app.ids import add_header, request_ids
from app.lag import measured_lag
from app.metrics import METRICS, Metrics
from app.rate import Allowances
from app.served import SERVED, Served
from app.turns import Turns

log = get_logger(__name__)

SHUTDOWN_SECONDS = 5.0
"""For handlers still writing when the engine has nothing left to say."""

LINGERING_SECONDS = 5.0
"""For the rest of a body whose request is answered already; then the connection is closed."""

READ_BUFFER_BYTES = 2**16
"""Of a connection, before it is read on."""

BACKLOG = 1024
"""Connections that the kernel keeps for us while we are busy: hundreds of clients may come at once."""

ROUTES = [
    web.post("/v1/chat/completions", calls.chat_completions),
    web.post("/v1/completions", calls.completions),
    web.post("/tokenize", tokens.tokenize),
    web.post("/detokenize", tokens.detokenize),
    web.get("/v1/models", health.models),
    web.get("/v1/models/{name:.+}", health.model),
    web.get("/livez", health.livez),
    web.get("/readyz", health.readyz),
    web.get("/health", health.health),
    web.get("/metrics", health.metrics),
    web.get("/openapi.json", openapi.openapi),
    web.get("/admin/state", admin.state),
    web.get("/admin/requests", admin.requests),
    web.get("/admin/requests/{id}", admin_timeline.timeline),
    web.post("/admin/requests/{id}/cancel", admin.cancel),
    web.post("/admin/requests/{id}/preempt", admin.preempt),
    web.post("/admin/requests/{id}/priority", admin.priority),
    web.post("/admin/requests/{id}/migrate", admin_replicas.migrate),
    web.post("/admin/replicas/{number}/drain", admin_replicas.drain),
    web.post("/admin/replicas/{number}/resume", admin_replicas.resume),
    web.get("/admin/policies", admin_policies.show),
    web.put("/admin/policies", admin_policies.change),
    web.get("/admin/cache/stat", admin_cache.stat),
    web.post("/admin/cache/verify", admin_verify.verify),
    web.post("/admin/cache/prune", admin_cache.prune),
    web.post("/admin/cache/clear", admin_cache.clear),
]


def application(served: Served, metrics: Metrics) -> web.Application:
    """Also subscribes the metrics and the request log to the engine."""
    app = web.Application(
        middlewares=[request_ids, errors_as_json, guard], client_max_size=served.server.max_body_bytes
    )
    app[SERVED] = served
    app[METRICS] = metrics
    app[admin_verify.VERIFYING] = Lock()
    app[ALLOWANCES] = Allowances()
    app[calls.TURNS] = Turns()
    app.add_routes(ROUTES)
    app.on_response_prepare.extend([add_header, _count])
    app.cleanup_ctx.append(_observed_loop)
    served.engine.on_step.append(metrics.observe_step)
    served.engine.on_copy.append(metrics.observe_copy)
    served.engine.on_tier.append(metrics.observe_tier)
    served.engine.on_resumed.append(metrics.policies.observe_resumed)
    served.engine.on_migration.append(metrics.observe_migration)
    served.engine.on_replica.append(metrics.observe_replica)
    served.engine.on_policy_failed.append(metrics.policies.observe_failure)
    metrics.expect_tiers(served.kvstore)
    served.engine.on_finished += [metrics.observe_finished, served.requests.finished]
    return app


async def _observed_loop(app: web.Application) -> AsyncIterator[None]:
    async with measured_lag(app[METRICS].lag.observe):
        yield


async def _count(http: web.Request, response: web.StreamResponse) -> None:
    """A signal of aiohttp's: runs just before an answer's headers are sent."""
    http.app[METRICS].http.answered(path_of(http), response.status)


async def listen(app: web.Application, server: ServerSection, listener: socket.socket) -> web.AppRunner:
    """Serves on a bound socket until its `cleanup()`. A client that leaves cancels its handler.

    What aiohttp would choose by itself is said here. A request whose headers do not arrive has as long as an idle
    connection; bodies are timed by app/bodies.py, and bounded by the application.
    """
    connections = reserve(server.max_connections)
    if connections < server.max_connections:
        log.warning("connections_limited", wanted=server.max_connections, connections=connections)
    runner = Runner(
        app,
        app[METRICS].http,
        max_connections=connections,
        write_timeout_seconds=server.write_timeout_seconds,
        access_log=None,
        auto_decompress=False,  # a small body may become a huge one
        keepalive_timeout=server.keepalive_seconds,
        lingering_time=LINGERING_SECONDS,
        max_line_size=server.max_header_bytes,
        max_field_size=server.max_header_bytes,
        max_headers=server.max_headers,
        read_bufsize=READ_BUFFER_BYTES,
        shutdown_timeout=SHUTDOWN_SECONDS,
        tcp_keepalive=True,
    )
    await runner.setup()
    await web.SockSite(runner, listener, backlog=BACKLOG).start()
    return runner
