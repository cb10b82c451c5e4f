"""The aiohttp application: routes, middlewares, and the limits of its connections."""

import socket
from collections.abc import AsyncIterator
from threading import Lock

from aiohttp import web

from app import admin, admin_cache, admin_policies, admin_timeline, admin_verify, calls, health
from app.config import ServerSection
from app.errors import errors_as_json
from app.ids import add_header, request_ids
from app.lag import measured_lag
from app.metrics import METRICS, Metrics
from app.served import SERVED, Served

SHUTDOWN_SECONDS = 5.0
"""For handlers still writing when the engine has nothing left to say."""

ROUTES = [
    web.post("/v1/chat/completions", calls.chat_completions),
    web.post("/v1/completions", calls.completions),
    web.get("/v1/models", health.models),
    web.get("/v1/models/{name:.+}", health.model),
    web.get("/livez", health.livez),
    web.get("/readyz", health.readyz),
    web.get("/health", health.health),
    web.get("/metrics", health.metrics),
    web.get("/admin/state", admin.state),
    web.get("/admin/requests", admin.requests),
    web.get("/admin/requests/{id}", admin_timeline.timeline),
    web.post("/admin/requests/{id}/cancel", admin.cancel),
    web.post("/admin/requests/{id}/preempt", admin.preempt),
    web.post("/admin/requests/{id}/priority", admin.priority),
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
        middlewares=[request_ids, errors_as_json], client_max_size=served.server.max_body_bytes
    )
    app[SERVED] = served
    app[METRICS] = metrics
    app[admin_verify.VERIFYING] = Lock()
    app.add_routes(ROUTES)
    app.on_response_prepare.append(add_header)
    app.cleanup_ctx.append(_observed_loop)
    served.engine.on_step.append(metrics.observe_step)
    served.engine.on_copy.append(metrics.observe_copy)
    served.engine.on_tier.append(metrics.observe_tier)
    served.engine.on_resumed.append(metrics.policies.observe_resumed)
    served.engine.on_policy_failed.append(metrics.policies.observe_failure)
    metrics.expect_tiers(served.kvstore)
    served.engine.on_finished += [metrics.observe_finished, served.requests.finished]
    return app


async def _observed_loop(app: web.Application) -> AsyncIterator[None]:
    async with measured_lag(app[METRICS].lag.observe):
        yield


async def listen(app: web.Application, server: ServerSection, listener: socket.socket) -> web.AppRunner:
    """Serves on a bound socket until its `cleanup()`. A client that leaves cancels its handler."""
    runner = web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=server.keepalive_seconds,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner
