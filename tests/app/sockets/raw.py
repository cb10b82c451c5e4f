"""A client that is only a socket: it says exactly the bytes that a test wants to say."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.app.rig import Rig

TEXT = "/v1/completions"


@dataclass(slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.body)
        return answer

    @property
    def code(self) -> tuple[int, str | None]:
        """The status, and the error's code; the error object is checked to be one."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return self.status, error["code"]


@dataclass(slots=True)
class Wire:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def say(self, *parts: bytes | str) -> None:
        for part in parts:
            self.writer.write(part.encode() if isinstance(part, str) else part)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, names in lower case."""
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().rstrip("\r\n").split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}

    async def reply(self) -> Reply:
        """A whole answer whose length is said."""
        status, headers = await self.head()
        return Reply(status, headers, await self.reader.readexactly(int(headers.get("content-length", "0"))))

    async def chunk(self) -> bytes:
        """One chunk of a chunked answer."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def rest(self) -> bytes:
        """All until the server closes, or cuts the connection."""
        received = b""
        try:
            while piece := await self.reader.read(65536):
                received += piece
        except ConnectionError:
            pass
        return received


@asynccontextmanager
async def wire(server: Rig, receive_bytes: int | None = None) -> AsyncIterator[Wire]:
    """A connection of its own. Whatever a test awaits on it comes within seconds, or the test fails."""
    end = socket.socket()
    end.setblocking(False)
    if receive_bytes:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    async with asyncio.timeout(10):
        await asyncio.get_running_loop().sock_connect(end, server.listener.getsockname())
        reader, writer = await asyncio.open_connection(sock=end)
        try:
            yield Wire(reader, writer)
        finally:
            writer.transport.abort()


def post(body: object, path: str = TEXT, *headers: str) -> bytes:
    """A whole request."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(payload)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()
