"""Metrics of HTTP: answers by path and status, connections; part of `app/metrics.py`, which has the registry."""

from collections.abc import Mapping

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

UNKNOWN = "other"
"""In place of a path that is not served: clients could make up any number of them."""


class HttpMetrics:
    """`labels`: on every sample."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._answers = Counter(
            "sluice:http_responses",
            "Answers whose headers went out, by path and status.",
            [*labels, "path", "status"],
            registry=registry,
        )
        self.slow_readers, self.connections_refused = (
            Counter(name, text, list(labels), registry=registry).labels(**labels)
            for name, text in (
                ("sluice:slow_readers", "Connections cut as their reader took nothing for too long."),
                ("sluice:connections_refused", "Connections beyond server.max_connections."),
            )
        )

    def answered(self, path: str, status: int) -> None:
        self._answers.labels(**self._labels, path=path, status=str(status)).inc()


def path_of(request: web.Request) -> str:
    """As it is routed, `/v1/models/{name}`: not as the client wrote it."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else UNKNOWN
