"""A whole server as a process of its own, for trials over HTTP: start it, wait until it serves, kill or stop it.

Its log is read as it comes. What is asked of it is the caller's (bench/client.py).
"""

import asyncio
import contextlib
import json
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, TCPConnector
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0
REQUEST_SECONDS = 120.0
LONGEST_LOG_LINE_BYTES = 2**20
LAST_LINES = 12

Settings = Mapping[str, object]
"""`section.key` → value, as for --set."""


class ServerFailed(Exception):
    """The server ended, or did not get ready in time: its last lines say why."""


class Server:
    """`log`: its lines so far, parsed. `url`: once `ready()` has returned."""

    def __init__(self, process: Process) -> None:
        self.log: list[dict[str, Any]] = []
        self.url = ""
        self.ready_seconds = 0.0
        self._process = process
        self._launched = time.perf_counter()
        self._ready = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read_log())

    @classmethod
    async def launch(cls, settings: Settings, python: str = sys.executable) -> "Server":
        """Starts the process, on a port that is free; it is not ready yet."""
        told = {"server.port": 0, "log.format": "json"} | dict(settings)
        options = [part for key, value in told.items() for part in ("--set", f"{key}={value}")]
        process = await asyncio.create_subprocess_exec(
            *(python, "-m", "app", "serve", *options),
            cwd=ROOT,
            stdin=DEVNULL,
            stderr=PIPE,
            limit=LONGEST_LOG_LINE_BYTES,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ready(self) -> None:
        """Waits until it serves. Raises ServerFailed."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._ready.wait()
        except TimeoutError as error:
            raise ServerFailed(f"not ready after {START_SECONDS:g} s:\n{self.last_words()}") from error
        if not self.url:
            raise ServerFailed(f"ended with code {await self._process.wait()}:\n{self.last_words()}")

    async def kill(self) -> None:
        """SIGKILL: it can finish nothing."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._reading

    async def stop(self) -> int:
        """SIGTERM: it finishes what it has. Returns its exit code."""
        self._process.send_signal(signal.SIGTERM)
        code = await self._process.wait()
        await self._reading
        return code

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line.get("event") == name]

    def last_words(self) -> str:
        return "\n".join(json.dumps(line) for line in self.log[-LAST_LINES:])

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        async for raw in self._process.stderr:
            line = _parsed(raw)
            self.log.append(line)
            if line.get("event") == "ready":
                self.url = line["url"]
                self.ready_seconds = time.perf_counter() - self._launched
                self._ready.set()
        self._ready.set()  # it has ended: nobody need wait for it


def _parsed(raw: bytes) -> dict[str, Any]:
    """A log line; a traceback's, or half a line of a killed process, becomes its text."""
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    return line if isinstance(line, dict) else {"text": raw.decode(errors="replace").rstrip()}


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Server]:
    """A server that is ready; killed at the end, if it still lives. Raises ServerFailed."""
    server = await Server.launch(settings)
    try:
        await server.ready()
        yield server
    finally:
        await server.kill()


def session(server: Server) -> ClientSession:
    """For any number of requests at once."""
    return ClientSession(server.url, connector=TCPConnector(limit=0), timeout=ClientTimeout(REQUEST_SECONDS))


async def state(http: ClientSession) -> dict[str, Any]:
    async with http.get("/admin/state") as response:
        found: dict[str, Any] = await response.json()
    return found


async def metrics(http: ClientSession) -> str:
    async with http.get("/metrics") as response:
        return await response.text()


def total(exposition: str, name: str, **labels: str) -> float:
    """A counter's or gauge's sum over all samples with these labels; `name` as exported, with its `_total`."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
