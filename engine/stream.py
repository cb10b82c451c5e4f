"""What a client's handler reads: the deltas of one request, merged while nobody looks.

A slow reader never holds the engine up: what it has not read is kept, and comes as one delta a choice when it reads. So
it is bounded by the answer itself.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from engine.request import Delta, EngineDead, Finished, Request, Usage

WOKEN_AT_ONCE = 32
"""Readers in one turn of the loop: to write a frame takes some 50 µs, and everybody else waits meanwhile."""


class Bell:
    """Wakes readers, a few in each turn of its loop. First come, first woken; what comes meanwhile is merged."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: deque[Stream] = deque()

    def ring(self, stream: "Stream") -> None:
        """Its reader is to look. Not twice before it has been woken."""
        self._due.append(stream)
        if len(self._due) == 1:
            self._loop.call_soon(self._wake_some)

    def _wake_some(self) -> None:
        for _ in range(min(WOKEN_AT_ONCE, len(self._due))):
            self._due.popleft().wake()
        if self._due:
            self._loop.call_soon(self._wake_some)


class Stream(AsyncIterator[Delta]):
    """Ends after each choice's last delta. Raises EngineDead when the engine dies. For one reader, on the loop."""

    def __init__(self, request: Request, cancel: Callable[[str], bool], bell: Bell) -> None:
        self.request = request
        self._cancel = cancel
        self._bell = bell
        self._rung = False
        self._news: dict[int, list[Delta]] = {}  # by choice, in the order in which they came
        self._waiter: asyncio.Future[None] | None = None  # the reader's, while it waits
        self._open = request.n  # choices that have not ended
        self._failure: BaseException | None = None
        self._completion_tokens = 0
        self._cached_tokens = 0

    @property
    def usage(self) -> Usage:
        """Complete once the stream has ended."""
        return Usage(len(self.request.prompt), self._completion_tokens, self._cached_tokens)

    @property
    def ended(self) -> bool:
        """Whether each choice's last delta has come (not: been read)."""
        return not self._open

    def cancel(self) -> bool:
        """Ends the request, if it still runs. Safe to call at any time, any number of times."""
        return self._cancel(self.request.id)

    async def __anext__(self) -> Delta:
        while not self._news:
            if self._failure is not None:
                raise EngineDead("the engine has died; the server is shutting down") from self._failure
            if not self._open:
                raise StopAsyncIteration
            assert self._waiter is None, "a stream has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return _joined(self._news.pop(next(iter(self._news))))

    # --- the engine's side ----------------------------------------------------------------------------------------

    def feed(self, delta: Delta) -> None:
        self._completion_tokens += len(delta.token_ids)
        self._open -= delta.finish_reason is not None
        self._news.setdefault(delta.choice, []).append(delta)
        self._ring()

    def settle(self, finished: Finished) -> None:
        self._cached_tokens = max(self._cached_tokens, finished.cached_tokens if finished.choice == 0 else 0)

    def fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._ring()

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            self._bell.ring(self)

    def wake(self) -> None:
        """Called by the bell."""
        self._rung = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _joined(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return deltas[-1]._replace(
        text="".join(each.text for each in deltas),
        token_ids=tuple(token for each in deltas for token in each.token_ids),
        logprobs=tuple(logprob for each in deltas for logprob in each.logprobs),
    )
