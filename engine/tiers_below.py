"""The engine's side of the store: what waits for a step before it goes there, and what comes back as events.

On the event-loop thread, but for the store's reports. Bytes are moved by kvstore/store.py; what is copied is decided in
the core.
"""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from engine.events import Event
from engine.records import CopyRecord
from kvstore.copies import DEVICE, Copy, CopyDone, Drop, Loss, TierDown, TierUp
from kvstore.tier import Tier

RECORDS_AT_ONCE = 1000
"""Of a tier that comes up, in one event: a few milliseconds (`python -m bench.tier_up`)."""

ObserveCopy = Callable[[CopyRecord], None]
ObserveTier = Callable[[str, bool, str], None]
"""(tier, up, reason)"""


class Store(Protocol):
    """What the engine needs of the tiers (kvstore/store.py has the real one).

    `report` may be called on any thread. `submit` and `drop` never block.
    """

    def start(self, report: Callable[[CopyDone | TierDown | TierUp], None]) -> None: ...

    def submit(self, copy: Copy) -> None: ...

    def drop(self, drop: Drop) -> None: ...

    def put_device(self, replica: int, tier: Tier) -> None: ...

    def block_bytes(self, tier: str) -> int: ...


class TiersBelow:
    """`feed` hands an event to the core: False when the engine has died."""

    def __init__(
        self,
        store: Store,
        feed: Callable[[Event], bool],
        on_copy: list[ObserveCopy],
        on_tier: list[ObserveTier],
    ) -> None:
        self._store = store
        self._feed = feed
        self._on_copy = on_copy
        self._on_tier = on_tier
        self._block_bytes = store.block_bytes(DEVICE)
        self._copies: dict[int, Copy] = {}  # told, and not done
        self._held: list[Copy] = []  # these wait for a step to end
        self._loading: dict[str, Iterator[TierUp]] = {}  # what tiers hold, as far as not fed yet
        self._last_step_done: Counter[int] = Counter()  # by replica
        self._loop = asyncio.get_running_loop()
        store.start(self._report)

    # --- to the store ---------------------------------------------------------------------------------------------

    def submit(self, copy: Copy) -> None:
        """It begins when step `copy.after` has ended."""
        self._copies[copy.id] = copy
        if copy.after > self._last_step_done[copy.replica]:
            self._held.append(copy)
        else:
            self._store.submit(copy)

    def drop(self, drop: Drop) -> None:
        self._store.drop(drop)

    def step_ended(self, replica: int, step: int) -> None:
        """Copies that waited for the step may begin."""
        self._last_step_done[replica] = step
        for copy in self._take_held(replica, step):
            self._store.submit(copy)

    def replica_lost(self, replica: int) -> None:
        """Its steps end no more: what waited for them does not begin. A new one counts them from the start."""
        del self._last_step_done[replica]
        for copy in self._take_held(replica):
            lost = tuple((index, Loss.DOWN) for index in range(len(copy.sources)))
            self._reported(CopyDone(copy.id, lost))

    def put_device(self, replica: int, tier: Tier) -> None:
        """A replica has another device."""
        self._store.put_device(replica, tier)

    def _take_held(self, replica: int, step: int | None = None) -> list[Copy]:
        """Those that wait for a step up to this one; None: for any."""
        taken = [
            copy for copy in self._held if copy.replica == replica and (step is None or copy.after <= step)
        ]
        self._held = [copy for copy in self._held if copy not in taken]
        return taken

    # --- from the store -------------------------------------------------------------------------------------------

    def _report(self, event: CopyDone | TierDown | TierUp) -> None:
        """Called on the store's threads."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._reported, event)

    def _reported(self, event: CopyDone | TierDown | TierUp) -> None:
        if isinstance(event, TierUp):
            self._loading[event.tier] = parts = event.parts(RECORDS_AT_ONCE)
            self._load(parts, len(event.records))
            return
        if not self._feed(event):
            return
        match event:
            case CopyDone():
                record = CopyRecord.of(self._copies.pop(event.id), event, self._block_bytes)
                for observe in self._on_copy:
                    observe(record)
            case TierDown(tier, reason):
                self._loading.pop(tier, None)
                self._tell(tier, False, reason)

    def _load(self, parts: Iterator[TierUp], records: int) -> None:
        """Feeds one part, and the next in the loop's next turn, so that others come between; none if it went down."""
        part = next(parts)
        if self._loading.get(part.tier) is not parts or not self._feed(part):
            return
        if part.more:
            gc.freeze()  # else the collector looks through all of a million entries again and again, 0.3 s each time
            self._loop.call_soon(self._load, parts, records)
        else:
            self._tell(part.tier, True, f"{records} records")

    def _tell(self, tier: str, up: bool, reason: str) -> None:
        for observe in self._on_tier:
            observe(tier, up, reason)
