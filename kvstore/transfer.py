"""Copies between tiers, on threads of their own: queued, carried out in order, measured.

One lane for copies between memories, one for all that changes a tier that is not memory (it has one writer, so drops
and writes keep their order), and one for what reads from such a tier, with several threads. What is copied where, and
how much may be on its way, is residency.py's; tiers that fail for good are store.py's.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.copies import Copy, CopyDone, Loss, Place
from kvstore.memory import MemoryTier
from kvstore.tier import Buffer, Tier

MOST_QUEUED = 100_000
"""The core bounds what is on its way; more than this is a bug."""

FORGET = 0.1
"""Weight of the newest copy in the running means."""

Job = Callable[[], None]


@dataclass(slots=True)
class Measured:
    """Running means of the copies of one route and size class."""

    source: str
    target: str
    size_class: int  # bytes of a copy, rounded up to a power of two
    copies: int = 0
    bytes_per_second: float = 0.0
    seconds: float = 0.0
    queued_seconds: float = 0.0

    def add(self, size: int, seconds: float, queued: float) -> None:
        weight = max(FORGET, 1 / (self.copies + 1))
        self.copies += 1
        self.bytes_per_second += weight * (size / max(seconds, 1e-9) - self.bytes_per_second)
        self.seconds += weight * (seconds - self.seconds)
        self.queued_seconds += weight * (queued - self.queued_seconds)


@dataclass(slots=True)
class Totals:
    """Of one tier, since the start."""

    read_bytes: int = 0
    written_bytes: int = 0
    losses: Counter[Loss] = field(default_factory=Counter)


class Lane:
    """A queue and its threads. Jobs start in order; with one thread they also end in order."""

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._threads = [
            threading.Thread(
                target=self._work, name=f"{name} {n}", daemon=True
            )  # one that hangs must not keep us
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        with self._changed:
            assert len(self._jobs) < MOST_QUEUED
            self._jobs.append(job)
            self._changed.notify()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or not self._open)
            return self._jobs.popleft() if self._jobs else None

    def close(self, deadline: float) -> bool:
        """Ends the threads once the queue is empty. Whether all had ended by `deadline` (of time.monotonic)."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


class Transfers:
    """`report` is called once a copy, on the thread that did it; `failed` too, when a tier raised."""

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        report: Callable[[CopyDone], None],
        failed: Callable[[Copy, Exception], None],
        *,
        readers: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tiers: dict[str, Tier] = {}
        self._report = report
        self._failed = failed
        self._clock = clock
        self._lock = threading.Lock()
        self._measured: dict[tuple[str, str, int], Measured] = {}
        self._totals: dict[str, Totals] = {}
        self._reading_threads = readers
        self._memory = Lane("kv copier", 1)
        self._writers: dict[str, Lane] = {}
        self._readers: dict[str, Lane] = {}
        for name, tier in tiers.items():
            self.put_tier(name, tier)

    def put_tier(self, name: str, tier: Tier) -> None:
        """A tier to copy from and to, perhaps in the place of one of the same name that was taken."""
        self.tiers[name] = tier
        self._totals.setdefault(name, Totals())
        if tier.buffer(0) is None and name not in self._writers:
            self._writers[name] = Lane(f"kv {name} writer", 1)
            self._readers[name] = Lane(f"kv {name} reader", self._reading_threads)

    def take_tier(self, name: str) -> Tier | None:
        """Takes a tier out, to be closed: nothing may be queued that touches it."""
        return self.tiers.pop(name, None)

    def submit(self, copy: Copy) -> None:
        """Queues a copy. Never blocks."""
        queued_at = self._clock()
        self._lane(copy).put(lambda: self._carry_out(copy, queued_at))

    def write_job(self, tier: str, job: Job) -> None:
        """Queues a job behind the writes of a tier that is not memory: nothing else writes while it runs."""
        self._writers[tier].put(job)

    def read_job(self, tier: str, job: Job) -> None:
        """Queues a job among the reads of such a tier."""
        self._readers[tier].put(job)

    def _lane(self, copy: Copy) -> Lane:
        return self._writers.get(copy.target) or self._readers.get(copy.source) or self._memory

    def _carry_out(self, copy: Copy, queued_at: float) -> None:
        began = self._clock()
        try:
            losses = self._copy(copy)
        except Exception as error:  # noqa: BLE001 (whatever a tier raises, the core must hear that the copy has ended)
            losses = [Loss.IO] * len(copy.sources)
            self._failed(copy, error)
        done = CopyDone(
            id=copy.id,
            lost=tuple((index, loss) for index, loss in enumerate(losses) if loss is not None),
            seconds=self._clock() - began,
            queued_seconds=began - queued_at,
        )
        self._measure(copy, done)
        self._report(done)

    def _copy(self, copy: Copy) -> Sequence[Loss | None]:
        source, target = self.tiers[copy.source], self.tiers[copy.target]
        if isinstance(source, MemoryTier) and isinstance(target, MemoryTier):
            source.copy_to(target, copy.sources, copy.targets)
            return ()
        if into := _buffers(target, copy.targets):
            return source.read(copy.sources, into)
        if data := _buffers(source, copy.sources):
            return target.write(copy.targets, data, copy.drops)
        return self._bounce(copy, source, target)

    def _bounce(self, copy: Copy, source: Tier, target: Tier) -> Sequence[Loss | None]:
        """Between two tiers that lend nothing: through memory of our own."""
        staging = [np.empty(source.block_bytes, dtype=np.uint8) for _ in copy.sources]
        losses = list(source.read(copy.sources, staging))
        whole = [index for index, loss in enumerate(losses) if loss is None]
        written = target.write(
            [copy.targets[index] for index in whole], [staging[index] for index in whole], copy.drops
        )
        for index, loss in zip(whole, written, strict=True):
            losses[index] = loss
        return losses

    # --- figures --------------------------------------------------------------------------------------------------

    def _measure(self, copy: Copy, done: CopyDone) -> None:
        size = self.tiers[copy.source].block_bytes * (len(copy.sources) - len(done.lost))
        with self._lock:
            self._totals[copy.source].read_bytes += size
            self._totals[copy.target].written_bytes += size
            for _, loss in done.lost:
                writes = loss is Loss.FULL or copy.target in self._writers
                self._totals[copy.target if writes else copy.source].losses[loss] += 1
            if size:
                route = (copy.source, copy.target, 1 << (size - 1).bit_length())
                means = self._measured.setdefault(route, Measured(*route))
                means.add(size, done.seconds, done.queued_seconds)

    def measured(self) -> list[Measured]:
        """The running means, by route and size class."""
        with self._lock:
            return list(self._measured.values())

    def totals(self) -> dict[str, Totals]:
        """What each tier has read, written and lost."""
        with self._lock:
            return dict(self._totals)

    def close(self, deadline: float) -> bool:
        """Finishes what is queued, until `deadline` (of time.monotonic). Whether all was done."""
        lanes = [self._memory, *self._readers.values(), *self._writers.values()]
        ended = [lane.close(deadline) for lane in lanes]
        return all(ended)


def _buffers(tier: Tier, places: Sequence[Place]) -> list[Buffer]:
    """The places' own memory, if the tier lends it, else nothing."""
    found = [tier.buffer(place.slot) for place in places]
    return [] if any(buffer is None for buffer in found) else [b for b in found if b is not None]
