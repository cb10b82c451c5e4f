"""Against servers that are none: how their streams are read, and every way in which they fail."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from app.load.client import Client, Failed, Reply

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
WHOLE = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "a"}}]},
    {"choices": [{"delta": {"reasoning_content": "b"}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
]


def saying(payloads: list[Any], *, end: str = "data: [DONE]\n\n", cut: bool = False) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": a comment\n\n")
        for payload in payloads:
            data = payload if isinstance(payload, str) else json.dumps(payload)
            await response.write(f"data: {data}\n\n".encode())
        await response.write(end.encode())
        if cut:
            assert request.transport
            request.transport.close()
        return response

    return answer


async def asked(handler: Handler, timeout_seconds: float = 20.0) -> Reply:
    app = web.Application()
    app.router.add_post("/v1/x", handler)
    reply = Reply()
    async with TestServer(app) as server, ClientSession(server.make_url("/")) as http:
        ticks = iter(range(100))
        await Client(http, "v1/x", lambda: float(next(ticks)), timeout_seconds).ask(b"{}", reply)
    return reply


async def test_only_chunks_with_something_in_them_have_a_time() -> None:
    reply = await asked(saying(WHOLE))
    assert (reply.text, reply.times, reply.finish_reason) == ("ab", [1.0, 2.0], "stop")
    assert (reply.counted, reply.tokens, reply.cached_tokens) == ("chunks", 2, None)


async def test_tokens_are_what_usage_says_else_the_ids_that_were_told() -> None:
    usage = {"completion_tokens": 9, "prompt_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}
    reply = await asked(saying([*WHOLE, {"choices": [], "usage": usage}]))
    assert (reply.counted, reply.tokens, reply.prompt_tokens, reply.cached_tokens) == ("usage", 9, 4, 3)
    ids = [
        {"choices": [{"text": "", "token_ids": [4, 5, 6]}]},
        {"choices": [{"text": "", "finish_reason": "x"}]},
    ]
    reply = await asked(saying(ids))
    assert (reply.counted, reply.tokens, len(reply.times)) == ("ids", 3, 1)


async def test_an_end_without_done_is_an_end_when_a_finish_reason_came() -> None:
    assert (await asked(saying(WHOLE, end=""))).finish_reason == "stop"


async def _refusing(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "the queue is full"}}, status=429)


async def _hanging(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "kind", "why"),
    [
        (_refusing, "http_429", "the queue is full"),
        (_hanging, "timeout", "no end after"),
        (saying(WHOLE[:2]), "broken_off", "without a finish_reason"),
        (saying(WHOLE[:2], end="", cut=True), "broken_off", "payload"),
        (saying([*WHOLE[:2], {"error": {"message": "cancelled"}}]), "error_in_stream", "cancelled"),
        (saying(["{"]), "malformed", "JSONDecodeError"),
        (saying([{"choices": ["?"]}]), "malformed", "AttributeError"),
        (saying([WHOLE[0], WHOLE[-1]]), "empty", "without a token"),
    ],
)
async def test_each_failure_has_its_kind_and_the_servers_words(handler: Handler, kind: str, why: str) -> None:
    with pytest.raises(Failed, match=why) as failed:
        await asked(handler, timeout_seconds=0.05 if kind == "timeout" else 20.0)
    assert failed.value.kind == kind
