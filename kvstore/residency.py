"""Where every block is: the one table of tiers, pins and copies in flight. Pure; the core alone changes it.

The device's books are `pool`, with sequences as holders; a copy that reads or writes a device block holds it too, so
a slot with a copy in flight is nobody else's (design §4.2). Below it are shelves: host, then disk; either may be off.

What keeps chains whole, so that a match reaches whatever is kept:
- a block goes down only when its parent is below the device already, or goes before it;
- on disk, a parent never leaves before its children (a restart leaves nothing but the disk);
- in the host, it does only when the disk has it.
After a failure orphans may stay: nobody finds them, and they are evicted in their turn, or their parent comes back.

Decisions leave as copies and drops, collected until `take()`. A copy's end comes back through `copied()`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Drop, Loss, Place, TierUp
from kvstore.device import DevicePool
from kvstore.shelf import Entry, Shelf, computing
from policies.eviction import EVICTIONS, MakeEviction
from policies.placement import Placement, write_through

T = TypeVar("T")

LOOKS = 64
"""Blocks that one eviction looks at, at most: each that must be written down first, or stay, is one."""

DISK_RETRY_SECONDS = 5.0
"""After a write to disk has failed, the host gives up blocks without waiting for the disk for so long."""

RELOAD_SHARE = 0.125
"""What a load from disk takes, beside computing as much. A guess: the books know no cost model."""

WRITES = 2
"""Transactions on their way to the disk's one writer: one it works on, one that waits."""


@dataclass(frozen=True, slots=True)
class ResidencyConfig:
    """Sizes in blocks; 0 turns a tier off."""

    host_blocks: int = 0
    disk_blocks: int = 0
    copy_blocks: int = 32  # most of one copy
    transaction_blocks: int = 8  # most of one write to disk
    spilling_blocks: int = 256  # most on their way down from the device at once
    queued_blocks: int = 4096  # most that wait for the disk
    pinned_share: float = 0.5  # of a tier, that waiting snapshots may keep from eviction


@dataclass(frozen=True, slots=True)
class InFlight:
    """A copy under way, with its ends: a device block by number, or an entry of a shelf."""

    copy: Copy
    sources: tuple[int | Entry, ...]
    targets: tuple[int | Entry, ...]


class Residency:
    def __init__(
        self,
        pool: DevicePool,
        config: ResidencyConfig,
        eviction: MakeEviction = EVICTIONS["lru"],
        placement: Placement = write_through,
    ) -> None:
        self.pool = pool
        self.config = config
        self._eviction = eviction
        self.host = Shelf(HOST, config.host_blocks, eviction(config.host_blocks), addressed=True)
        self.disk = Shelf(DISK, config.disk_blocks, eviction(config.disk_blocks), addressed=False)
        self.host.saving = self._host_saves
        self._shelves = {HOST: self.host, DISK: self.disk}
        self._loading: tuple[Shelf, float] | None = (
            None  # of a TierUp whose last part is not here yet; since when
        )
        self.host.up = config.host_blocks > 0
        self.disk.up = False  # until its index is known: TierUp
        self.dropped_blocks = 0  # not written down, as copies could not keep up or a tier had no room
        self._transaction_blocks = config.transaction_blocks
        self._placement = placement
        self._copies: dict[int, InFlight] = {}
        self._held: Counter[int] = Counter()  # device blocks that copies hold, how often
        self._spills: list[tuple[int, Entry]] = []  # held already, not yet told
        self._for_disk: dict[Key, Entry] = {}  # entries of the host that wait for the disk, oldest first
        self._spilling = 0
        self._writes = 0
        self._drops: list[Key] = []  # of the disk
        self._fetches: list[Copy] = []
        self._ids = 0
        self._disk_retry_at = float("-inf")
        self._failures = 0

    # --- look-ups: nothing changes --------------------------------------------------------------------------------

    def shelf(self, tier: str) -> Shelf:
        return self._shelves[tier]

    def find(self, keys: Sequence[Key], *, device_only: bool = False) -> list[int | Entry]:
        """The longest prefix of `keys` that tiers have: device blocks, then readable entries below, topmost first."""
        found: list[int | Entry] = list(self.pool.match(keys))
        if device_only or not self.keeps:
            return found
        for key in keys[len(found) :]:
            entry = self.host.readable(key) or self.disk.readable(key)
            if entry is None:
                break
            found.append(entry)
        return found

    def coming(self, key: Key) -> bool:
        """Whether a block that the device has not is on its way up into the host: worth waiting for."""
        entry = self.host.get(key)
        return entry is not None and entry.writing and key in self.disk

    def writing(self, key: Key) -> bool:
        """Whether the first copy of a block below the device is still being written."""
        entries = [entry for shelf in (self.host, self.disk) if (entry := shelf.get(key))]
        return bool(entries) and all(entry.writing for entry in entries)

    @property
    def shelves(self) -> tuple[Shelf, Shelf]:
        """The tiers below the device, the topmost first."""
        return self.host, self.disk

    def holders(self, block: int) -> int:
        """How many sequences hold a device block: copies are left out."""
        return self.pool.references(block) - self._held[block]

    def coming_up(self, block_bytes: int) -> dict[str, int]:
        """Bytes on their way to the device, or waiting for it, by the tier that they come from."""
        sizes: dict[str, int] = {}
        for flight in self._copies.values():
            copy = flight.copy
            if copy.target == DEVICE:
                sizes[copy.source] = sizes.get(copy.source, 0) + len(copy.sources) * block_bytes
        return sizes

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
        return self.config.spilling_blocks - self._spilling

    @property
    def keeps(self) -> bool:
        """Whether there is a tier below the device."""
        return self.host.up or self.disk.up

    @property
    def leaving(self) -> int:
        """Device blocks that are free as soon as copies have ended. Those of a tier that is down are not counted."""
        stuck = {
            end
            for flight in self._copies.values()
            if not all(
                tier == DEVICE or self.shelf(tier).up for tier in (flight.copy.source, flight.copy.target)
            )
            for end in (*flight.sources, *flight.targets)
        }
        return sum(
            1
            for block, count in self._held.items()
            if self.pool.references(block) == count and block not in stuck
        )

    @property
    def copying(self) -> int:
        """Copies under way."""
        return len(self._copies)

    @property
    def quiet(self) -> bool:
        """Whether nothing is on its way, nor waits for it."""
        return not (self._copies or self._spills or self._for_disk or self._drops or self._fetches)

    @property
    def pinned(self) -> int:
        """Blocks below the device that snapshots keep from eviction."""
        return self.host.pinned + self.disk.pinned

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
                self.dropped_blocks += 1
                break
            safe += 1
        return safe

    def _spill(self, block: int, place: Place, shelf: Shelf, now: float) -> bool:
        if self._spilling >= self.config.spilling_blocks or not self._below(place.parent):
            return False
        if (entry := self._admit(shelf, place, now)) is None:
            return False
        self._hold(block)
        self._spilling += 1
        self._spills.append((block, entry))
        return True

    def _below(self, key: Key) -> bool:
        """Whether a block is below the device or on its way there. The parent of all first blocks is."""
        return not key or key in self.host or key in self.disk

    def _hold(self, block: int) -> None:
        self.pool.hold((block,))
        self._held[block] += 1

    def _let_go(self, block: int) -> None:
        self.pool.release((block,))
        self._held[block] -= 1
        if not self._held[block]:
            del self._held[block]

    def pin(self, keys: Iterable[Key]) -> list[Entry]:
        """Keeps what is below the device of these from eviction, as far as `pinned_share` allows. See `unpin`."""
        pinned = []
        for key in keys:
            for shelf in (self.host, self.disk):
                entry = shelf.get(key)
                if entry and (entry.pins or shelf.pinned < self.config.pinned_share * shelf.capacity):
                    shelf.pin(entry)
                    pinned.append(entry)
                    break
        return pinned

    def unpin(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.shelf(entry.tier).unpin(entry)
            self._offer(entry.key)

    # --- up: fetches ----------------------------------------------------------------------------------------------

    def fetch(self, wanted: Sequence[tuple[Entry, int]], after: int) -> list[tuple[int, list[int]]]:
        """Starts copies of entries into device blocks, which the caller holds too. `after`: see Copy.

        Returns (copy, which of `wanted` it brings).
        """
        told = []
        for tier in (HOST, DISK):
            those = [index for index, (entry, _) in enumerate(wanted) if entry.tier == tier]
            for indices in _chunks(those, self.config.copy_blocks):
                entries = tuple(wanted[index][0] for index in indices)
                blocks = tuple(wanted[index][1] for index in indices)
                for entry, block in zip(entries, blocks, strict=True):
                    entry.readers += 1
                    self._hold(block)
                places = tuple(
                    Place(entry.key, block, entry.parent, entry.depth, entry.tokens)
                    for entry, block in zip(entries, blocks, strict=True)
                )
                copy = self._copy(tier, DEVICE, _places(entries), places, after=after)
                self._copies[copy.id] = InFlight(copy, entries, blocks)
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
            self.shelf(place.tier).touch(place, now)  # what it needs does not leave for the rest of it
        for place in found[: self.config.spilling_blocks]:
            if place.tier == HOST:
                continue
            place.readers += 1  # it must not be evicted for those that come after it
            target = None if place.key in self.host else self._admit(self.host, place.place, now)
            if target is None:
                self._read(place)
                break
            pairs.append((place, target))
        for chunk in _chunks(pairs, self.config.copy_blocks):
            sources, targets = tuple(source for source, _ in chunk), tuple(target for _, target in chunk)
            copy = self._copy(DISK, HOST, _places(sources), _places(targets))
            self._copies[copy.id] = InFlight(copy, sources, targets)
            self._fetches.append(copy)

    def hit(self, keys: Iterable[Key], now: float) -> None:
        """A sequence found these blocks, wherever: what is kept of them below counts as used."""
        if not self.keeps:
            return
        for key in keys:
            for shelf in (self.host, self.disk):
                if entry := shelf.get(key):
                    shelf.hit(entry, now)
            if (entry := self.host.readable(key)) and self._placement(entry, False):
                self._queue_for_disk(entry)

    # --- copies end -----------------------------------------------------------------------------------------------

    def copied(self, done: CopyDone, now: float) -> InFlight:
        """A copy has ended: its slots are free of it, what arrived is present, what is lost at its source is gone."""
        flight = self._copies.pop(done.id)
        copy, lost = flight.copy, dict(done.lost)
        self._failures += bool(lost)
        for index, source in enumerate(flight.sources):
            self._left(source, lost.get(index))
        for index, target in enumerate(flight.targets):
            self._arrived(target, index not in lost)
        self._spilling -= len(flight.sources) if copy.source == DEVICE else 0
        if copy.target == DISK:
            self._writes -= copy.source == HOST
            self._written_down(flight, lost, now)
        return flight

    def _left(self, source: int | Entry, loss: Loss | None) -> None:
        if isinstance(source, int):
            self._let_go(source)
            return
        self._read(source)
        if loss is not None:
            self.forget(source)  # whatever the reason, or it would be tried again and again

    def _read(self, entry: Entry) -> None:
        self.shelf(entry.tier).read(entry)
        self._offer(entry.key)

    def _arrived(self, target: int | Entry, whole: bool) -> None:
        if isinstance(target, int):
            self._let_go(target)
            return
        self.shelf(target.tier).written(target)
        if not whole:
            self._remove(target)
            return
        self._offer(target.key)
        if target.tier == HOST and not target.doomed and self._placement(target, False):
            self._queue_for_disk(target)

    def _written_down(self, flight: InFlight, lost: dict[int, Loss], now: float) -> None:
        """A transaction that failed has dropped nothing either."""
        if lost:
            self._disk_retry_at = now + DISK_RETRY_SECONDS
            self.dropped_blocks += len(lost)
            self._drops += [*flight.copy.drops, *(flight.copy.targets[index].key for index in lost)]

    def discard(self, key: Key) -> None:
        """Drops a block from all tiers below the device, but for those where somebody else's snapshot needs it."""
        for shelf in (self.host, self.disk):
            if (entry := shelf.get(key)) and not entry.pins:
                self.forget(entry)

    def forget(self, entry: Entry) -> None:
        """Drops a block from its tier, now or when its copies have ended."""
        if entry.tier == DISK and not entry.doomed:
            self._drops.append(entry.key)
        self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        if entry.tier == HOST:
            self._for_disk.pop(entry.key, None)
        self.shelf(entry.tier).remove(entry)
        self._offer(entry.key)
        self._offer(entry.parent)

    # --- room -----------------------------------------------------------------------------------------------------

    def _admit(self, shelf: Shelf, place: Place, now: float, drops: list[Key] | None = None) -> Entry | None:
        """A new entry, being written; None when nothing may leave for it. On disk `drops` gets what leaves."""
        if not shelf.room:
            victim = self._victim(shelf, now, keep=place.parent)
            if victim is None:
                return None
            self._remove(victim)
            if shelf is self.disk:
                (self._drops if drops is None else drops).append(victim.key)
        return shelf.add(place, now) if shelf.room else None

    def _victim(self, shelf: Shelf, now: float, keep: Key = b"") -> Entry | None:
        """Who leaves, but for `keep`. What the placement wants on disk first is sent there, and passed over."""
        victim = None
        for _ in range(LOOKS):
            entry = shelf.pop_candidate(now)
            if entry is None:
                break
            if not self._may_leave(entry) or entry.key == keep:
                continue  # offered again when its child has left
            if shelf is self.host and self._owed_to_disk(entry, now):
                continue  # offered again when it is written
            victim = entry
            break
        self._offer(keep)
        return victim

    def _owed_to_disk(self, entry: Entry, now: float) -> bool:
        """Whether a block of the host waits for the disk, or is to: there it goes then, if the disk takes any."""
        if self.disk.readable(entry.key) or not self._disk_takes(now) or not self._placement(entry, True):
            return False
        return self._queue_for_disk(entry)

    def _disk_takes(self, now: float) -> bool:
        return self.disk.up and now >= self._disk_retry_at

    def _host_saves(self, entry: Entry) -> float:
        """In the unit of `computing`: of a block that the disk has, the host saves no more than the load."""
        on_disk = self.disk.readable(entry.key) is not None
        return computing(entry) * (RELOAD_SHARE if on_disk else 1.0)

    def _may_leave(self, entry: Entry) -> bool:
        children = self.host.children(entry.key)
        if entry.tier == HOST:
            return not children or self.disk.readable(entry.key) is not None
        return not self.disk.children(entry.key) and (
            not children or self.host.readable(entry.key) is not None
        )

    def _offer(self, key: Key) -> None:
        """Something that may have kept a block in its tiers has changed."""
        for shelf in (self.host, self.disk):
            entry = shelf.get(key)
            if entry is not None and self._may_leave(entry):
                shelf.offer(entry)

    # --- host to disk ---------------------------------------------------------------------------------------------

    def _queue_for_disk(self, entry: Entry) -> bool:
        """False when there is no disk or its queue is full: the block stays where it is, for now."""
        if entry.key in self._for_disk or entry.key in self.disk:
            return True
        if not self.disk.up or len(self._for_disk) >= self.config.queued_blocks:
            self.dropped_blocks += self.disk.up
            return False
        self._for_disk[entry.key] = entry
        return True

    def _write_down(self, now: float) -> Iterable[Copy]:
        """The next transactions, while the writer has less than it can do."""
        while self._for_disk and self._writes < WRITES:
            pairs, drops = self._transaction(now)
            if not pairs:
                self._drops += drops
                continue
            sources, targets = tuple(source for source, _ in pairs), tuple(target for _, target in pairs)
            copy = self._copy(HOST, DISK, _places(sources), _places(targets), drops=tuple(drops))
            self._copies[copy.id] = InFlight(copy, sources, targets)
            self._writes += 1
            yield copy

    def _transaction(self, now: float) -> tuple[list[tuple[Entry, Entry]], list[Key]]:
        """Blocks for one transaction, parents before children, and what leaves the disk for them."""
        pairs: list[tuple[Entry, Entry]] = []
        drops, self._drops = self._drops, []
        while self._for_disk and len(pairs) < self._transaction_blocks:
            key, entry = next(iter(self._for_disk.items()))
            missing = self._not_on_disk(entry)[: self._transaction_blocks - len(pairs)]
            if not missing or not all(self._start_write(source, pairs, drops, now) for source in missing):
                self._for_disk.pop(key)
                self.dropped_blocks += bool(missing)
                self._offer(key)
        return pairs, drops

    def _not_on_disk(self, entry: Entry) -> list[Entry]:
        """The entry and its ancestors that the disk lacks, the first of the chain first; [] if one is nowhere."""
        missing: list[Entry] = []
        current: Entry | None = entry
        while current is not None and current.key not in self.disk:
            if current.writing or current.doomed:
                return []
            missing.append(current)
            if not current.parent or current.parent in self.disk:
                return missing[::-1]
            current = self.host.get(current.parent)
        return []

    def _start_write(
        self, source: Entry, pairs: list[tuple[Entry, Entry]], drops: list[Key], now: float
    ) -> bool:
        """Adds one block, whose parent the disk has or is about to have, to a transaction."""
        source.readers += 1
        target = self._admit(self.disk, source.place, now, drops)
        if target is None:
            self._read(source)
            return False
        target.hits, target.past = source.hits, source.past  # both tiers have the same policy
        self._for_disk.pop(source.key, None)
        pairs.append((source, target))
        return True

    # --- tiers and operators --------------------------------------------------------------------------------------

    def use(self, eviction: MakeEviction, placement: Placement) -> None:
        """Others decide from now on. The same eviction policy as before keeps what it has learned."""
        self._placement = placement
        if eviction is self._eviction:
            return
        self._eviction = eviction
        for shelf in (*self.shelves, *([self._loading[0]] if self._loading else [])):
            shelf.use(eviction(shelf.capacity))

    def tier_down(self, tier: str) -> list[int]:
        """A tier is out of use: nothing is found in it. Returns the copies that still touch it."""
        shelf = self.shelf(tier)
        shelf.up = False
        self._failures += 1
        self._loading = None
        waiting, self._for_disk = self._for_disk, {}
        for entry in shelf.entries():
            self._remove(entry)
        for key in waiting:
            self._offer(key)
        self._drops.clear()
        return [id for id, flight in self._copies.items() if tier in (flight.copy.source, flight.copy.target)]

    def tier_up(self, up: TierUp, now: float) -> None:
        """A tier that is not memory is in use, with what it holds: once all parts of that have come."""
        shelf, began = self._loading or (self._empty_disk(up), now)
        self._loading = (shelf, began) if up.more else None
        room = shelf.room
        shelf.load(up.records[:room], began)
        self._drops += [place.key for place in up.records[room:]]
        if up.more:
            return
        assert not self._touched(DISK), "a tier is opened when nothing touches it any more"
        self.disk = self._shelves[DISK] = shelf
        shelf.up = True
        self._transaction_blocks = up.transaction_blocks or self.config.transaction_blocks
        self._disk_retry_at = float("-inf")

    def _empty_disk(self, up: TierUp) -> Shelf:
        """A shelf that nobody knows yet, for what a disk holds."""
        assert up.tier == DISK
        capacity = self.disk.capacity if up.capacity_blocks is None else up.capacity_blocks
        return Shelf(DISK, capacity, self._eviction(capacity), addressed=False)

    def prune(self, tier: str, blocks: int, now: float) -> int:
        """Evicts by the policy until a tier has `blocks` or nothing more may leave; returns how many left."""
        shelf, before = self.shelf(tier), len(self.shelf(tier))
        while len(shelf) > blocks and (entry := self._victim(shelf, now)):
            self.forget(entry)
        return before - len(shelf)

    def damaged(self, tier: str, keys: Iterable[Key]) -> None:
        """Drops blocks that cannot be read. Their children stay, unfound, until these come back or they are evicted."""
        for key in keys:
            if entry := self.shelf(tier).get(key):
                self._failures += 1
                self.forget(entry)

    def clear(self, tier: str) -> int:
        """Forgets all that no copy touches and no snapshot relies on, children first; returns how many."""
        before = len(self.shelf(tier))
        for entry in sorted(self.shelf(tier).entries(), key=lambda entry: -entry.depth):
            if entry.settled and self._may_leave(entry):
                self.forget(entry)
        return before - len(self.shelf(tier))

    # --- what is to be done ---------------------------------------------------------------------------------------

    def take(self, now: float) -> list[Copy | Drop]:
        """What has been decided since the last call, in the order in which it must be carried out."""
        if self.quiet:
            return []
        told: list[Copy | Drop] = [*self._fetches, *self._spill_copies(), *self._write_down(now)]
        self._fetches = []
        if self._drops:
            told.append(Drop(DISK, tuple(self._drops)))
            self._drops = []
        return told

    def _spill_copies(self) -> Iterable[Copy]:
        spills, self._spills = self._spills, []
        for tier, most in ((HOST, self.config.copy_blocks), (DISK, self._transaction_blocks)):
            for chunk in _chunks([spill for spill in spills if spill[1].tier == tier], most):
                blocks, entries = tuple(block for block, _ in chunk), tuple(entry for _, entry in chunk)
                sources = tuple(
                    Place(entry.key, block, entry.parent, entry.depth, entry.tokens) for block, entry in chunk
                )
                drops = tuple(self._drops) if tier == DISK else ()
                self._drops = [] if tier == DISK else self._drops
                copy = self._copy(DEVICE, tier, sources, _places(entries), drops=drops)
                self._copies[copy.id] = InFlight(copy, blocks, entries)
                yield copy

    def _copy(
        self,
        source: str,
        target: str,
        sources: tuple[Place, ...],
        targets: tuple[Place, ...],
        *,
        drops: tuple[Key, ...] = (),
        after: int = 0,
    ) -> Copy:
        self._ids += 1
        return Copy(self._ids, source, target, sources, targets, drops, after)

    # --- invariants -----------------------------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that all books balance, given the block tables of all sequences."""
        holders = [*tables, *([block] * count for block, count in self._held.items())]
        self.pool.check(holders)
        self._check_copies()
        for shelf in (self.host, self.disk):
            doomed = {entry for entry in self._touched(shelf.name) if entry.doomed}
            shelf.check([entry.slot for entry in doomed])
        if not self._failures:
            self._check_chains()

    def _touched(self, tier: str) -> list[Entry]:
        ends = [end for flight in self._copies.values() for end in (*flight.sources, *flight.targets)]
        ends += [entry for _, entry in self._spills]
        return [end for end in ends if isinstance(end, Entry) and end.tier == tier]

    def _check_copies(self) -> None:
        reading = Counter(s for f in self._copies.values() for s in f.sources if isinstance(s, Entry))
        writing = Counter(t for f in self._copies.values() for t in f.targets if isinstance(t, Entry))
        writing.update(entry for _, entry in self._spills)
        entries = [*self.host.entries(), *self.disk.entries()]
        for entry in {*entries, *reading, *writing}:
            assert entry.readers == reading[entry], f"{entry}: readers and copies differ"
            assert entry.writing == (writing[entry] == 1), f"{entry}: written by {writing[entry]} copies"
            assert entry.pins >= 0
        held = Counter(block for block, _ in self._spills)
        for flight in self._copies.values():
            held.update(end for end in (*flight.sources, *flight.targets) if isinstance(end, int))
        assert held == self._held, "copies and held blocks differ"

    def _check_chains(self) -> None:
        for entry in self.disk.entries():
            assert not entry.parent or entry.parent in self.disk, "a parent left the disk before its child"
        for entry in self.host.entries():
            assert self._below(entry.parent), "a parent left its last tier before its child"


def _places(entries: Iterable[Entry]) -> tuple[Place, ...]:
    return tuple(entry.place for entry in entries)


def _chunks(items: Sequence[T], size: int) -> Iterable[list[T]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))
