"""A small client of the completions API over aiohttp: one request, streamed or not, and what came of it."""

import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientResponse, ClientSession

from app.load.payloads import BrokenOff, payloads


class Incomplete(Exception):
    """An answer that is none: an error, or a stream that broke off."""


@dataclass(slots=True)
class Answer:
    """A whole completion. Times are seconds since the request was sent; not streamed, there is one."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int | None = None  # as the server counted
    times: list[float] = field(default_factory=list)  # of each chunk with news

    @property
    def complete(self) -> bool:
        return self.finish_reason is not None and self.completion_tokens == len(self.tokens)

    def same(self, other: "Answer") -> bool:
        """Whether a client got the same: text, tokens and end."""
        mine = (self.text, self.tokens, self.finish_reason)
        return mine == (other.text, other.tokens, other.finish_reason)

    def take(self, payload: dict[str, Any], at: float) -> None:
        """Adds a chunk, or a whole answer."""
        if "error" in payload:
            raise Incomplete(str(payload["error"]))
        for choice in payload["choices"]:
            self.text += choice["text"]
            self.tokens += choice.get("token_ids") or []
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.times.append(at)
        if usage := payload.get("usage"):
            self.completion_tokens = usage["completion_tokens"]


async def complete(session: ClientSession, body: dict[str, Any]) -> Answer:
    """Asks and waits for the whole answer. Raises Incomplete."""
    begun = time.perf_counter()
    async with session.post("/v1/completions", json=body | {"return_token_ids": True}) as response:
        await _refuse_errors(response)
        answer = Answer()
        answer.take(await response.json(), time.perf_counter() - begun)
    return answer


async def stream(session: ClientSession, body: dict[str, Any]) -> Answer:
    """Reads the answer as it comes. Raises Incomplete when it does not end with [DONE]."""
    streamed = {"return_token_ids": True, "stream": True, "stream_options": {"include_usage": True}}
    begun = time.perf_counter()
    async with session.post("/v1/completions", json=body | streamed) as response:
        await _refuse_errors(response)
        answer = Answer()
        try:
            async for payload in payloads(response):
                answer.take(payload, time.perf_counter() - begun)
        except BrokenOff as error:
            raise Incomplete(str(error)) from error
    return answer


async def _refuse_errors(response: ClientResponse) -> None:
    if response.status != 200:
        raise Incomplete(f"{response.status}: {(await response.text())[:500]}")
