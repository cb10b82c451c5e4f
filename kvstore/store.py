"""The tiers as the engine sees them: copies in, their ends and the tiers' fates out. Supervises what may fail.

A tier in which nothing ends for `hung_seconds`, though something is under way, goes out of use: TierDown. Copies for it
are then answered at once, with Loss.DOWN; the hung one ends when its thread comes back, and only then are its slots
anybody's. A tier that is down, and that nothing touches any more, is closed and opened again every `retry_seconds`
until it works: TierUp.

One lock guards the books; transfers, and opening and closing tiers, run without it. Nothing here is on the event loop.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.copies import Copy, CopyDone, Drop, Loss, TierDown, TierUp
from kvstore.tier import Tier, TierStats, TierUnusable
from kvstore.transfer import Measured, Totals, Transfers

Report = Callable[[CopyDone | TierDown | TierUp], None]
Opened = tuple[Tier, TierUp]
"""A tier that is not memory, and the news of it: what it holds already, and how much it takes."""

SUPERVISION_SECONDS = 1.0


@dataclass(slots=True)
class Health:
    """Of one tier that may fail."""

    open: Callable[[], Opened]  # raises TierUnusable
    up: bool = False
    reason: str = "not opened yet"
    retry_at: float = 0.0
    under_way: dict[int, float] = field(
        default_factory=dict
    )  # copies (jobs: below 0), and when they were given
    last_end: float = 0.0  # of any of these


class Store:
    """`memories`: tiers that cannot fail. `fallible`: how to open those that can, by name; they are opened by `start`.

    `notes`: called with an event's name and facts, for the log, on any thread.
    """

    def __init__(
        self,
        memories: Mapping[str, Tier],
        fallible: Mapping[str, Callable[[], Opened]],
        *,
        hung_seconds: float,
        retry_seconds: float,
        notes: Callable[[str, dict[str, Any]], None] = lambda event, facts: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transfers = Transfers(memories, self._copied, self._raised, clock=clock)
        self._health = {name: Health(opener) for name, opener in fallible.items()}
        self._hung_seconds = hung_seconds
        self._retry_seconds = retry_seconds
        self._notes = notes
        self._clock = clock
        self._report: Report = lambda event: None
        self._opened: dict[str, TierUp] = {}  # before `start`
        self._jobs = 0
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="kv supervisor", daemon=True)

    # --- the engine's side ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the tiers that may fail, and waits for it: seconds, for a large index. What fails is tried again."""
        for name in self._health:
            self._try_open(name)

    def start(self, report: Report) -> None:
        """From now on `report` hears of everything, first of the tiers opened already. Begins to supervise."""
        with self._lock:
            self._report = report
            for name, health in self._health.items():
                if not health.up:
                    report(TierDown(name, health.reason))
                else:
                    report(self._opened.pop(name))
        self._supervisor.start()

    def submit(self, copy: Copy) -> None:
        """Begins a copy; exactly one CopyDone follows. Never blocks."""
        with self._lock:
            touched = [self._health[name] for name in (copy.source, copy.target) if name in self._health]
            if all(health.up for health in touched):
                for health in touched:
                    health.under_way[copy.id] = self._clock()
                self._transfers.submit(copy)
                return
        self._report(CopyDone(copy.id, tuple((index, Loss.DOWN) for index in range(len(copy.sources)))))

    def drop(self, drop: Drop) -> None:
        """Forgets records, behind the writes under way. Nothing, where the tier is down."""
        with self._lock:
            if self._health[drop.tier].up:
                job = self._job(drop.tier, lambda tier: tier.drop(drop.keys))
                self._transfers.write_job(drop.tier, job)

    def stop(self, seconds: float) -> bool:
        """Finishes what is under way within `seconds`, closes the tiers. Whether all was done."""
        self._stopping.set()
        deadline = time.monotonic() + seconds
        done = self._transfers.close(deadline)
        if self._supervisor.ident:
            self._supervisor.join(max(0.0, deadline - time.monotonic()))
        if done:  # else a thread may be inside still: the process's end closes it
            for tier in self._transfers.tiers.values():
                tier.close()
        return done

    # --- for operators --------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, TierStats]:
        """Of the tiers that are in use."""
        with self._lock:
            tiers = [
                tier
                for name, tier in self._transfers.tiers.items()
                if name not in self._health or self._health[name].up
            ]
            return {tier.name: tier.stats() for tier in tiers}

    def down(self) -> dict[str, str]:
        """Tiers that are out of use, and why."""
        with self._lock:
            return {name: health.reason for name, health in self._health.items() if not health.up}

    def block_bytes(self, tier: str) -> int:
        return self._transfers.tiers[tier].block_bytes

    def measured(self) -> list[Measured]:
        return self._transfers.measured()

    def totals(self) -> dict[str, Totals]:
        return self._transfers.totals()

    def run_among_reads(self, tier: str, work: Callable[[Tier], None]) -> bool:
        """Runs an operator's work (a verification, say) on one of a tier's reading threads. False: it is down."""
        with self._lock:
            if not self._health[tier].up:
                return False
            self._transfers.read_job(tier, self._job(tier, work, hangs=False))
            return True

    def _job(self, tier: str, work: Callable[[Tier], None], *, hangs: bool = True) -> Callable[[], None]:
        """`work`, counted as under way. The lock is held. hangs=False: it may take as long as it likes."""
        self._jobs -= 1
        number = self._jobs
        self._health[tier].under_way[number] = self._clock() if hangs else float("inf")

        def job() -> None:
            try:
                work(self._transfers.tiers[tier])
            except Exception as error:  # noqa: BLE001 (whatever a tier raises, its thread must go on)
                self._notes("job_raised", {"tier": tier, "error": f"{type(error).__name__}: {error}"})
            finally:
                self._ended(number)

        return job

    # --- supervision ----------------------------------------------------------------------------------------------

    def _try_open(self, name: str) -> None:
        """Opens a tier; the news goes out at `start`, or at once after it."""
        health = self._health[name]
        try:
            tier, up = health.open()
        except TierUnusable as error:
            with self._lock:
                if health.reason != str(error):
                    self._notes("tier_unusable", {"tier": name, "reason": str(error)})
                health.reason, health.retry_at = str(error), self._clock() + self._retry_seconds
            return
        if notice := getattr(tier, "notice", ""):
            self._notes("tier_notice", {"tier": name, "notice": notice})
        with self._lock:
            self._transfers.put_tier(name, tier)
            health.up, health.reason = True, ""
            self._announce(up)
        facts = {"tier": name, "records": len(up.records), "capacity_blocks": up.capacity_blocks}
        self._notes("tier_up", facts)

    def _announce(self, up: TierUp) -> None:
        if self._supervisor.ident is None:
            self._opened[up.tier] = up
        else:
            self._report(up)

    def _supervise(self) -> None:
        while not self._stopping.wait(SUPERVISION_SECONDS):
            self.tick()

    def tick(self) -> None:
        """Looks once for what hangs, is broken, or may be tried again."""
        now = self._clock()
        for name, health in self._health.items():
            if health.up:
                self._look(name, health, now)
            elif not health.under_way and now >= health.retry_at:
                self._close(name)
                self._try_open(name)

    def _look(self, name: str, health: Health, now: float) -> None:
        broken = getattr(self._transfers.tiers[name], "broken", None)
        oldest = max(min(health.under_way.values(), default=now), health.last_end)
        if broken:
            self._take_down(name, f"broken: {broken}")
        elif now - oldest > self._hung_seconds:
            self._take_down(name, f"hung: nothing has ended for {self._hung_seconds:g} s")

    def _take_down(self, name: str, reason: str) -> None:
        with self._lock:
            health = self._health[name]
            health.up, health.reason = False, reason
            health.retry_at = self._clock() + self._retry_seconds
            self._report(TierDown(name, reason))
        self._notes("tier_down", {"tier": name, "reason": reason})

    def _close(self, name: str) -> None:
        """Nothing is under way in it."""
        with self._lock:
            tier = self._transfers.take_tier(name)
        if tier is not None:
            tier.close()

    def _copied(self, done: CopyDone) -> None:
        self._ended(done.id)
        self._report(done)

    def _ended(self, number: int) -> None:
        with self._lock:
            for health in self._health.values():
                if health.under_way.pop(number, None) is not None:
                    health.last_end = self._clock()

    def _raised(self, copy: Copy, error: Exception) -> None:
        facts = {"source": copy.source, "target": copy.target, "error": f"{type(error).__name__}: {error}"}
        self._notes("copy_raised", facts)
