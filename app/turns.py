"""Who comes in a crowd is let in one by one: between two of them the event loop has a turn for everybody else.

To accept a call (parse, check, tokenise, tell the core) takes some half a millisecond. Hundreds that arrive together
would be accepted in one turn of the loop, and hold up every stream for all of it.
"""

import asyncio


class Turns:
    """For one event loop. First come, first let in."""

    def __init__(self) -> None:
        self._gate = asyncio.Lock()

    async def take(self) -> None:
        """Returns in a turn of the loop in which it returns to nobody else."""
        async with self._gate:
            await asyncio.sleep(0)
