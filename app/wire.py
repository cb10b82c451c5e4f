"""What an answer is made of, whichever call it answers: the seam between reading streams and writing JSON.

`app/answer.py` reads the engine's streams and asks a `Wire` for the words; `app/chat.py` and
`app/completions.py` are the two wires. A wire belongs to one answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol

from app.served import Model
from engine.plan import Logprob
from engine.request import Delta, Usage


@dataclass(frozen=True, slots=True)
class Heading:
    """What is the same in every frame of an answer."""

    id: str
    created: int  # Unix seconds
    model: str
    include_usage: bool = False
    return_token_ids: bool = False
    logprobs: bool = False


@dataclass(slots=True)
class Choice:
    """A choice's deltas, added up."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Wire(Protocol):
    def opening(self, index: int) -> bytes:
        """Frames before a choice's first delta; may be none."""

    def chunk(self, index: int, delta: Delta) -> bytes:
        """The frame of a delta of choice `index` of the answer; none when it has nothing to say."""

    def usage(self, usage: Usage) -> bytes:
        """The frame after all choices, when the client asked for it."""

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def says_something(heading: Heading, delta: Delta) -> bool:
    """Tokens held back (half a code point, the beginning of a stop string) make deltas without text."""
    if delta.text or delta.finish_reason:
        return True
    return bool(delta.token_ids) and (heading.return_token_ids or heading.logprobs)


def numbers_in(logprobs: Sequence[Logprob]) -> int:
    """Log-probabilities of the tokens drawn and of the likeliest."""
    return sum(1 + len(each.top) for each in logprobs)


def finite(logprob: float) -> float | None:
    """JSON has no word for −inf."""
    return logprob if isfinite(logprob) else None


def token_text(model: Model, token: int) -> tuple[str, list[int]]:
    """A token as logprobs show it: readable text (U+FFFD for part of a code point) and its exact bytes."""
    exact = model.vocabulary[token] or model.special_tokens.get(token, "").encode()
    return exact.decode("utf-8", errors="replace"), list(exact)
