"""The serving process: two threads, signals, exit codes. Real processes, with a scripted runner, once with
the shipped model."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

REPOSITORY = Path(__file__).parents[2]
TEXT = "/v1/completions"
SCRIPTED = ["-m", "tests.app.scripted_server"]
SHIPPED = ["-c", "import sys; from app.cli import main; sys.exit(main())", "serve", "--set", "server.port=0"]


@dataclass(slots=True)
class Server:
    process: Process
    client: aiohttp.ClientSession
    log: list[dict[str, Any]]

    def tell(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(line + "\n" for line in lines).encode())

    async def post(self, **body: object) -> tuple[int, bytes]:
        async with self.client.post(TEXT, json=body) as response:
            return response.status, await response.read()

    async def until(self, path: str, status: int) -> None:
        async with asyncio.timeout(30):
            while True:
                async with self.client.get(path) as response:
                    if response.status == status:
                        return

    async def running(self) -> None:
        """Returns once a request is at hand."""
        async with asyncio.timeout(30):
            while True:
                async with self.client.get("/admin/requests") as response:
                    if (await response.json())["requests"]:
                        return


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[Server]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=REPOSITORY, stdin=PIPE, stderr=PIPE
    )
    try:
        log: list[dict[str, Any]] = []
        async with asyncio.timeout(120):
            while not any(line["event"] == "ready" for line in log):
                log.append(await _log_line(process))
        async with aiohttp.ClientSession(log[-1]["url"]) as client:
            yield Server(process, client, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _log_line(process: Process) -> dict[str, Any]:
    assert process.stderr is not None
    line: dict[str, Any] = json.loads(await process.stderr.readline())
    return line


async def _rest_of_the_log(server: Server) -> list[str]:
    _, rest = await server.process.communicate()
    return [json.loads(line)["event"] for line in rest.splitlines()]


async def test_sigterm_finishes_what_runs_and_exits_0() -> None:
    async with started(*SCRIPTED) as server:
        call = asyncio.ensure_future(server.post(prompt="hello", max_tokens=3))
        await server.running()
        server.process.send_signal(signal.SIGTERM)
        await server.until("/readyz", 503)
        await server.until("/livez", 200)
        assert (await server.post(prompt="late"))[0] == 503
        server.tell("go", "go", "go")
        status, body = await call
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 3)
        assert await server.process.wait() == 0
        assert await _rest_of_the_log(server) == ["draining", "request_finished", "drained"]


async def test_sigint_without_requests_exits_0() -> None:
    async with started(*SCRIPTED) as server:
        server.process.send_signal(signal.SIGINT)
        assert await server.process.wait() == 0


async def test_a_second_signal_exits_at_once() -> None:
    async with started(*SCRIPTED) as server:
        call = asyncio.ensure_future(server.post(prompt="hello", max_tokens=3))
        await server.running()
        server.process.send_signal(signal.SIGTERM)
        await server.until("/readyz", 503)
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 130
        (error,) = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(error, aiohttp.ClientError | ConnectionError)


async def test_an_engine_that_dies_tells_its_clients_and_the_process_exits_1() -> None:
    async with started(*SCRIPTED) as server:
        call = asyncio.ensure_future(server.post(prompt="hello", max_tokens=3))
        await server.running()
        server.tell("go", "die")
        status, body = await call
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_dead")
        assert await server.process.wait() == 1
        assert "engine_died" in await _rest_of_the_log(server)


async def test_a_replica_that_dies_leaves_its_requests_to_the_others_and_the_last_one_ends_the_process() -> (
    None
):
    """The first replica is the main thread's."""
    async with started(*SCRIPTED, "2") as server:
        call = asyncio.ensure_future(server.post(prompt="hello", max_tokens=3))
        await server.running()
        server.tell("go", "die", "go", "go")
        status, body = await call
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 3)
        await server.until("/readyz", 200)
        call = asyncio.ensure_future(server.post(prompt="hello", max_tokens=3))
        await server.running()
        server.tell("go", "die")
        status, body = await call
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_dead")
        assert await server.process.wait() == 1
        log = await _rest_of_the_log(server)
    told = [event for event in log if event in ("replica_lost", "migrated", "engine_died")]
    assert told == ["replica_lost", "migrated", "engine_died"]


async def test_sigterm_ends_a_process_whose_first_replica_is_lost() -> None:
    async with started(*SCRIPTED, "2") as server:
        call = asyncio.ensure_future(server.post(prompt="hello", max_tokens=2))
        await server.running()
        server.tell("die", "go", "go")
        assert (await call)[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0


async def test_the_shipped_model_answers_from_the_command_line() -> None:
    """Defaults all over: `sluice serve`, a streamed chat and a whole one with the same seed, Ctrl-C."""
    async with started(*SHIPPED) as server:
        loaded = next(line for line in server.log if line["event"] == "model_loaded")
        assert loaded["context"] == 2048
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
            "max_tokens": 12,
            "seed": 1,
            "return_token_ids": True,
        }
        async with server.client.post("/v1/chat/completions", json=body) as response:
            whole = await response.json()
        async with server.client.post("/v1/chat/completions", json=body | {"stream": True}) as response:
            *frames, done, end = (await response.text()).split("\n\n")
        chunks = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames]
        assert (done, end) == ("data: [DONE]", "")
        choice = whole["choices"][0]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]
        assert [token for chunk in chunks for token in chunk.get("token_ids", ())] == choice["token_ids"]
        server.process.send_signal(signal.SIGINT)
        assert await server.process.wait() == 0
