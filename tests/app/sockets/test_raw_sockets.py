"""What is promised to sockets that speak HTTP badly, slowly, or not at all. docs/http.md has the same as a table.

That no request, block or reference is left is checked by the rig's end, in every test.
"""

import asyncio
import resource
import socket
from typing import Any

import pytest

from app.config import ServerSection
from bench.server import total
from engine.request import Finished, FinishReason
from tests.app.rig import Rig, rig
from tests.app.sockets.raw import TEXT, get, post, wire

BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 5}
CHUNKED = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
ALIVE = {"status": "alive"}
IDLE = 2000


async def served(server: Rig) -> bool:
    """Whether somebody else is still served."""
    return (await server.post(TEXT, **BODY))[0] == 200


# --- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", f"POST {TEXT} HTT".encode(), get("/livez")[:-2]])
async def test_headers_that_do_not_arrive_close_the_connection(said: bytes) -> None:
    async with rig(server=ServerSection(keepalive_seconds=0.02)) as server, wire(server) as slow:
        slow.say(said)
        assert await slow.rest() == b""
        assert await served(server)


async def test_a_connection_that_is_idle_after_a_request_is_closed() -> None:
    async with rig(server=ServerSection(keepalive_seconds=0.02)) as server, wire(server) as idle:
        idle.say(get("/livez"))
        assert (await idle.reply()).json == ALIVE
        assert await idle.rest() == b""


async def test_a_body_that_does_not_arrive_is_a_408() -> None:
    async with rig(server=ServerSection(read_timeout_seconds=0.02)) as server, wire(server) as slow:
        slow.say(post(BODY)[:-5])
        assert (await slow.reply()).code == (408, "slow_body")
        assert await served(server)


async def test_who_reads_nothing_of_a_whole_answer_is_cut_off() -> None:
    """Its answer is larger than the sockets take, so the rest waits in the server. The engine is long done with it."""
    async with rig(server=ServerSection(write_timeout_seconds=0.05)) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        wide = {"prompt": "x", "max_tokens": 400, "n": 4, "logprobs": 5, "return_token_ids": True}
        async with wire(server, receive_bytes=4096) as silent:
            silent.writer.transport.pause_reading()  # type: ignore[attr-defined] # a reading one
            silent.say(post(wide))
            while not await slow_readers(server):
                assert await served(server)
            silent.writer.transport.resume_reading()  # type: ignore[attr-defined] # a reading one
            status, headers = await silent.head()
            assert status == 200
            assert len(await silent.rest()) < int(headers["content-length"])


async def slow_readers(server: Rig) -> float:
    async with server.client.get("/metrics") as response:
        return total(await response.text(), "sluice:slow_readers_total")


# --- who leaves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_who_closes_one_half_of_a_connection_has_left(stream: bool) -> None:
    async with rig() as server, wire(server) as half:
        seen: list[Finished] = []
        server.engine.on_finished.append(seen.append)
        server.worker.gate.clear()
        half.say(post(BODY | {"stream": stream}))
        await server.until(running=1)
        half.writer.write_eof()
        await server.until(running=0)
        server.worker.gate.set()
        assert b"[DONE]" not in await half.rest()
        assert [finished.reason for finished in seen] == [FinishReason.CANCELLED]
        assert await served(server)


async def test_who_leaves_in_the_middle_of_a_body_leaves_nothing_behind() -> None:
    async with rig() as server:
        for said in (post(BODY)[:-5], CHUNKED.encode() + b"5\r\nhe"):
            async with wire(server) as leaver:
                leaver.say(said)
                await leaver.writer.drain()
        assert await served(server)


# --- several at once --------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    """More of them than aiohttp keeps parsed at once."""
    async with rig() as server, wire(server) as eager:
        eager.say(*(part for _ in range(50) for part in (get("/livez"), post(BODY), get("/v1/nothing"))))
        for _ in range(50):
            assert (await eager.reply()).json == ALIVE
            assert (await eager.reply()).json["usage"]["completion_tokens"] == 5
            assert (await eager.reply()).code == (404, "not_found")


async def test_thousands_of_idle_connections_hold_nobody_up() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * IDLE + 512:
        pytest.skip("both ends of the connections are in this process, which may not open as many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * IDLE + 512), hard))
    loop = asyncio.get_running_loop()
    idle: list[socket.socket] = []
    try:
        async with rig() as server:
            for _ in range(IDLE):
                idle.append(socket.socket())
                idle[-1].setblocking(False)
                await loop.sock_connect(idle[-1], server.listener.getsockname())
            assert await served(server)
            await loop.sock_sendall(idle[0], get("/livez"))
            assert b" 200 OK" in await loop.sock_recv(idle[0], 4096), "they are still there"
    finally:
        for each in idle:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_connection_too_many_is_told_so_and_one_that_leaves_makes_room() -> None:
    async with rig(server=ServerSection(max_connections=2)) as server:
        async with wire(server) as first, wire(server) as second, wire(server) as third:
            refused = await third.reply()
            assert refused.code == (503, "too_many_connections")
            assert refused.headers["retry-after"] == "1"
            assert await third.rest() == b""
            for each in (first, second):
                each.say(get("/livez", "Connection: close"))
                assert (await each.reply()).json == ALIVE
                assert await each.rest() == b""
        assert await served(server)


# --- not HTTP, or too much of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello over TLS\r\n\r\n", (400, "invalid_http")),
        (b"what is this\r\n\r\n", (400, "invalid_http")),
        (b"GET / HTTP/9.9\r\n\r\n", (400, "invalid_http")),
        (b"GET /livez\r\n\r\n", (400, "invalid_http")),
        (get("/livez").replace(b"1.1", b"0.9"), (400, "invalid_http")),
        (get("/livez").replace(b"1.1", b"2.0"), (400, "invalid_http")),
        (post(BODY).replace(b"1.1", b"2.0"), (400, "invalid_http")),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, "invalid_http")),
        (get("/livez", "no colon"), (400, "invalid_http")),
        (get("/livez", "Bad\x00Name: x"), (400, "invalid_http")),
        (post(BODY, TEXT, "Content-Length: 1"), (400, "invalid_http")),
        (post(BODY, TEXT, "Transfer-Encoding: chunked"), (400, "invalid_http")),
        (get("/livez", "Content-Length: -1"), (400, "invalid_http")),
        (get("/livez?" + "x" * 9000), (431, "header_too_large")),
        (get("/livez", "X: " + "x" * 9000), (431, "header_too_large")),
        (get("/livez", *["X: y"] * 200), (431, "header_too_large")),
        (post(b" " * 100_001), (413, "body_too_large")),
        (post(BODY, TEXT, "Expect: a miracle"), (417, "expectation_failed")),
        (post(BODY, TEXT, "Content-Encoding: gzip"), (415, "unsupported_media_type")),
        (post(b"\xff\xfe"), (400, "invalid_json")),
        (CHUNKED.encode() + b"zz\r\nhello\r\n0\r\n\r\n", (400, None)),
        (CHUNKED.encode() + b"5\r\nhello, too long\r\n0\r\n\r\n", (400, None)),
    ],
)
async def test_what_is_not_understood_gets_the_apis_error_object(
    said: bytes, answer: tuple[int, str | None]
) -> None:
    """aiohttp's own texts would quote what was sent."""
    async with rig() as server, wire(server) as odd:
        odd.say(said)
        status, code = (await odd.reply()).code
        assert (status, code) == answer or (answer[1] is None and (status, code) in BAD_CHUNKS)
        assert await served(server)


BAD_CHUNKS = [(400, "invalid_http"), (400, "invalid_body")]
"""By whether the handler was reading already."""


@pytest.mark.parametrize("version", [b"HTTP/0.9", b"HTTP/2.0"])
async def test_a_version_that_is_not_spoken_is_not_answered_in_either(version: bytes) -> None:
    """Regression: it was served, and echoed. What came before it on the connection is answered."""
    async with rig() as server, wire(server) as odd:
        odd.say(get("/livez"), get("/livez").replace(b"HTTP/1.1", version))
        assert (await odd.reply()).json == ALIVE
        assert (await odd.reader.readline()).startswith(b"HTTP/1.1 400 ")
        assert version not in await odd.rest()
        assert await served(server)


async def test_http_1_0_is_answered_and_closed() -> None:
    async with rig() as server, wire(server) as old:
        old.say(get("/livez").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await old.reply()).json == ALIVE
        assert await old.rest() == b""


async def test_a_body_that_turns_bad_while_it_is_read_is_refused() -> None:
    async with rig() as server, wire(server) as odd:
        odd.say(CHUNKED, b"5\r\nhello\r\n")
        await odd.writer.drain()
        odd.say(b"zz\r\n")
        assert (await odd.reply()).code in BAD_CHUNKS
        assert await served(server)


async def test_a_client_that_asks_whether_to_go_on_is_told_to() -> None:
    async with rig() as server, wire(server) as polite:
        head, _, body = post(BODY, TEXT, "Expect: 100-continue").partition(b"\r\n\r\n")
        polite.say(head, b"\r\n\r\n")
        assert (await polite.head())[0] == 100
        polite.say(body)
        assert (await polite.reply()).status == 200


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_headers_and_the_role_come_before_the_first_step_and_even_in_the_queue() -> None:
    """No step has ended, and the second request has not begun."""
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "stream": True}
    async with rig(max_sequences=1) as server, wire(server) as first, wire(server) as second:
        server.worker.gate.clear()
        for each in (first, second):
            each.say(post(chat, "/v1/chat/completions"))
            status, headers = await each.head()
            assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert b'"delta":{"role":"assistant","content":""}' in await each.chunk()
        assert server.engine.state()["running"] == server.engine.state()["waiting"] == 1
        server.worker.gate.set()


async def test_a_silent_stream_is_kept_alive_by_comments_between_its_frames() -> None:
    async with rig(server=ServerSection(ping_seconds=0.01)) as server, wire(server) as patient:
        server.worker.gate.clear()
        patient.say(post(BODY | {"stream": True}))
        await patient.head()
        assert [await patient.chunk() for _ in range(3)] == [b": ping\n\n"] * 3
        server.worker.gate.set()
        received = b""
        while piece := await patient.chunk():
            assert piece.endswith(b"\n\n"), "a chunk is whole frames"
            received += piece
        assert received.endswith(b"data: [DONE]\n\n")


async def test_a_busy_stream_has_no_comments() -> None:
    async with rig() as server, wire(server) as reader:
        reader.say(post(BODY | {"stream": True}, TEXT, "Connection: close"))
        assert b": ping" not in await reader.rest()
