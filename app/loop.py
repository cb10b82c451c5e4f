"""Event loops of this process, uvloop's where there is one; and how a task on one is ended."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on such a loop."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


async def end_task(task: "asyncio.Task[None]") -> None:
    """Cancels a task, and waits until it has ended; what else it raises, this raises. May be cancelled itself."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
