"""The client of the load benchmark, against a server that says what it is told to."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from bench import client

CHUNKS = (
    b'data: {"choices": [{"text": "a", "token_ids": [1], "finish_reason": null}]}\n\n'
    b": still there\n\n"
    b'data: {"choices": [{"text": "b", "token_ids": [2, 3], "finish_reason": "stop"}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
)
WHOLE = b'{"choices": [{"text": "ab", "token_ids": [1, 2, 3], "finish_reason": "stop"}],'
USAGE = b' "usage": {"completion_tokens": 3}}'

Saying = Callable[[bytes, int], Awaitable[ClientSession]]


@pytest.fixture
async def saying() -> AsyncIterator[Saying]:
    """A session with a server that answers everything with these bytes and this status."""
    closing: list[TestServer | ClientSession] = []

    async def start(body: bytes, status: int) -> ClientSession:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=body, status=status, content_type="application/json")

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        server = TestServer(app)
        await server.start_server()
        session = ClientSession(server.make_url("/"))
        closing.extend([session, server])
        return session

    yield start
    for one in closing:
        await one.close()


async def test_a_stream_and_a_whole_answer_of_the_same_are_the_same(saying: Saying) -> None:
    """Comments in a stream keep a connection alive and say nothing."""
    streamed = await client.stream(await saying(CHUNKS + b"data: [DONE]\n\n", 200), {})
    whole = await client.complete(await saying(WHOLE + USAGE, 200), {})
    assert streamed.complete
    assert whole.complete
    assert streamed.same(whole)
    assert (len(streamed.times), len(whole.times)) == (2, 1)


async def test_a_stream_that_breaks_off_is_incomplete(saying: Saying) -> None:
    with pytest.raises(client.Incomplete, match="DONE"):
        await client.stream(await saying(CHUNKS, 200), {})


async def test_an_error_inside_a_stream_is_raised(saying: Saying) -> None:
    with pytest.raises(client.Incomplete, match="engine died"):
        await client.stream(await saying(b'data: {"error": "engine died"}\n\n', 200), {})


@pytest.mark.parametrize("ask", [client.stream, client.complete])
async def test_an_error_status_is_raised_with_what_the_server_said(
    saying: Saying, ask: Callable[[ClientSession, dict[str, str]], Awaitable[client.Answer]]
) -> None:
    with pytest.raises(client.Incomplete, match="429: queue full"):
        await ask(await saying(b"queue full", 429), {})


@pytest.mark.parametrize(
    "answer",
    [
        client.Answer("ab", [1, 2], None, 2),
        client.Answer("ab", [1], "stop", 2),
        client.Answer("ab", [1, 2], "stop", None),
    ],
)
def test_an_answer_without_end_or_with_tokens_missing_is_incomplete(answer: client.Answer) -> None:
    assert not answer.complete
