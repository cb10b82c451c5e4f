"""Connections, below the application: how many there may be, how slowly they may read, and what bad HTTP is told.

aiohttp's own protocol with five changes: HTTP is 1.0 or 1.1; errors before the application are the API's error object
too; nothing of what a client sent gets into the log; a connection beyond the limit is turned away; one whose reader
takes nothing for too long is cut, whatever is being written. Limits that aiohttp has: `app/server.py`.
"""

import asyncio
from http import HTTPStatus
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError, HttpVersion10, HttpVersion11
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.web_protocol import RequestHandler
from structlog.stdlib import get_logger

from app.errors import ApiError, answer_to, as_api_error, bad_request
from app.http_metrics import UNKNOWN, HttpMetrics

log = get_logger(__name__)

TOO_MANY = ApiError(
    503,
    "too many connections",
    code="too_many_connections",
    headers={"Retry-After": "1", "Connection": "close"},
)

SPOKEN = (HttpVersion10, HttpVersion11)


class Connection(RequestHandler):
    """One connection. `_stuck_since`: when its reader last took something, while there is something to take."""

    def __init__(self, server: "Server", loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop=loop, **server.settings)
        self._server = server
        self._stuck_since = 0.0
        self._unread_bytes = 0
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tcp = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        if self._server.full:
            self._force_close = True
            self._server.metrics.connections_refused.inc()
            tcp.write(_raw(TOO_MANY))
            tcp.close()
            return
        tcp.set_write_buffer_limits(
            high=0
        )  # whatever is not taken at once makes the writer wait, and us watch
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    # --- slow readers ---------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_since = self._loop.time()
        self._unread_bytes = self._buffered
        if self._watch is None:
            self._look_again(self._stuck_since)

    def _look_again(self, since: float) -> None:
        self._watch = self._loop.call_at(since + self._server.write_timeout_seconds, self._look)

    def _look(self) -> None:
        """Cuts the connection if nothing was taken for the whole time; it is not watched while nothing waits."""
        self._watch = None
        if not self.writing_paused or self.transport is None:
            return
        now, unread = self._loop.time(), self._buffered
        if unread < self._unread_bytes:
            self._stuck_since, self._unread_bytes = now, unread
        if now - self._stuck_since < self._server.write_timeout_seconds:
            self._look_again(self._stuck_since)
            return
        self._server.metrics.slow_readers.inc()
        log.info("slow_reader_dropped", unread_bytes=unread)
        self.transport.abort()

    @property
    def _buffered(self) -> int:
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    # --- errors that the application never sees -------------------------------------------------------------------

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Raises ConnectionError when part of an answer is out already."""
        bug = status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if bug:
            log.error("connection_failed", exc_info=exc)
        else:
            log.debug("bad_http", kind=type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("half an answer is out: there is no other to give")
        error = as_api_error(RuntimeError(message)) if bug else bad_http(exc)
        self._server.metrics.answered(UNKNOWN, error.status)
        response = answer_to(error)
        response.force_close()
        return response


def bad_http(error: BaseException | None) -> ApiError:
    """aiohttp's messages quote the client; these do not."""
    if isinstance(error, LineTooLong):
        return ApiError(431, "a line or a header is too long", code="header_too_large")
    if isinstance(error, HttpProcessingError) and "Too many" in error.message:
        return ApiError(431, "there are too many headers", code="header_too_large")
    return bad_request("this is not valid HTTP/1.1", code="invalid_http")


def _raw(error: ApiError) -> bytes:
    """A whole answer as it goes over the wire."""
    response = answer_to(error)
    assert isinstance(response.body, bytes)
    headers = {**response.headers, "Content-Length": str(len(response.body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    status = HTTPStatus(error.status)
    return f"HTTP/1.1 {status} {status.phrase}\r\n{head}\r\n".encode() + response.body


class Server(web.Server):
    """aiohttp's, with connections of ours. `settings`: aiohttp's, of each connection."""

    def __init__(
        self, plain: web.Server, metrics: HttpMetrics, max_connections: int, write_timeout_seconds: float
    ) -> None:
        super().__init__(
            plain.request_handler, request_factory=plain.request_factory, handler_cancellation=True
        )
        self.settings = plain._kwargs
        self.metrics = metrics
        self.write_timeout_seconds = write_timeout_seconds
        self._max_connections = max_connections
        self.request_handler = self._answer
        self._app = plain.request_handler

    @property
    def full(self) -> bool:
        return len(self._connections) >= self._max_connections

    def __call__(self) -> RequestHandler:
        return Connection(self, self._loop)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """What comes before any middleware: versions that aiohttp takes, not we; an `Expect` that nobody knows."""
        if request._version not in SPOKEN:
            request._version = HttpVersion11  # the answer has its request's
            return request.protocol.handle_error(request, 400, BadHttpMessage("not a version we speak"))
        try:
            return await self._app(request)
        except web.HTTPException as error:
            return answer_to(as_api_error(error))


class Runner(web.AppRunner):
    """An application on `Server`. aiohttp offers no other place for a protocol of one's own."""

    def __init__(
        self,
        app: web.Application,
        metrics: HttpMetrics,
        *,
        max_connections: int,
        write_timeout_seconds: float,
        **settings: Any,
    ) -> None:
        super().__init__(app, handle_signals=False, **settings)
        self._metrics = metrics
        self._limits = (max_connections, write_timeout_seconds)

    async def _make_server(self) -> web.Server:
        return Server(await super()._make_server(), self._metrics, *self._limits)
