"""Clients that leave, read slowly, or are cancelled; servers that drain or die: nothing stays behind.

That no request, block or reference is left is checked by the rig's end, in every test.
"""

import asyncio
import json
import socket
from typing import Any

import aiohttp
import pytest

from app.config import ServerSection
from engine.request import Finished, FinishReason
from tests.app.rig import Rig, rig

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 400}


def ends(server: Rig) -> list[Finished]:
    """What the engine reports from now on."""
    seen: list[Finished] = []
    server.engine.on_finished.append(seen.append)
    return seen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_its_blocks(stream: bool, n: int) -> None:
    """It hangs up while its request runs and holds blocks; the engine reports the end of every choice."""
    async with rig() as server:
        seen = ends(server)
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, **BODY, stream=stream, n=n))
        await server.until(running=1)
        assert server.engine.core.scheduler.pool.held > 0
        call.cancel()
        await server.until(running=0)
        assert [finished.reason for finished in seen] == [FinishReason.CANCELLED] * n
        assert server.engine.core.scheduler.pool.held == 0
        server.worker.gate.set()


async def test_a_client_that_leaves_in_mid_stream_frees_its_blocks() -> None:
    async with rig() as server:
        async with server.client.post(TEXT, json=BODY | {"stream": True}) as response:
            await response.content.readuntil(b"\n\n")
            server.worker.gate.clear()
            response.close()
            await server.until(running=0)
            assert server.engine.core.scheduler.pool.held == 0
        server.worker.gate.set()


async def test_a_client_that_leaves_takes_all_its_prompts_along() -> None:
    async with rig() as server:
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, prompt=["a", "b", "c"], max_tokens=50, stream=True))
        await server.until(running=3)
        call.cancel()
        await server.until(running=0)
        assert server.engine.core.scheduler.pool.held == 0
        server.worker.gate.set()


async def test_prompts_beyond_the_queue_take_none_of_the_call() -> None:
    """The first prompts are submitted, the next finds the queue full: 429, and the first are cancelled."""
    async with rig(max_queue=4, max_sequences=1) as server:
        seen = ends(server)
        server.worker.gate.clear()
        waiting = [asyncio.ensure_future(server.post(TEXT, **BODY)) for _ in range(3)]
        await server.until(running=3)
        status, answer = await server.post(TEXT, prompt=["a", "b", "c"], max_tokens=5)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert len(server.engine.requests()) == 3
        assert [finished.reason for finished in seen] == [FinishReason.CANCELLED] * 2
        server.worker.gate.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 3


async def _silent_reader(server: Rig, body: dict[str, Any]) -> socket.socket:
    """Sends a call and reads nothing; both sides' socket buffers are as small as they get."""
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(reader, server.listener.getsockname())
    payload = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    await loop.sock_sendall(reader, head.encode() + payload)
    return reader


async def test_a_reader_that_reads_nothing_is_dropped_and_holds_nobody_up() -> None:
    """Its answer is far larger than the socket takes. Another client is served; then it is cut off."""
    async with rig(server=ServerSection(write_timeout_seconds=0.3)) as server:
        seen = ends(server)
        wide = {
            "prompt": "hello",
            "max_tokens": 400,
            "n": 4,
            "logprobs": 5,
            "return_token_ids": True,
            "stream": True,
        }
        with await _silent_reader(server, wide) as reader:
            await server.until(running=1)
            await server.stream(TEXT, prompt="quick", max_tokens=20)
            while sum(int(str(entry["output_tokens"])) for entry in server.engine.requests()) < 800:  # noqa: ASYNC110 - no event says how far an answer is
                await asyncio.sleep(0)
            server.worker.gate.clear()  # what ends the request now is the reader, not its length
            await server.until(running=0)
            server.worker.gate.set()
            loop = asyncio.get_running_loop()
            received = b""
            while piece := await _read(loop, reader):
                received += piece
        assert b"HTTP/1.1 200" in received
        assert b"[DONE]" not in received
        assert sorted(finished.reason for finished in seen) == [FinishReason.CANCELLED] * 4 + [
            FinishReason.LENGTH
        ]


async def _read(loop: asyncio.AbstractEventLoop, reader: socket.socket) -> bytes:
    try:
        return await loop.sock_recv(reader, 65536)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("stream", [False, True])
async def test_an_operator_can_cancel_a_request_and_its_client_is_told(stream: bool) -> None:
    async with rig() as server:
        server.worker.gate.clear()
        call = asyncio.ensure_future(_raw(server, stream))
        await server.until(running=1)
        async with server.client.get("/admin/requests") as response:
            (entry,) = (await response.json())["requests"]
        assert (entry["state"], entry["replica"], entry["prompt_tokens"]) == ("running", 0, 5)
        status, answer = await server.post(f"/admin/requests/{entry['id']}/cancel")
        assert (status, answer) == (200, {"id": entry["id"], "state": "cancelled"})
        assert (await server.post(f"/admin/requests/{entry['id']}/cancel"))[0] == 404
        server.worker.gate.set()
        told, cut = await call
        assert b"request_cancelled" in told
        assert b"[DONE]" not in told
        assert cut == stream


async def test_a_call_of_which_one_prompt_is_cancelled_ends_at_once() -> None:
    """Not when those before it have ended: no step goes on here."""
    async with rig() as server:
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, prompt=["a", "b"], max_tokens=5))
        await server.until(running=2)
        name = server.engine.requests()[1]["id"]
        assert (await server.post(f"/admin/requests/{name}/cancel"))[0] == 200
        status, answer = await asyncio.wait_for(call, 5)
        assert (status, answer["error"]["code"]) == (499, "request_cancelled")
        server.worker.gate.set()


async def _raw(server: Rig, stream: bool) -> tuple[bytes, bool]:
    """The body as far as it came, and whether the connection was cut."""
    received = b""
    async with server.client.post(TEXT, json=BODY | {"stream": stream}) as response:
        try:
            async for piece in response.content.iter_any():
                received += piece
        except (aiohttp.ClientPayloadError, ConnectionError):
            return received, True
        assert response.status in (200, 499, 500, 503)
    return received, False


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_tells_its_clients_and_the_probes(stream: bool) -> None:
    async with rig() as server:
        server.worker.gate.clear()
        call = asyncio.ensure_future(_raw(server, stream))
        await server.until(running=1)
        server.worker.explode()
        told, cut = await call
        assert b"engine_dead" in told
        assert cut == stream
        status, answer = await server.post(TEXT, **BODY)
        assert (status, answer["error"]["code"]) == (500, "engine_dead")
        for path in ("/livez", "/readyz", "/health"):
            async with server.client.get(path) as response:
                assert response.status == 500
        assert await server.engine.dead


async def test_a_draining_server_finishes_what_runs_and_takes_nothing_new() -> None:
    async with rig() as server:
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, **BODY))
        await server.until(running=1)
        drained = asyncio.ensure_future(server.engine.drain(60))
        await asyncio.sleep(0)
        for method, path in (("GET", "/readyz"), ("POST", TEXT), ("POST", CHAT)):
            async with server.client.request(method, path, json=BODY) as response:
                assert response.status == 503
                assert (await response.json())["error"]["code"] == "shutting_down"
        async with server.client.get("/livez") as response:
            assert response.status == 200
        server.worker.gate.set()
        assert await drained
        assert (await call)[0] == 200


async def test_what_is_left_when_draining_takes_too_long_is_told() -> None:
    async with rig() as server:
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, **BODY))
        await server.until(running=1)
        assert not await server.engine.drain(0)
        status, answer = await call
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        server.worker.gate.set()
