"""What is asked: a trace's requests as bodies of the OpenAI API. Sending them: generator.py, client.py.

A follow-up goes on from what the server really answered: its prompt is its predecessor's, that answer, and as many
new tokens as its recorded length has beyond them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.load.words import WORDS
from app.workload.prompts import UNSHARED, Prompts
from app.workload.trace import Trace, TraceRequest

IDS = "ids"
TEXT = "text"
CHAT = "chat"
ENDPOINTS = {IDS: "/v1/completions", TEXT: "/v1/completions", CHAT: "/v1/chat/completions"}
"""By how a prompt is written: token ids, words, or messages of words."""

RUN_NUMBERS = 2**34
"""Numbers and block ids of a run, so that 64 runs of one trace have 64 different contents."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How all requests are asked."""

    model: str
    prompts: str = IDS
    first_id: int = 300  # token ids for prompts: special tokens and single bytes are usually below
    ids: int = 3796
    temperature: float = 0.0
    ignore_eos: bool = True  # answers are as long as asked, where the server knows it
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)  # into every body, over all else


@dataclass(frozen=True, slots=True)
class Turn:
    """What was asked, and answered: all that a follow-up needs of its predecessor."""

    request: TraceRequest
    parts: Sequence[Sequence[int]]  # words of each user's part; the whole prompt's ids are one part
    answers: Sequence[str] = ()  # texts between the parts


class Conversations:
    """Bodies for the requests of one trace, encoded; deterministic but for the server's own answers."""

    def __init__(self, trace: Trace, asking: Asking) -> None:
        vocabulary, first = (asking.ids, asking.first_id) if asking.prompts == IDS else (len(WORDS), 0)
        self._prompts = Prompts(trace, vocabulary, first)
        self._asking = asking

    @property
    def endpoint(self) -> str:
        return ENDPOINTS[self._asking.prompts]

    def opening(self, request: TraceRequest) -> Turn:
        return Turn(request, [self._prompts.tokens(request)])

    def following(self, request: TraceRequest, before: Turn, text: str, tokens: Sequence[int]) -> Turn:
        """`text` and `tokens`: what the server answered. A prompt that does not go on from it is its own."""
        if not goes_on(before.request, request):
            return self.opening(request)
        whole = self._prompts.tokens(request)
        if self._asking.prompts == IDS:
            made_up = whole[before.request.prompt_tokens :][: before.request.output_tokens]
            said = [*before.parts[0], *(tokens or made_up)]  # a server that tells no ids
            return Turn(request, [said + whole[len(said) :]])
        begun = before.request.prompt_tokens + before.request.output_tokens
        news = whole[min(begun, len(whole) - 1) :]
        return Turn(request, [*before.parts, news], [*before.answers, text])

    def body(self, turn: Turn) -> bytes:
        asking, request = self._asking, turn.request
        body: dict[str, Any] = {
            "model": asking.model,
            **self._asked(turn),
            "max_tokens": request.output_tokens,
            "temperature": asking.temperature,
            "seed": (asking.seed + request.number) % 2**31,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if asking.ignore_eos:
            body["ignore_eos"] = True
        if asking.prompts == IDS:
            body["return_token_ids"] = True
        return json.dumps(body | asking.extra, separators=(",", ":")).encode()

    def _asked(self, turn: Turn) -> dict[str, Any]:
        if self._asking.prompts == IDS:
            return {"prompt": list(turn.parts[0])}
        said = [" ".join(WORDS[each] for each in part) for part in turn.parts]
        if self._asking.prompts == TEXT:
            return {"prompt": " ".join(_between(said, turn.answers))}
        roles = ("user", "assistant")
        spoken = enumerate(_between(said, turn.answers))
        return {"messages": [{"role": roles[number % 2], "content": text} for number, text in spoken]}


def _between(said: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Said, answered, said …"""
    woven = [each for pair in zip(said, answers, strict=False) for each in pair]
    return [*woven, said[-1]]


def goes_on(before: TraceRequest, after: TraceRequest) -> bool:
    """Whether the later prompt begins with the whole blocks of the earlier one, and is longer."""
    size = before.block_size
    if not size or size != after.block_size or after.prompt_tokens <= before.prompt_tokens:
        return False
    shared = before.prompt_tokens // size
    earlier, later = list(before.block_ids())[:shared], list(after.block_ids())[:shared]
    return shared > 0 and earlier == later


def of_run(trace: Trace, run: int) -> list[TraceRequest]:
    """The same trace with content that no other run has: what one left in a server's cache helps no other."""
    assert 0 <= run < UNSHARED // RUN_NUMBERS
    by = run * RUN_NUMBERS
    return [_moved(each, by) for each in trace]


def _moved(request: TraceRequest, by: int) -> TraceRequest:
    return replace(
        request,
        number=request.number + by,
        after=None if request.after is None else request.after + by,
        block_runs=tuple((first + by, count) for first, count in request.block_runs),
    )
