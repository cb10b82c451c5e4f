"""A chat answer as it comes: its text piece by piece, then what it cost. Over app/remote.py."""

import json
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from app.remote import NoServer, Remote, ServerRefuses


@dataclass(slots=True)
class Answer:
    """Iterate over it for its pieces; then the rest is known. Seconds are from when it was asked."""

    remote: Remote
    body: dict[str, Any]
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    first_seconds: float | None = None
    seconds: float = 0.0

    def __iter__(self) -> Generator[str, None, None]:
        """Raises NoServer, ServerRefuses. Left early, it hangs up, which ends the request."""
        begun = time.perf_counter()
        try:
            for line in self.remote.lines("POST", "/v1/chat/completions", self.body):
                name, _, data = line.strip().partition(b":")
                if name != b"data":  # a blank line, or a comment that keeps the connection alive
                    continue
                if data.strip() == b"[DONE]":
                    return
                if piece := self._take(data):
                    self.first_seconds = self.first_seconds or time.perf_counter() - begun
                    self.text += piece
                    yield piece
            if self.finish_reason is None:
                raise NoServer(f"{self.remote.url} has broken off")
        finally:
            self.seconds = time.perf_counter() - begun

    def _take(self, data: bytes) -> str:
        try:
            payload = json.loads(data)
        except ValueError as error:
            raise NoServer(f"what answers at {self.remote.url} does not speak the OpenAI API") from error
        if refusal := payload.get("error"):
            raise ServerRefuses(
                str(refusal.get("message", refusal) if isinstance(refusal, dict) else refusal)
            )
        self.usage = payload.get("usage") or self.usage
        piece = ""
        for choice in payload.get("choices") or ():
            piece += (choice.get("delta") or {}).get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return piece

    def account(self) -> str:
        """In a few words; empty where the server sent no usage."""
        if self.usage is None:
            return ""
        tokens, prompt = self.usage.get("completion_tokens", 0), self.usage.get("prompt_tokens", 0)
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        first = self.first_seconds or self.seconds
        rate = (
            f", {(tokens - 1) / (self.seconds - first):.0f}/s" if tokens > 1 and self.seconds > first else ""
        )
        end = " · cut at max_tokens or the context's end" if self.finish_reason == "length" else ""
        return f"{tokens} tokens{rate} · first after {first:.2f} s · {cached} of {prompt} prompt tokens cached{end}"
