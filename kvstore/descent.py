"""The way down below the device: what leaves the host and the disk, and what is written to disk before. Pure.

A block of the host that the placement policy wants on disk waits here for one of the writer's transactions; one that is
owed to the disk does not leave the host before. What leaves the disk goes with the next transaction, or as a Drop.
Who may leave is shelves.py's; how blocks come down from the device, and up again, is residency.py's.
"""

from collections.abc import Iterator

from kvstore.block import Key
from kvstore.copies import DISK, HOST, Copy, Loss, Place
from kvstore.flights import End, Flights, InFlight
from kvstore.shelf import Entry, Shelf
from kvstore.shelves import Shelves
from policies.placement import Placement

DISK_RETRY_SECONDS = 5.0
"""After a write to disk has failed, the host gives up blocks without waiting for the disk for so long."""

WRITES = 2
"""Transactions on their way to the disk's one writer: one it works on, one that waits."""


class Descent:
    """`queued_blocks`: most that wait for the disk. `transaction_blocks`: most of one write to it."""

    def __init__(
        self,
        shelves: Shelves,
        placement: Placement,
        *,
        queued_blocks: int,
        transaction_blocks: int,
    ) -> None:
        self.placement = placement
        self.transaction_blocks = transaction_blocks
        self.drops: list[Key] = []  # of the disk, not yet told
        self.dropped_blocks = 0  # not written down, as copies could not keep up or the disk had no room
        self._shelves = shelves
        self._queued_blocks = queued_blocks
        self._waiting: dict[Key, Entry] = {}  # entries of the host, oldest first
        self._writes = 0
        self._retry_at = float("-inf")

    @property
    def quiet(self) -> bool:
        """Whether nothing waits."""
        return not (self._waiting or self.drops)

    # --- in and out of a tier -------------------------------------------------------------------------------------

    def admit(self, shelf: Shelf, place: Place, now: float) -> Entry | None:
        """A new entry, being written; None when nothing may leave for it."""
        if not shelf.room:
            self.evict(shelf, now, keep=place.parent)
        return shelf.add(place, now) if shelf.room else None

    def evict(self, shelf: Shelf, now: float, keep: Key = b"") -> bool:
        """Whether one has left, by the policy. What is wanted on disk first is sent there, and passed over."""
        owed = self._owed if shelf is self._shelves.host else _owes_nothing
        victim = self._shelves.next_to_leave(shelf, now, keep, owed)
        if victim is None:
            return False
        self.forget(victim)
        return True

    def forget(self, entry: Entry) -> None:
        """Drops a block from its tier, now or when its copies have ended."""
        if entry.tier == DISK and not entry.doomed:
            self.drops.append(entry.key)
        self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """As `forget`, of what its tier does not have any more, or never had: a disk is not told."""
        if entry.tier == HOST:
            self._waiting.pop(entry.key, None)
        self._shelves.remove(entry)

    # --- host to disk ---------------------------------------------------------------------------------------------

    def want(self, entry: Entry) -> None:
        """A block of the host has arrived, or been hit: it waits for the disk if the placement policy says so."""
        if self.placement(entry, False):
            self._queue(entry)

    def _owed(self, entry: Entry, now: float) -> bool:
        """Whether a block of the host waits for the disk, or is to: there it goes then, if the disk takes any."""
        disk = self._shelves.disk
        takes = disk.up and now >= self._retry_at
        if disk.readable(entry.key) or not takes or not self.placement(entry, True):
            return False
        return self._queue(entry)

    def _queue(self, entry: Entry) -> bool:
        """False when there is no disk or its queue is full: the block stays where it is, for now."""
        disk = self._shelves.disk
        if entry.key in self._waiting or entry.key in disk:
            return True
        if not disk.up or len(self._waiting) >= self._queued_blocks:
            self.dropped_blocks += disk.up
            return False
        self._waiting[entry.key] = entry
        return True

    def write_down(self, flights: Flights, now: float) -> Iterator[Copy]:
        """The next transactions, while the writer has less than it can do; they are copies among `flights`."""
        while self._waiting and self._writes < WRITES:
            if pairs := self._transaction(now):
                self._writes += 1
                yield flights.begin(HOST, DISK, pairs, drops=self.take_drops())

    def take_drops(self) -> tuple[Key, ...]:
        drops, self.drops = tuple(self.drops), []
        return drops

    def _transaction(self, now: float) -> list[tuple[End, End]]:
        """Blocks for one transaction, parents before children. What leaves the disk for them is among the drops."""
        pairs: list[tuple[End, End]] = []
        while self._waiting and len(pairs) < self.transaction_blocks:
            key, entry = next(iter(self._waiting.items()))
            missing = self._not_on_disk(entry)[: self.transaction_blocks - len(pairs)]
            if not missing or not all(self._start_write(source, pairs, now) for source in missing):
                self._waiting.pop(key)
                self.dropped_blocks += bool(missing)
                self._shelves.offer(key)
        return pairs

    def _not_on_disk(self, entry: Entry) -> list[Entry]:
        """The entry and its ancestors that the disk lacks, the first of the chain first; [] if one is nowhere."""
        disk = self._shelves.disk
        missing: list[Entry] = []
        current: Entry | None = entry
        while current is not None and current.key not in disk:
            if current.writing or current.doomed:
                return []
            missing.append(current)
            if not current.parent or current.parent in disk:
                return missing[::-1]
            current = self._shelves.host.get(current.parent)
        return []

    def _start_write(self, source: Entry, pairs: list[tuple[End, End]], now: float) -> bool:
        """Adds one block, whose parent the disk has or is about to have, to a transaction."""
        source.readers += 1
        target = self.admit(self._shelves.disk, source.place, now)
        if target is None:
            self._shelves.read(source)
            return False
        target.hits, target.past = source.hits, source.past  # both tiers have the same policy
        self._waiting.pop(source.key, None)
        pairs.append((source, target))
        return True

    # --- what comes of it -----------------------------------------------------------------------------------------

    def written(self, flight: InFlight, lost: dict[int, Loss], now: float) -> None:
        """A write to disk has ended. A transaction that failed has dropped nothing either."""
        copy = flight.copy
        self._writes -= copy.source == HOST
        if lost:
            self._retry_at = now + DISK_RETRY_SECONDS
            self.dropped_blocks += len(lost)
            self.drops += [*copy.drops, *(copy.targets[index].key for index in lost)]

    def tier_down(self, shelf: Shelf) -> None:
        """A tier is out of use: what it holds is found no more, and nothing waits for the disk."""
        waiting, self._waiting = self._waiting, {}
        for entry in shelf.entries():
            self._shelves.remove(entry)
        for key in waiting:
            self._shelves.offer(key)
        self.drops.clear()

    def disk_up(self, transaction_blocks: int) -> None:
        """The disk takes blocks again."""
        self.transaction_blocks = transaction_blocks
        self._retry_at = float("-inf")


def _owes_nothing(_entry: Entry, _now: float) -> bool:
    return False
