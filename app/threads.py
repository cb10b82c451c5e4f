"""Work that the event loop does not do itself: what takes long, and what may hang.

The loop's executor is for work that ends: a process waits for it, and there are few threads in it.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

INLINE = 2048
"""Characters, token ids or log-probabilities: a few milliseconds of work at most, and not worth a thread's detour."""


async def aside(work: Callable[[], T], size: int) -> T:
    """What `work` returns or raises: on a worker thread, if it is about more than INLINE."""
    return work() if size <= INLINE else await asyncio.to_thread(work)


async def on_a_daemon(work: Callable[[], T], name: str) -> T:
    """What `work` returns or raises. Its thread keeps no process from ending."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()  # it cannot be called off any more
    Thread(target=_run, args=(work, result), name=name, daemon=True).start()
    return await asyncio.wrap_future(result)


def _run(work: Callable[[], T], result: "Future[T]") -> None:
    def failed(_kind: object, error: BaseException | None, _traceback: object) -> bool:
        if error is not None:
            result.set_exception(error)
        return True

    with ExitStack() as stack:
        stack.push(failed)
        result.set_result(work())
