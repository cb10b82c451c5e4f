"""What all replicas share below their devices: the shelves, the way down, and what copies of whom are under way. Pure.

Only device residency separates replicas: each has a Residency of its own (residency.py), with its pool and its copies;
a block that one has saved, any of them finds here. Copies are numbered across all, and each ends at whom it began.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import count

from kvstore.descent import Descent
from kvstore.flights import Flights
from kvstore.shelf import Entry
from kvstore.shelves import Shelves
from policies.eviction import MakeEviction
from policies.placement import Placement


@dataclass(frozen=True, slots=True)
class ResidencyConfig:
    """Sizes in blocks; 0 turns a tier off."""

    host_blocks: int = 0
    disk_blocks: int = 0
    copy_blocks: int = 32  # most of one copy
    transaction_blocks: int = 8  # most of one write to disk
    spilling_blocks: int = 256  # most on their way down from one device at once
    queued_blocks: int = 4096  # most that wait for the disk
    pinned_share: float = 0.5  # of a tier, that waiting snapshots may keep from eviction


class Below:
    def __init__(self, config: ResidencyConfig, eviction: MakeEviction, placement: Placement) -> None:
        self.config = config
        self.shelves = Shelves(config.host_blocks, config.disk_blocks, eviction)
        self.descent = Descent(
            self.shelves,
            placement,
            queued_blocks=config.queued_blocks,
            transaction_blocks=config.transaction_blocks,
        )
        self.copy_ids = count(1)
        self.failures = 0
        self.told_blocks = 0  # of descent.dropped_blocks
        self._flights: list[Flights] = []  # of all replicas, and of those that are gone but not quiet

    def join(self, flights: Flights) -> None:
        """One more replica's."""
        self._flights.append(flights)

    def part(self, flights: Flights) -> None:
        """A replica is gone, and its copies have ended."""
        assert flights.quiet
        self._flights.remove(flights)

    @property
    def alone(self) -> bool:
        """Whether only one replica is there."""
        return len(self._flights) == 1

    @property
    def quiet(self) -> bool:
        """Whether nothing is on its way for anybody, nor waits for it."""
        return self.descent.quiet and all(flights.quiet for flights in self._flights)

    def bytes_up(self, block_bytes: int) -> dict[str, int]:
        """Bytes on their way to any device, or waiting for it, by the tier that they come from."""
        if self.alone:
            return self._flights[0].bytes_up(block_bytes)
        sizes: Counter[str] = Counter()
        for flights in self._flights:
            sizes.update(flights.bytes_up(block_bytes))
        return dict(sizes)

    def touched(self, tier: str) -> list[Entry]:
        """The entries of a tier that anybody's copies touch, or are about to."""
        return [entry for flights in self._flights for entry in flights.touched(tier)]

    def use(self, eviction: MakeEviction, placement: Placement) -> None:
        """Others decide from now on. The same eviction policy as before keeps what it has learned."""
        self.descent.placement = placement
        self.shelves.use(eviction)

    def check(self) -> None:
        """Asserts that shelves and all copies agree."""
        entries = {*self.shelves.host.entries(), *self.shelves.disk.entries()}
        reading: Counter[Entry] = Counter()
        writing: Counter[Entry] = Counter()
        for flights in self._flights:
            reading.update(flights.reading)
            writing.update(flights.writing)
        for entry in {*entries, *reading, *writing}:
            assert entry.readers == reading[entry], f"{entry}: readers and copies differ"
            assert entry.writing == (writing[entry] == 1), f"{entry}: written by {writing[entry]} copies"
            assert entry.pins >= 0
        for shelf in self.shelves:
            doomed = {entry for entry in self.touched(shelf.name) if entry.doomed}
            shelf.check([entry.slot for entry in doomed])
        if not self.failures:
            self.shelves.check_chains()
