"""How late the event loop is: a timer is set again and again, and its delay observed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.loop import end_task

PERIOD_SECONDS = 0.1


@asynccontextmanager
async def measured_lag(observe: Callable[[float], None]) -> AsyncIterator[None]:
    """While the block runs, tells `observe` every 0.1 s by how many seconds the timer came late."""
    task = asyncio.create_task(_measure(observe), name="event loop lag")
    try:
        yield
    finally:
        await end_task(task)


async def _measure(observe: Callable[[float], None]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + PERIOD_SECONDS
        await asyncio.sleep(PERIOD_SECONDS)
        observe(max(0.0, loop.time() - due))
