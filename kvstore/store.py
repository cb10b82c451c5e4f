"""The tiers as the engine sees them: copies in, their ends and the tiers' fates out. Supervises what may fail.

A tier in which some work takes longer than `hung_seconds`, from the moment a thread took it up, goes out of use:
TierDown. Copies for it are then answered at once with Loss.DOWN, those in the queue too; the hung one ends when its
thread comes back, and only then are its slots anybody's. A tier that is down, and that nothing touches any more, is
closed and opened again every `retry_seconds` until it works: TierUp. A thread that never comes back keeps it down.

One lock guards the books. Moving bytes, opening and closing tiers, and telling the engine go on without it; what the
engine is told comes in the order of the books. Nothing here is on the event loop.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.copies import Copy, CopyDone, Drop, Loss, TierDown, TierUp
from kvstore.tier import Tier, TierStats, TierUnusable
from kvstore.transfer import Measured, Task, Totals, Transfers

News = CopyDone | TierDown | TierUp
Report = Callable[[News], None]
Notes = Callable[[str, dict[str, Any]], None]
Opened = tuple[Tier, TierUp]
"""A tier that is not memory, and the news of it: what it holds already, and how much it takes."""

SUPERVISION_SECONDS = 1.0


@dataclass(slots=True)
class Health:
    """Of one tier that may fail."""

    open: Callable[[], Opened]  # raises TierUnusable
    up: bool = False
    reason: str = "not opened yet"
    retry_at: float = float("-inf")
    under_way: set[Task] = field(default_factory=set)  # all that is queued for it, or inside it

    def working_seconds(self, now: float) -> float:
        """Of the work that a thread has been at for longest; operators' is left out."""
        began = [task.began for task in self.under_way if task.began is not None and not task.patient]
        return now - min(began, default=now)


class Outbox:
    """News in order, told by one thread at a time: whoever finds nobody telling. No lock of ours is held meanwhile."""

    def __init__(self, notes: Notes) -> None:
        self._news: deque[News] = deque()
        self._turn = threading.Lock()
        self._notes = notes
        self.report: Report | None = None  # None: nobody listens yet, and the news wait

    def put(self, news: News) -> None:
        self._news.append(news)

    def tell(self) -> None:
        """Tells all news, unless another thread is at it, which then does."""
        while self.report and self._news and self._turn.acquire(blocking=False):
            try:
                self._tell_waiting(self.report)
            finally:
                self._turn.release()  # and look again: somebody may have put more, and found us telling

    def _tell_waiting(self, report: Report) -> None:
        while self._news:
            news = self._news.popleft()
            try:
                report(news)
            except Exception as error:  # noqa: BLE001 (the listener's bug must not end a tier's thread)
                self._notes("report_raised", {"news": type(news).__name__, "error": _described(error)})


class Store:
    """`memories`: tiers that cannot fail. `fallible`: how to open those that can, by name; `open` does it.

    `notes`: called with an event's name and facts, for the log, on any thread. `supervision_seconds`: between two
    looks at the tiers' health; None: only `tick` looks.
    """

    def __init__(
        self,
        memories: Mapping[str, Tier],
        fallible: Mapping[str, Callable[[], Opened]],
        *,
        hung_seconds: float,
        retry_seconds: float,
        notes: Notes = lambda event, facts: None,
        clock: Callable[[], float] = time.monotonic,
        supervision_seconds: float | None = SUPERVISION_SECONDS,
    ) -> None:
        self._transfers = Transfers(memories, self._copied, self._raised, clock=clock)
        self._health = {name: Health(opener) for name, opener in fallible.items()}
        self._hung_seconds = hung_seconds
        self._retry_seconds = retry_seconds
        self._notes = notes
        self._clock = clock
        self._outbox = Outbox(notes)
        self._lock = (
            threading.Lock()
        )  # of the books: health, transfers.tiers, and what goes into queue and outbox
        self._ticking = threading.Lock()  # of opening and closing
        self._stopped = False
        self._stopping = threading.Event()
        self._supervision_seconds = supervision_seconds
        self._supervisor = threading.Thread(target=self._supervise, name="kv supervisor", daemon=True)

    # --- the engine's side ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the tiers that may fail, and waits for it: seconds, for a large index. What fails is tried again."""
        with self._ticking:
            for name in self._health:
                self._try_open(name)

    def start(self, report: Report) -> None:
        """From now on `report` hears of everything, first of the tiers opened already. Begins to supervise."""
        with self._lock:
            for name, health in self._health.items():
                if not health.up:
                    self._outbox.put(TierDown(name, health.reason))
            self._outbox.report = report
        self._outbox.tell()
        self._supervisor.start()

    def submit(self, copy: Copy) -> None:
        """Begins a copy; exactly one CopyDone follows. Never blocks, but for as long as a brief copy takes."""
        with self._lock:
            touched = [self._health[name] for name in (copy.source, copy.target) if name in self._health]
            refused = self._stopped or not all(health.up for health in touched)
            brief = not refused and self._transfers.is_brief(copy)
            if refused:
                self._outbox.put(_refused(copy))
            elif not brief:
                task = self._transfers.submit(copy)
                for health in touched:
                    health.under_way.add(task)
        if brief:
            self._transfers.carry_out(copy)
        self._outbox.tell()

    def drop(self, drop: Drop) -> None:
        """Forgets records, behind the writes under way. Nothing, where the tier is down."""
        with self._lock:
            if self._usable(drop.tier):
                task = self._task(drop.tier, lambda tier: tier.drop(drop.keys))
                self._transfers.put_write(drop.tier, task)

    def stop(self, seconds: float) -> bool:
        """Finishes what is under way within `seconds`, closes the tiers. Whether all was done.

        What is still queued then is answered with Loss.DOWN. A thread that hangs in a tier is left behind: the
        process's end closes what it is in.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            self._stopped = True
        self._stopping.set()
        done = self._transfers.close(deadline)
        if self._supervisor.ident:
            self._supervisor.join(max(0.0, deadline - time.monotonic()))
        if not done:
            self._give_up()
        if not done or self._supervisor.is_alive():
            return False
        for name, tier in self._transfers.tiers.items():
            self._close(name, tier)
        return True

    def _give_up(self) -> None:
        """Answers what no thread has taken up."""
        with self._lock:
            self._refuse(self._transfers.withdraw())
        self._outbox.tell()

    def put_device(self, replica: int, tier: Tier) -> None:
        """A replica's device, perhaps in the place of one that was lost: copies queued before still go to that."""
        self._transfers.put_device(replica, tier)

    # --- for operators --------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, TierStats]:
        """Of the tiers that are in use."""
        with self._lock:
            tiers = self._transfers.tiers.items()
            return {
                name: tier.stats() for name, tier in tiers if name not in self._health or self._usable(name)
            }

    def down(self) -> dict[str, str]:
        """Tiers that are out of use, and why."""
        with self._lock:
            return {name: health.reason for name, health in self._health.items() if not health.up}

    def block_bytes(self, tier: str) -> int:
        """Of a tier that is in use."""
        return self._transfers.tiers[tier].block_bytes

    def measured(self) -> list[Measured]:
        return self._transfers.measured()

    def totals(self) -> dict[str, Totals]:
        return self._transfers.totals()

    def count_losses(self, tier: str, losses: Mapping[Loss, int]) -> None:
        """Blocks that a tier has lost, as found otherwise than by a copy."""
        self._transfers.count_losses(tier, losses)

    def run_among_reads(self, tier: str, work: Callable[[Tier], None]) -> bool:
        """Runs an operator's work (a verification, say) on a thread for such, beside reads and writes.

        It may take as long as it likes; the tier is not closed before it ends. False: the tier is down. True: the
        work is called, unless the store is stopped before its turn comes.
        """
        with self._lock:
            if not self._usable(tier):
                return False
            self._transfers.put_operation(tier, self._task(tier, work, patient=True))
            return True

    def _usable(self, tier: str) -> bool:
        """The lock is held."""
        return self._health[tier].up and not self._stopped

    def _task(self, tier: str, work: Callable[[Tier], None], *, patient: bool = False) -> Task:
        """`work`, counted as under way. The lock is held."""

        def run(task: Task) -> None:
            try:
                work(self._transfers.tiers[tier])
            except Exception as error:  # noqa: BLE001 (whatever a tier raises, its thread must go on)
                self._notes("job_raised", {"tier": tier, "error": _described(error)})
            finally:
                with self._lock:
                    self._ended(task)

        task = Task(run, patient=patient)
        self._health[tier].under_way.add(task)
        return task

    # --- supervision ----------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        while not self._stopping.wait(self._supervision_seconds):
            self.tick()

    def tick(self) -> None:
        """Looks once for what hangs, is broken, or may be tried again. Opening a tier may take long."""
        with self._ticking:
            for name in self._health:
                self._look(name)
                if self._may_be_tried(name):
                    self._take_out(name)
                    self._try_open(name)

    def _look(self, name: str) -> None:
        """Takes a tier down that is of no use."""
        with self._lock:
            reason = self._why_useless(name) if self._usable(name) else ""
            if reason:
                self._take_down(name, reason)
        if reason:
            self._outbox.tell()
            self._notes("tier_down", {"tier": name, "reason": reason})

    def _why_useless(self, name: str) -> str:
        if broken := getattr(self._transfers.tiers[name], "broken", None):
            return f"broken: {broken}"
        if self._health[name].working_seconds(self._clock()) > self._hung_seconds:
            return f"hung: something has taken longer than {self._hung_seconds:g} s"
        return ""

    def _take_down(self, name: str, reason: str) -> None:
        """The lock is held."""
        health = self._health[name]
        health.up, health.reason = False, reason
        health.retry_at = self._clock() + self._retry_seconds
        self._outbox.put(TierDown(name, reason))
        waiting = {task for task in health.under_way if not task.patient}
        self._refuse(self._transfers.withdraw(waiting))

    def _refuse(self, tasks: list[Task]) -> None:
        """Ends tasks that were withdrawn. The lock is held."""
        for task in tasks:
            self._ended(task)
            if task.copy is not None:
                self._outbox.put(_refused(task.copy))

    def _may_be_tried(self, name: str) -> bool:
        with self._lock:
            health = self._health[name]
            waits = health.up or health.under_way or self._stopped
            return not waits and self._clock() >= health.retry_at

    def _try_open(self, name: str) -> None:
        health = self._health[name]
        try:
            tier, up = health.open()
        except TierUnusable as error:
            self._not_opened(name, str(error))
        except Exception as error:  # noqa: BLE001 (the supervisor must go on, whatever the system says)
            self._not_opened(name, _described(error))
        else:
            self._opened(name, tier, up)

    def _not_opened(self, name: str, reason: str) -> None:
        health = self._health[name]
        with self._lock:
            news = health.reason != reason
            health.reason, health.retry_at = reason, self._clock() + self._retry_seconds
        if news:
            self._notes("tier_unusable", {"tier": name, "reason": reason})

    def _opened(self, name: str, tier: Tier, up: TierUp) -> None:
        with self._lock:
            wanted = not self._stopped
            if wanted:
                self._transfers.put_tier(name, tier)
                self._health[name].up, self._health[name].reason = True, ""
                self._outbox.put(up)
        if not wanted:
            self._close(name, tier)
            return
        self._outbox.tell()
        if notice := getattr(tier, "notice", ""):
            self._notes("tier_notice", {"tier": name, "notice": notice})
        facts = {"tier": name, "records": len(up.records), "capacity_blocks": up.capacity_blocks}
        self._notes("tier_up", facts)

    def _take_out(self, name: str) -> None:
        """Closes a tier, if it was ever open. Nothing is under way in it."""
        with self._lock:
            tier = self._transfers.take_tier(name)
        if tier is not None:
            self._close(name, tier)

    def _close(self, name: str, tier: Tier) -> None:
        try:
            tier.close()
        except Exception as error:  # noqa: BLE001 (it is gone either way, and may be opened again)
            self._notes("close_raised", {"tier": name, "error": _described(error)})

    # --- the transfers' side --------------------------------------------------------------------------------------

    def _copied(self, ended: Sequence[tuple[Task, CopyDone]]) -> None:
        with self._lock:
            for task, done in ended:
                self._ended(task)
                self._outbox.put(done)
        self._outbox.tell()

    def _ended(self, task: Task) -> None:
        """The lock is held."""
        for health in self._health.values():
            health.under_way.discard(task)

    def _raised(self, copy: Copy, error: Exception) -> None:
        facts = {"source": copy.source, "target": copy.target, "error": _described(error)}
        self._notes("copy_raised", facts)


def _refused(copy: Copy) -> CopyDone:
    return CopyDone(copy.id, tuple((index, Loss.DOWN) for index in range(len(copy.sources))))


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
