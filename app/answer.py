"""Carries a call's engine requests through to the client: submit, read the streams, write, and always let go.

However an answer ends (complete, client gone, slow reader, dead engine, a bug), `_streams` cancels what
still runs.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, assert_never

from aiohttp import web
from pydantic_core import to_json
from structlog.stdlib import get_logger

from app.errors import ApiError, as_api_error, cancelled, draining, replica_lost
from app.ids import CLIENT_ID
from app.metrics import METRICS
from app.request_log import OpenRequest
from app.served import Served
from app.sse import EventStream, ReaderGone, frame
from app.threads import aside
from app.wire import Choice, Wire, numbers_in
from engine.request import Delta, EngineDead, FinishReason, QueueFull, Refused, Request, Usage
from engine.stream import Stream

log = get_logger(__name__)


async def stream_answer(
    http: web.Request, served: Served, requests: Sequence[Request], wire: Wire, include_usage: bool
) -> web.StreamResponse:
    """Server-sent events, as the tokens come. Refusals come before the headers, as plain errors."""
    events = EventStream(http, served.server.ping_seconds)
    with _streams(http, served, requests) as streams:
        try:
            await _tell(served, events, streams, wire)
            if include_usage:
                await events.send(wire.usage(_total(streams)))
            await events.end()
        except ReaderGone:
            log.info("reader_gone", id=requests[0].id)
        except (ApiError, EngineDead) as error:
            await _break_off(events, error)
        except Exception:
            events.abort()  # a bug of ours, logged by the middleware, whose error object comes too late here
            raise
    return events.response


async def _tell(served: Served, events: EventStream, streams: Sequence[Stream], wire: Wire) -> None:
    await events.open()
    n = streams[0].request.n
    if opening := b"".join(wire.opening(index) for index in range(n * len(streams))):
        await events.send(opening)
    async with events.pinging():
        await _together(
            [_pump(served, events, stream, wire, number * n) for number, stream in enumerate(streams)]
        )


async def _pump(served: Served, events: EventStream, stream: Stream, wire: Wire, first_index: int) -> None:
    async for delta in stream:
        _refuse_half(served, delta)
        written = partial(wire.chunk, first_index + delta.choice, delta)
        if chunk := await aside(written, numbers_in(delta.logprobs)):
            await events.send(chunk)


async def _together(readers: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Until all have read their streams. What one of them raises ends the others."""
    if len(readers) == 1:
        await readers[0]
        return
    try:
        async with asyncio.TaskGroup() as tasks:
            for reader in readers:
                tasks.create_task(reader)
    except* (ReaderGone, ApiError, EngineDead) as group:
        raise _first_leaf(group) from group


async def _break_off(events: EventStream, error: Exception) -> None:
    """An error in mid-stream: an error object, then a cut connection; a clean end would look like success."""
    with suppress(ReaderGone):  # nobody may be left to tell
        await events.send(frame(as_api_error(error).body))
    events.abort()


async def whole_answer(
    http: web.Request, served: Served, requests: Sequence[Request], wire: Wire
) -> web.Response:
    """One JSON object, when all choices have ended."""
    with _streams(http, served, requests) as streams:
        n = requests[0].n
        choices = [Choice(index) for index in range(n * len(streams))]
        await _together(
            [_gather(served, stream, choices[n * number :]) for number, stream in enumerate(streams)]
        )
        body = await aside(
            lambda: to_json(wire.whole(choices, _total(streams))),
            sum(len(choice.token_ids) + numbers_in(choice.logprobs) for choice in choices),
        )
        return web.Response(body=body, content_type="application/json", charset="utf-8")


async def _gather(served: Served, stream: Stream, choices: Sequence[Choice]) -> None:
    async for delta in stream:
        _refuse_half(served, delta)
        choices[delta.choice].add(delta)


def _refuse_half(served: Served, delta: Delta) -> None:
    """Half an answer is none: whatever ended it from outside, the client is told."""
    match delta.finish_reason:
        case FinishReason.CANCELLED:
            raise draining() if served.engine.draining else cancelled()
        case FinishReason.ERROR:
            raise replica_lost()
        case None | FinishReason.STOP | FinishReason.LENGTH:
            return
        case other:
            assert_never(other)


def _total(streams: Sequence[Stream]) -> Usage:
    usages = [stream.usage for stream in streams]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )


@contextmanager
def _streams(http: web.Request, served: Served, requests: Sequence[Request]) -> Iterator[list[Stream]]:
    """Submits all or nothing; cancels, at the end, what has not ended by itself."""
    streams: list[Stream] = []
    try:
        streams.extend(_submit(http, served, request) for request in requests)  # as far as it gets
        yield streams
    finally:
        for stream in streams:
            stream.cancel()


def _submit(http: web.Request, served: Served, request: Request) -> Stream:
    if served.engine.draining:
        raise draining()
    client_id = http[CLIENT_ID]
    served.requests.opened(request.id, OpenRequest(http.path, served.model.name, request.n, client_id))
    try:
        stream = served.engine.submit(request)
    except QueueFull:
        http.app[METRICS].policies.observe_refused(request.service.name, request.n)
        served.requests.refused(request.id)
        raise
    except (Refused, EngineDead):
        served.requests.refused(request.id)
        raise
    http.app[METRICS].observe_submitted(request)
    return stream


def _first_leaf(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
