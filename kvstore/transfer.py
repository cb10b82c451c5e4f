"""Copies between tiers, on threads of their own: queued, carried out in order, measured.

Lanes: for each device one for copies into it and one for those out of it; for each tier of records, one for all that
changes it (it has one writer, so drops and writes keep their order), one for what reads from it, with several
threads, and one for operators, who may take long. What is copied where, and how much may be on its way, is
residency.py's; tiers that fail for good are store.py's.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from kvstore.copies import DEVICE, Copy, CopyDone, Loss, Place
from kvstore.memory import MemoryTier
from kvstore.tier import Buffer, Tier

MOST_QUEUED = 100_000
"""The core bounds what is on its way; more than this is a bug."""

JOINED_BYTES = 4 * 2**20
"""Copies that wait along one route are carried out together up to so much, as much as one of the core's has: each alone
would pay for the hand-over between threads. Measured, reads of 8 blocks of 48 KiB from disk: 2.7 GB/s each by itself,
3.0 by 1 MiB, 5.0 by 4 MiB."""

BRIEF_BYTES = 2 * 2**20
"""A copy of at most so much between two memories is carried out by whoever begins it, without the interpreter's lock.
Measured on two cores that compute: to load 25 blocks of 48 KiB takes 1.9 ms so, and 2.7 by a thread, of which 0.15 are
copying; to save 10 blocks 1.0 instead of 1.7."""

FORGET = 0.1
"""Weight of the newest copy in the running means."""

Clock = Callable[[], float]


@dataclass(eq=False, slots=True)
class Task:
    """Work for a lane. Each is another, whatever is in it."""

    run: Callable[["Task"], None]
    copy: Copy | None = None  # None: it is something else
    ends: tuple[Tier, ...] = ()  # the tiers that were its source and target when it was queued
    patient: bool = False  # it may take as long as it likes
    queued_at: float = 0.0
    began: float | None = None  # when a thread took it up
    others: list["Task"] = field(default_factory=list)  # that are carried out with it
    blocks: int = 0  # of all their copies


@dataclass(slots=True)
class Measured:
    """Running means of the copies of one route and size class."""

    source: str
    target: str
    size_class: int  # bytes of a copy, rounded up to a power of two
    copies: int = 0
    bytes: float = 0.0  # of a copy
    seconds: float = 0.0
    queued_seconds: float = 0.0

    def add(self, size: int, seconds: float, queued: float) -> None:
        weight = max(FORGET, 1 / (self.copies + 1))
        self.copies += 1
        self.bytes += weight * (size - self.bytes)
        self.seconds += weight * (seconds - self.seconds)
        self.queued_seconds += weight * (queued - self.queued_seconds)

    @property
    def bytes_per_second(self) -> float:
        """Of all together: the mean of each copy's rate would promise more, as quick ones take little of the time."""
        return self.bytes / max(self.seconds, 1e-9)


@dataclass(slots=True)
class Totals:
    """Of one tier, since the start."""

    read_bytes: int = 0
    written_bytes: int = 0
    losses: Counter[Loss] = field(default_factory=Counter)

    def copy(self) -> "Totals":
        return replace(self, losses=self.losses.copy())


Joins = Callable[[Task, Task], bool]
"""Whether the second task, next in the queue, may be carried out with the first and its others."""


def _never(task: Task, other: Task) -> bool:
    return False


class Lane:
    """A queue and its threads. Tasks start in order; with one thread they also end in order."""

    def __init__(self, name: str, threads: int, clock: Clock, joins: Joins = _never) -> None:
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._clock = clock
        self._joins = joins
        self._threads = [
            threading.Thread(
                target=self._work, name=f"{name} {n}", daemon=True
            )  # one that hangs must not keep us
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, task: Task) -> None:
        """Queues a task; `close` has not been called."""
        with self._changed:
            assert self._open
            assert len(self._tasks) < MOST_QUEUED
            task.queued_at = self._clock()
            self._tasks.append(task)
            self._changed.notify()

    def withdraw(self, tasks: Collection[Task] | None = None) -> list[Task]:
        """Takes these out of the queue (None: all), and returns those that were in it: no thread will run them."""
        with self._changed:
            found = [task for task in self._tasks if tasks is None or task in tasks]
            self._tasks = deque(task for task in self._tasks if not (tasks is None or task in tasks))
        return found

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task.run(task)

    def _next(self) -> Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or not self._open)
            if not self._tasks:
                return None
            task = self._tasks.popleft()
            task.began = self._clock()
            while self._tasks and self._joins(task, self._tasks[0]):
                other = self._tasks.popleft()
                other.began = task.began
                task.others.append(other)
                task.blocks += other.blocks
            return task

    def shut(self) -> None:
        """Takes no more tasks; the threads end once the queue is empty."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def join(self, deadline: float) -> bool:
        """Whether all threads have ended, by `deadline` (of time.monotonic)."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


class RecordLanes:
    """Of one tier of records."""

    def __init__(self, tier: str, readers: int, clock: Clock, joins: Joins) -> None:
        self.writer = Lane(f"kv {tier} writer", 1, clock, joins)
        self.readers = Lane(f"kv {tier} reader", readers, clock, joins)
        self.operators = Lane(f"kv {tier} operator", 1, clock)

    @property
    def all(self) -> tuple[Lane, ...]:
        return self.writer, self.readers, self.operators


class Transfers:
    """`memories`: tiers that go by slots, the first replica's device among them; those of the others come by
    `put_device`, those that keep records by `put_tier`.

    `report` hears of every copy once, on the thread that did it, and of all that were carried out together at once;
    before it `failed`, when a tier raised. Neither raises.
    """

    def __init__(
        self,
        memories: Mapping[str, Tier],
        report: Callable[[Sequence[tuple[Task, CopyDone]]], None],
        failed: Callable[[Copy, Exception], None],
        *,
        readers: int = 2,
        clock: Clock = time.monotonic,
    ) -> None:
        self.tiers: dict[str, Tier] = dict(memories)
        self._report = report
        self._failed = failed
        self._clock = clock
        self._lock = threading.Lock()
        self._measured: dict[tuple[str, str, int], Measured] = {}
        self._totals = {name: Totals() for name in memories}
        self._reading_threads = readers
        self._devices: dict[int, Tier] = {}
        self._memory_lanes: dict[int, tuple[Lane, Lane]] = {}  # up and down, by replica
        self._records: dict[str, RecordLanes] = {}
        self.put_device(0, memories[DEVICE])

    def put_device(self, replica: int, tier: Tier) -> None:
        """A replica's, perhaps in the place of one that was lost: copies queued before still go to that."""
        self._devices[replica] = tier
        if replica == 0:
            self.tiers[DEVICE] = tier
        if replica not in self._memory_lanes:
            up, down = (
                Lane(f"kv {which} copier {replica}", 1, self._clock, self._joins) for which in ("up", "down")
            )
            self._memory_lanes[replica] = up, down

    def put_tier(self, name: str, tier: Tier) -> None:
        """A tier of records, perhaps in the place of one of the same name that was taken."""
        if name not in self._records:
            self._records[name] = RecordLanes(name, self._reading_threads, self._clock, self._joins)
            with self._lock:
                self._totals[name] = Totals()
        self.tiers[name] = tier

    def take_tier(self, name: str) -> Tier | None:
        """Takes a tier out, to be closed: nothing may be queued that touches it."""
        return self.tiers.pop(name, None)

    def submit(self, copy: Copy) -> Task:
        """Queues a copy. Never blocks."""
        task = self._task(copy)
        self._lane(copy).put(task)
        return task

    def is_brief(self, copy: Copy) -> bool:
        """Whether to carry it out takes less than to hand it to a thread: small, and between two memories."""
        source, target = self._ends(copy)
        memories = isinstance(source, MemoryTier) and isinstance(target, MemoryTier)
        return memories and len(copy.sources) * source.block_bytes <= BRIEF_BYTES

    def carry_out(self, copy: Copy) -> None:
        """Carries a copy out on the caller's thread: `report` has heard of its end when this returns."""
        task = self._task(copy)
        task.queued_at = task.began = self._clock()
        self._carry_out(task)

    def put_write(self, tier: str, task: Task) -> None:
        """Queues work behind the writes of a tier of records: nothing else writes while it runs."""
        self._records[tier].writer.put(task)

    def put_operation(self, tier: str, task: Task) -> None:
        """Queues an operator's work, one after the other; reads and writes go on beside it."""
        self._records[tier].operators.put(task)

    def withdraw(self, tasks: Collection[Task] | None = None) -> list[Task]:
        """Takes these out of the queues (None: all). Those that were still there: they touch nothing, nor report."""
        return [task for lane in self._lanes() for task in lane.withdraw(tasks)]

    def _task(self, copy: Copy) -> Task:
        return Task(self._carry_out, copy, self._ends(copy), blocks=len(copy.sources))

    def _ends(self, copy: Copy) -> tuple[Tier, Tier]:
        return self._tier(copy.source, copy.replica), self._tier(copy.target, copy.replica)

    def _tier(self, name: str, replica: int) -> Tier:
        return self._devices[replica] if name == DEVICE else self.tiers[name]

    def _lanes(self) -> list[Lane]:
        memory = (lane for lanes in self._memory_lanes.values() for lane in lanes)
        return [*memory, *(lane for lanes in self._records.values() for lane in lanes.all)]

    def _lane(self, copy: Copy) -> Lane:
        if copy.target in self._records:
            return self._records[copy.target].writer
        if copy.source in self._records:
            return self._records[copy.source].readers
        up, down = self._memory_lanes[copy.replica]
        return up if copy.target == DEVICE else down

    def _joins(self, task: Task, other: Task) -> bool:
        """Small copies along one route, none of which drops anything that the ones before it may write."""
        if task.copy is None or other.copy is None or other.copy.drops or task.ends != other.ends:
            return False
        blocks = task.blocks + other.blocks
        target = task.ends[1]
        most = getattr(target, "transaction_blocks", blocks)
        return blocks <= most and blocks * target.block_bytes <= JOINED_BYTES

    def _carry_out(self, task: Task) -> None:
        copies, began = _copies(task), task.began
        assert began is not None
        whole = _joined(copies)
        try:
            losses = _copy(whole, *task.ends)
        except Exception as error:  # noqa: BLE001 (whatever a tier raises, the core must hear that the copy has ended)
            losses = [Loss.IO] * len(whole.sources)
            for copy in copies:
                self._failed(copy, error)
        self._share_out(task, losses, (self._clock() - began) / max(1, len(whole.sources)))

    def _share_out(self, task: Task, losses: Sequence[Loss | None], seconds: float) -> None:
        """Reports each copy as if they had been made one after another. `seconds`: a block; no losses: none is lost."""
        began = task.began
        assert began is not None
        ended: list[tuple[Task, CopyDone]] = []
        at = 0
        for each, copy in zip((task, *task.others), _copies(task), strict=True):
            count = len(copy.sources)
            lost = tuple(
                (index, loss) for index, loss in enumerate(losses[at : at + count]) if loss is not None
            )
            queued = began + seconds * at - each.queued_at
            ended.append((each, CopyDone(copy.id, lost, seconds * count, queued)))
            at += count
        with self._lock:
            for copy, (_, done) in zip(_copies(task), ended, strict=True):
                self._measure(copy, done)
        self._report(ended)

    # --- figures --------------------------------------------------------------------------------------------------

    def _measure(self, copy: Copy, done: CopyDone) -> None:
        """The lock is held."""
        size = self.tiers[copy.source].block_bytes * (len(copy.sources) - len(done.lost))
        self._totals[copy.source].read_bytes += size
        self._totals[copy.target].written_bytes += size
        for _, loss in done.lost:
            writes = loss is Loss.FULL or copy.target in self._records
            self._totals[copy.target if writes else copy.source].losses[loss] += 1
        if size:
            route = (copy.source, copy.target, 1 << (size - 1).bit_length())
            means = self._measured.get(route)
            if means is None:
                means = self._measured[route] = Measured(*route)
            means.add(size, done.seconds, done.queued_seconds)

    def measured(self) -> list[Measured]:
        """The running means as they are now, by route and size class."""
        with self._lock:
            return [replace(means) for means in self._measured.values()]

    def totals(self) -> dict[str, Totals]:
        """What each tier has read, written and lost until now."""
        with self._lock:
            return {name: totals.copy() for name, totals in self._totals.items()}

    def count_losses(self, tier: str, losses: Mapping[Loss, int]) -> None:
        """Blocks that a tier has lost, as found otherwise than by a copy."""
        with self._lock:
            self._totals[tier].losses.update(losses)

    def close(self, deadline: float) -> bool:
        """Takes nothing more, finishes what is queued until `deadline` (of time.monotonic). Whether all was done."""
        for lane in self._lanes():
            lane.shut()
        ended = [lane.join(deadline) for lane in self._lanes()]
        return all(ended)


def _copy(copy: Copy, source: Tier, target: Tier) -> Sequence[Loss | None]:
    if isinstance(source, MemoryTier) and isinstance(target, MemoryTier):
        source.copy_to(target, copy.sources, copy.targets)
        return ()
    if into := _buffers(target, copy.targets):
        return source.read(copy.sources, into)
    if data := _buffers(source, copy.sources):
        return target.write(copy.targets, data, copy.drops)
    return _bounce(copy, source, target)


def _bounce(copy: Copy, source: Tier, target: Tier) -> Sequence[Loss | None]:
    """Between two tiers that lend nothing: through memory of our own."""
    staging = [np.empty(source.block_bytes, dtype=np.uint8) for _ in copy.sources]
    losses = list(source.read(copy.sources, staging))
    whole = [index for index, loss in enumerate(losses) if loss is None]
    places = [copy.targets[index] for index in whole]
    written = target.write(places, [staging[index] for index in whole], copy.drops)
    for index, loss in zip(whole, written, strict=True):
        losses[index] = loss
    return losses


def _copies(task: Task) -> list[Copy]:
    return [each.copy for each in (task, *task.others) if each.copy is not None]


def _joined(copies: Sequence[Copy]) -> Copy:
    """One copy of the blocks of all."""
    if len(copies) == 1:
        return copies[0]
    sources, targets = (
        tuple(chain.from_iterable(ends))
        for ends in zip(*((c.sources, c.targets) for c in copies), strict=True)
    )
    return replace(copies[0], sources=sources, targets=targets)


def _buffers(tier: Tier, places: Sequence[Place]) -> list[Buffer]:
    """The places' own memory, if the tier lends it, else nothing."""
    found = [tier.buffer(place.slot) for place in places]
    return [] if any(buffer is None for buffer in found) else [b for b in found if b is not None]
