"""Open-loop load: each request is sent when it is due, however the others fare. The loop's clock; no network here.

A session's first request is due at its arrival; each further one when the one before it has ended and its user has
thought. Bodies are made before they are due, so that making them delays nobody.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from app.load.client import Failed, Reply
from app.load.conversation import RUN_NUMBERS, Conversations, Turn
from app.workload.trace import Trace, TraceRequest

AHEAD = 256
"""Bodies that are ready before they are due."""

UNFINISHED = "unfinished"
NOT_SENT = "not_sent"
"""The request that it goes on from failed."""

Ask = Callable[[bytes, Reply], Awaitable[None]]
"""Sends a body, fills the reply; raises Failed."""


@dataclass(slots=True)
class Sample:
    """A request that was attempted. Seconds since the load began; `sent` - `due` is the generator's own lag."""

    request: TraceRequest
    due: float
    sent: float | None = None
    times: list[float] = field(default_factory=list)  # of chunks with something in them
    tokens: int = 0
    counted: str = ""
    prompt_tokens: int | None = None  # as the server counts
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str = UNFINISHED  # "": answered
    detail: str = ""

    def settle(self, reply: Reply, begun: float) -> None:
        self.times = [at - begun for at in reply.times]
        self.tokens, self.counted = reply.tokens, reply.counted
        self.prompt_tokens, self.cached_tokens = reply.prompt_tokens, reply.cached_tokens
        self.finish_reason = reply.finish_reason


@dataclass(slots=True)
class Progress:
    """For who watches."""

    sent: int = 0
    running: int = 0
    answered: int = 0
    failed: int = 0


class Generator:
    """Plays one trace, once. `samples` grows while it runs, so a run that is stopped has what was measured so far."""

    def __init__(
        self,
        trace: Trace,
        conversations: Conversations,
        ask: Ask,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.samples: list[Sample] = []
        self.progress = Progress()
        self._openings = [each for each in trace if each.after is None]
        self._followers: dict[int, list[TraceRequest]] = defaultdict(list)
        for each in trace:
            if each.after is not None:
                self._followers[each.after].append(each)
        self._conversations = conversations
        self._ask = ask
        self._watch = watch
        self._room = asyncio.Semaphore(AHEAD)
        self._begun = 0.0

    async def play(self) -> None:
        """Until the last answer has ended. Cancelled, it leaves the running requests unfinished."""
        ready = deque(self._prepared(self._conversations.opening(each)) for each in self._openings[:AHEAD])
        self._begun = self._now()
        async with asyncio.TaskGroup() as tasks:
            for each in self._openings:
                await self._room.acquire()
                prepared = ready.popleft() if ready else self._prepared(self._conversations.opening(each))
                tasks.create_task(self._open(tasks, each.arrival, *prepared))
                await asyncio.sleep(0)

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._begun

    def _prepared(self, turn: Turn) -> tuple[Turn, bytes]:
        return turn, self._conversations.body(turn)

    async def _open(self, tasks: asyncio.TaskGroup, due: float, turn: Turn, body: bytes) -> None:
        await asyncio.sleep(due - self._now())
        self._room.release()
        await self._one(tasks, due, turn, body)

    async def _one(self, tasks: asyncio.TaskGroup, due: float, turn: Turn, body: bytes) -> None:
        """Asks at once; then lets follow-ups come."""
        reply, sample = Reply(), Sample(turn.request, due, self._now())
        self.samples.append(sample)
        self.progress.sent += 1
        self.progress.running += 1
        self._watch(self.progress)
        try:
            await self._ask(body, reply)
            sample.error = ""
        except Failed as error:
            sample.error, sample.detail = error.kind, str(error)
        finally:
            sample.settle(reply, self._begun)
            self._ended(sample)
        ended = self._now()
        for each in self._followers.get(turn.request.number, ()):
            if sample.error:
                self._lose(each, ended + each.think_seconds)
            else:
                tasks.create_task(self._follow(tasks, ended + each.think_seconds, each, turn, reply))

    async def _follow(
        self, tasks: asyncio.TaskGroup, due: float, request: TraceRequest, before: Turn, reply: Reply
    ) -> None:
        turn = self._conversations.following(request, before, reply.text, reply.token_ids)
        body = self._conversations.body(turn)
        await asyncio.sleep(due - self._now())
        await self._one(tasks, due, turn, body)

    def _lose(self, request: TraceRequest, due: float) -> None:
        """Nothing can go on from a failure: the rest of the session was attempted, and failed with it."""
        self.samples.append(Sample(request, due, error=NOT_SENT))
        for each in self._followers.get(request.number, ()):
            self._lose(each, due + each.think_seconds)

    def _ended(self, sample: Sample) -> None:
        self.progress.running -= 1
        if sample.error:
            self.progress.failed += 1
        else:
            self.progress.answered += 1
        self._watch(self.progress)


def number_of(sample: Sample) -> int:
    """The request's number in its trace, whichever run it was."""
    return sample.request.number % RUN_NUMBERS
