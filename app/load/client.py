"""One request to a server that speaks the OpenAI API, streamed: when its chunks came, and how it ended.

What to ask is conversation.py's, when is generator.py's. A server need not be Sluice: tokens are those that its usage
says; a server that sends none is counted by the token ids it tells, else by its chunks.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientError, ClientPayloadError, ClientResponse, ClientSession

from app.load.payloads import BrokenOff, payloads

LONGEST_LINE_BYTES = 2**22
MOST_DETAIL = 300


class Failed(Exception):
    """A request that came to nothing. `kind` is one of few words, to be counted by; the message is the server's."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail[:MOST_DETAIL])
        self.kind = kind


@dataclass(slots=True)
class Reply:
    """An answer as far as it has come. Times are the clock's; only chunks with something in them count."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None

    @property
    def counted(self) -> str:
        """Where the number of tokens is from: "usage", "ids" or "chunks"."""
        if self.usage and self.usage.get("completion_tokens"):
            return "usage"
        return "ids" if self.token_ids else "chunks"

    @property
    def tokens(self) -> int:
        if self.counted == "usage":
            assert self.usage is not None
            return int(self.usage["completion_tokens"])
        return len(self.token_ids) or len(self.times)

    @property
    def prompt_tokens(self) -> int | None:
        return (self.usage or {}).get("prompt_tokens")

    @property
    def cached_tokens(self) -> int | None:
        details = (self.usage or {}).get("prompt_tokens_details")
        return details.get("cached_tokens") if isinstance(details, dict) else None

    def take(self, payload: dict[str, Any], at: float) -> None:
        """Adds a chunk. Raises Failed where it is an error object."""
        if error := payload.get("error"):
            raise Failed(
                "error_in_stream", str(error.get("message", error) if isinstance(error, dict) else error)
            )
        for choice in payload.get("choices") or ():
            delta = choice.get("delta") or choice
            news = delta.get("content") or delta.get("reasoning_content") or delta.get("text") or ""
            ids = choice.get("token_ids") or []
            self.text += news
            self.token_ids += ids
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if news or ids:
                self.times.append(at)
        self.usage = payload.get("usage") or self.usage


class Client:
    """`http` has the server's address, the API key and no limit of connections; `clock` gives seconds."""

    def __init__(
        self, http: ClientSession, endpoint: str, clock: Callable[[], float], timeout_seconds: float
    ) -> None:
        self._http = http
        self._endpoint = endpoint
        self._clock = clock
        self._timeout_seconds = timeout_seconds

    async def ask(self, body: bytes, reply: Reply) -> None:
        """Sends, and fills `reply` until its end. Raises Failed."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._stream(body, reply)
        except TimeoutError as error:
            raise Failed("timeout", f"no end after {self._timeout_seconds:g} s") from error
        except ClientPayloadError as error:
            raise Failed("broken_off", str(error)) from error
        except (ClientError, OSError) as error:
            raise Failed("connection", f"{type(error).__name__} {error}") from error
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # the server's JSON is not as agreed
            raise Failed("malformed", f"{type(error).__name__} {error}") from error
        if not reply.times:
            raise Failed("empty", "an answer without a token")

    async def _stream(self, body: bytes, reply: Reply) -> None:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        async with self._http.post(self._endpoint, data=body, headers=headers) as response:
            if response.status != 200:
                raise Failed(f"http_{response.status}", await _words(response))
            with suppress(
                BrokenOff
            ):  # not every server says [DONE]: whether it was whole, its finish_reason tells
                async for payload in payloads(response):
                    reply.take(payload, self._clock())
        if reply.finish_reason is None:
            raise Failed("broken_off", "the stream ended without a finish_reason")


async def _words(response: ClientResponse) -> str:
    """What a refusal says: the error object's message, else the text."""
    text = await response.text()
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text.strip() or f"status {response.status}, without a word"
