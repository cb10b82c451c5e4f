"""Where every block of a replica is: the table of tiers, pins and copies in flight. Pure; the core alone changes it.

The device's books are `pool`, with sequences as holders; a copy that reads or writes a device block holds it too, so
a slot with a copy in flight is nobody else's (design §4.2). Below it are shelves: host, then disk; either may be off.
They are all replicas' (below.py).

Here is what the engine asks of it: what is found, saved, fetched, pinned, and what comes of a copy. Decisions leave as
copies and drops, collected until `take()`; a copy's end comes back through `copied()`. Elsewhere: copies under way
(flights.py); what keeps chains whole (shelves.py); what leaves host and disk, and is written before (descent.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from kvstore.below import Below
from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Drop, Loss, Place, TierUp
from kvstore.device import DevicePool
from kvstore.flights import End, Flights, InFlight
from kvstore.shelf import Entry, Shelf

T = TypeVar("T")


class Residency:
    def __init__(
        self,
        pool: DevicePool,
        below: Below,
        replica: int = 0,
    ) -> None:
        self.pool = pool
        self.below = below
        self.config = below.config
        self.shelves = below.shelves
        self.flights = Flights(pool, below.copy_ids, replica)
        self._descent = below.descent
        self._unsaved_blocks = self._told_blocks = 0
        self._fetches: list[Copy] = []
        below.join(self.flights)

    # --- look-ups: nothing changes --------------------------------------------------------------------------------

    @property
    def host(self) -> Shelf:
        return self.shelves.host

    @property
    def disk(self) -> Shelf:
        """Another one after each TierUp."""
        return self.shelves.disk

    @property
    def keeps(self) -> bool:
        """Whether there is a tier below the device."""
        return self.host.up or self.disk.up

    def find(self, keys: Sequence[Key], *, device_only: bool = False) -> list[End]:
        """The longest prefix of `keys` that tiers have: device blocks, then readable entries below, topmost first."""
        found: list[End] = list(self.pool.match(keys))
        if device_only or not self.keeps:
            return found
        host, disk = self.host, self.disk
        for key in keys[len(found) :]:
            entry = host.readable(key) or disk.readable(key)
            if entry is None:
                break
            found.append(entry)
        return found

    def coming(self, key: Key) -> bool:
        """Whether a block that the device has not is on its way up into the host: worth waiting for."""
        entry = self.host.get(key)
        return entry is not None and entry.writing and key in self.disk

    def readable(self, key: Key) -> bool:
        """Whether a tier below the device has it."""
        return self.host.readable(key) is not None or self.disk.readable(key) is not None

    def writing(self, key: Key) -> bool:
        """Whether the first copy of a block below the device is still being written."""
        entries = self.shelves.having(key)
        return bool(entries) and all(entry.writing for entry in entries)

    def survival(self, blocks: int) -> float:
        """The chance that so many more blocks of a snapshot are still below the device when it comes back.

        What is pinned is. What finds no room under the share for pins competes with everything else: taken as lost.
        """
        shelf = next((shelf for shelf in self.shelves if shelf.up), None)
        if shelf is None or not blocks:
            return 0.0
        return max(0.0, min(1.0, (self.config.pinned_share * shelf.capacity - shelf.pinned) / blocks))

    @property
    def spilling_room(self) -> int:
        """Device blocks that may still begin their way down now."""
        return self.config.spilling_blocks - self.flights.spilling

    @property
    def leaving(self) -> int:
        """Device blocks that are free as soon as copies have ended. Those of a tier that is down are not counted."""
        return self.flights.leaving((DEVICE, *(shelf.name for shelf in self.shelves if shelf.up)))

    @property
    def quiet(self) -> bool:
        """Whether nothing is on its way, nor waits for it."""
        return self.flights.quiet and self._descent.quiet and not self._fetches

    @property
    def pinned(self) -> int:
        """Blocks below the device that snapshots keep from eviction."""
        return self.host.pinned + self.disk.pinned

    @property
    def dropped_blocks(self) -> int:
        """Not written down, as copies could not keep up or a tier had no room."""
        return self._unsaved_blocks + self._descent.dropped_blocks

    def take_dropped(self) -> int:
        """Of `dropped_blocks`, those since the last call. What replicas share is told to the first that asks."""
        since = self.dropped_blocks - self._told_blocks - self.below.told_blocks
        self._told_blocks, self.below.told_blocks = self._unsaved_blocks, self._descent.dropped_blocks
        return since

    # --- down: checkpoints and snapshots --------------------------------------------------------------------------

    def save(self, chain: Iterable[tuple[int, Place]], now: float) -> int:
        """Starts copies of held device blocks into the next tier down, unless it has them.

        `chain`: (device block, place), parents first. Returns how many of them, from the first on, are safe or on
        their way; the rest found no room, or too much is on its way already.
        """
        shelf = self.host if self.host.up else self.disk
        if not shelf.up:
            return 0
        safe = 0
        for block, place in chain:
            if entry := shelf.get(place.key):
                shelf.touch(entry, now)
            elif not self._spill(block, place, shelf, now):
                self._unsaved_blocks += 1
                break
            safe += 1
        return safe

    def _spill(self, block: int, place: Place, shelf: Shelf, now: float) -> bool:
        orphan = place.parent and place.parent not in self.shelves
        if self.spilling_room <= 0 or orphan:
            return False
        if (entry := self._descent.admit(shelf, place, now)) is None:
            return False
        self.flights.spill(block, entry)
        return True

    def pin(self, keys: Iterable[Key]) -> list[Entry]:
        """Keeps what is below the device of these from eviction, as far as `pinned_share` allows. See `unpin`."""
        pinned = []
        for key in keys:
            for shelf in self.shelves:
                entry = shelf.get(key)
                if entry and (entry.pins or shelf.pinned < self.config.pinned_share * shelf.capacity):
                    shelf.pin(entry)
                    pinned.append(entry)
                    break
        return pinned

    def unpin(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.shelves.named(entry.tier).unpin(entry)
            self.shelves.offer(entry.key)

    # --- up: fetches ----------------------------------------------------------------------------------------------

    def fetch(self, wanted: Sequence[tuple[Entry, int]], after: int) -> list[tuple[int, list[int]]]:
        """Starts copies of entries into device blocks, which the caller holds too. `after`: see Copy.

        Returns (copy, which of `wanted` it brings).
        """
        told = []
        for tier in (HOST, DISK):
            those = [index for index, (entry, _) in enumerate(wanted) if entry.tier == tier]
            for indices in _chunks(those, self.config.copy_blocks):
                pairs = [wanted[index] for index in indices]
                for entry, block in pairs:
                    entry.readers += 1
                    self.flights.hold(block)
                copy = self.flights.begin(tier, DEVICE, pairs, after=after)
                self._fetches.append(copy)
                told.append((copy.id, indices))
        return told

    def prefetch(self, keys: Sequence[Key], now: float) -> None:
        """Brings into the host what of this chain's matched prefix only the disk has, as far as there is room."""
        if not (self.host.up and self.disk.up):
            return
        pairs: list[tuple[Entry, Entry]] = []
        found = [place for place in self.find(keys) if isinstance(place, Entry)]
        for place in found:
            self.shelves.named(place.tier).touch(
                place, now
            )  # what it needs does not leave for the rest of it
        for place in found[: self.config.spilling_blocks]:
            if place.tier == HOST:
                continue
            place.readers += 1  # it must not be evicted for those that come after it
            target = None if place.key in self.host else self._descent.admit(self.host, place.place, now)
            if target is None:
                self.shelves.read(place)
                break
            pairs.append((place, target))
        for chunk in _chunks(pairs, self.config.copy_blocks):
            self._fetches.append(self.flights.begin(DISK, HOST, chunk))

    def hit(self, keys: Iterable[Key], now: float) -> None:
        """A sequence found these blocks, wherever: what is kept of them below counts as used."""
        if not self.keeps:
            return
        for key in keys:
            for shelf in self.shelves:
                if entry := shelf.get(key):
                    shelf.hit(entry, now)
            if entry := self.host.readable(key):
                self._descent.want(entry)

    # --- copies end -----------------------------------------------------------------------------------------------

    def copied(self, done: CopyDone, now: float) -> InFlight:
        """A copy has ended: its slots are free of it, what arrived is present, what is lost at its source is gone."""
        flight, lost = self.flights.end(done.id), dict(done.lost)
        self.below.failures += bool(lost)
        for index, source in enumerate(flight.sources):
            self._left(source, lost.get(index))
        for index, target in enumerate(flight.targets):
            self._arrived(target, index not in lost)
        if flight.copy.target == DISK:
            self._descent.written(flight, lost, now)
        return flight

    def _left(self, source: End, loss: Loss | None) -> None:
        if isinstance(source, int):
            self.flights.let_go(source)
            return
        self.shelves.read(source)
        if loss is not None:
            self._descent.forget(source)  # whatever the reason, or it would be tried again and again

    def _arrived(self, target: End, whole: bool) -> None:
        if isinstance(target, int):
            self.flights.let_go(target)
            return
        self.shelves.named(target.tier).written(target)
        if not whole:
            self._descent.remove(target)
            return
        self.shelves.offer(target.key)
        if target.tier == HOST and not target.doomed:
            self._descent.want(target)

    def discard(self, key: Key) -> None:
        """Drops a block from all tiers below the device, but for those where somebody else's snapshot needs it."""
        for entry in self.shelves.having(key):
            if not entry.pins:
                self._descent.forget(entry)

    # --- tiers and operators --------------------------------------------------------------------------------------

    def tier_down(self, tier: str) -> list[int]:
        """A tier is out of use: nothing is found in it. Returns our copies that still touch it.

        Each replica is told; what is shared is changed by the first.
        """
        self.below.failures += 1
        self._descent.tier_down(self.shelves.down(tier))
        return self.flights.touching(tier)

    def tier_up(self, up: TierUp, now: float) -> None:
        """A tier that is not memory is in use, with what it holds: once all parts of that have come.

        One replica is told, for all.
        """
        self._descent.drops += self.shelves.load(up, now)
        if not up.more:
            assert not self.below.touched(DISK), "a tier is opened when nothing touches it any more"
            self._descent.disk_up(up.transaction_blocks or self.config.transaction_blocks)

    def prune(self, tier: str, blocks: int, now: float) -> None:
        """Evicts by the policy until a tier has `blocks` or nothing more may leave."""
        shelf = self.shelves.named(tier)
        while len(shelf) > blocks and self._descent.evict(shelf, now):
            pass

    def clear(self, tier: str) -> None:
        """Forgets all that no copy touches and no snapshot relies on, children first."""
        for entry in sorted(self.shelves.named(tier).entries(), key=lambda entry: -entry.depth):
            if entry.settled and self.shelves.may_leave(entry):
                self._descent.forget(entry)

    def damaged(self, tier: str, keys: Iterable[Key]) -> None:
        """Drops blocks that cannot be read. Their children stay, unfound, until these come back or they are evicted."""
        for key in keys:
            if entry := self.shelves.named(tier).get(key):
                self.below.failures += 1
                self._descent.forget(entry)

    # --- what is to be done ---------------------------------------------------------------------------------------

    @property
    def untold(self) -> tuple[int, int]:
        """Copies from and to the device that `take` has next, and their blocks."""
        spilled, most = self.flights.untold_spills, self.config.copy_blocks
        fetched = [len(copy.sources) for copy in self._fetches if copy.target == DEVICE]
        return len(fetched) + -(-spilled // most), sum(fetched) + spilled

    def take(self, now: float) -> list[Copy | Drop]:
        """What has been decided since the last call, in the order in which it must be carried out."""
        if self.quiet:
            return []
        told: list[Copy | Drop] = [
            *self._fetches,
            *self._spill_copies(),
            *self._descent.write_down(self.flights, now),
        ]
        self._fetches = []
        if drops := self._descent.take_drops():
            told.append(Drop(DISK, drops))
        return told

    def _spill_copies(self) -> Iterator[Copy]:
        spills = self.flights.take_spills()
        for tier, most in ((HOST, self.config.copy_blocks), (DISK, self._descent.transaction_blocks)):
            for chunk in _chunks([spill for spill in spills if spill[1].tier == tier], most):
                drops = self._descent.take_drops() if tier == DISK else ()
                yield self.flights.begin(DEVICE, tier, chunk, drops=drops)

    # --- invariants -----------------------------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that all books balance, given the block tables of all sequences."""
        self.pool.check([*tables, *([block] * count for block, count in self.flights.held.items())])
        self.flights.check()
        self.below.check()


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))
