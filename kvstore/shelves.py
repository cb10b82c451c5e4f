"""The shelves below the device, seen together: host, then disk. What keeps chains whole is decided here. Pure.

A match reaches whatever is kept, as
- a block goes down only when its parent is below the device already, or goes before it (residency.py);
- on disk, a parent never leaves before its children (a restart leaves nothing but the disk);
- in the host, it does only when the disk has it.
After a failure orphans may stay: nobody finds them, and they are evicted in their turn, or their parent comes back.

The books of one shelf are shelf.py's; what goes from one to the other, and out, is descent.py's.
"""

from collections.abc import Callable, Iterator

from kvstore.block import Key
from kvstore.copies import DISK, HOST, TierUp
from kvstore.shelf import Entry, Shelf, computing
from policies.eviction import MakeEviction

LOOKS = 64
"""Blocks that one eviction looks at, at most: each that must be written down first, or stay, is one."""

RELOAD_SHARE = 0.125
"""What a load from disk takes, beside computing as much. A guess: the books know no cost model."""


class Shelves:
    """Capacities in blocks; 0 turns a tier off. The disk is off until its index is known: `load`."""

    def __init__(self, host_blocks: int, disk_blocks: int, eviction: MakeEviction) -> None:
        self._eviction = eviction
        self.host = Shelf(HOST, host_blocks, eviction(host_blocks), addressed=True)
        self.disk = Shelf(DISK, disk_blocks, eviction(disk_blocks), addressed=False)
        self.host.saving = self._host_saves
        self.host.up = host_blocks > 0
        self.disk.up = False
        # of a TierUp whose last part is not here yet; since when
        self._loading: tuple[Shelf, float] | None = None

    def __iter__(self) -> Iterator[Shelf]:
        """The topmost first."""
        return iter((self.host, self.disk))

    def __contains__(self, key: Key) -> bool:
        """Whether a block is below the device, or on its way there."""
        return key in self.host or key in self.disk

    def named(self, tier: str) -> Shelf:
        if tier == HOST:
            return self.host
        assert tier == DISK, f"{tier} is no tier below the device"
        return self.disk

    def having(self, key: Key) -> list[Entry]:
        """The block's entries, being written or not."""
        return [entry for shelf in self for entry in (shelf.get(key),) if entry is not None]

    # --- who may leave --------------------------------------------------------------------------------------------

    def may_leave(self, entry: Entry) -> bool:
        children = self.host.children(entry.key)
        if entry.tier == HOST:
            return not children or self.disk.readable(entry.key) is not None
        return not self.disk.children(entry.key) and (
            not children or self.host.readable(entry.key) is not None
        )

    def offer(self, key: Key) -> None:
        """Something that may have kept a block in its tiers has changed."""
        for shelf in (self.host, self.disk):
            entry = shelf.get(key)
            if entry is not None and self.may_leave(entry):
                shelf.offer(entry)

    def next_to_leave(
        self, shelf: Shelf, now: float, keep: Key, owed: Callable[[Entry, float], bool]
    ) -> Entry | None:
        """Whom the policy names, but for `keep`. Who is `owed` to the disk at time `now` is passed over."""
        victim = None
        for _ in range(LOOKS):
            entry = shelf.pop_candidate(now)
            if entry is None:
                break
            if not self.may_leave(entry) or entry.key == keep:
                continue  # offered again when its child has left
            if owed(entry, now):
                continue  # offered again when it is written
            victim = entry
            break
        self.offer(keep)
        return victim

    def remove(self, entry: Entry) -> None:
        """Nobody finds it any more."""
        self.named(entry.tier).remove(entry)
        self.offer(entry.key)
        self.offer(entry.parent)

    def read(self, entry: Entry) -> None:
        """A copy from it has ended."""
        self.named(entry.tier).read(entry)
        self.offer(entry.key)

    def _host_saves(self, entry: Entry) -> float:
        """In the unit of `computing`: of a block that the disk has, the host saves no more than the load."""
        on_disk = self.disk.readable(entry.key) is not None
        return computing(entry) * (RELOAD_SHARE if on_disk else 1.0)

    # --- policies and tiers change --------------------------------------------------------------------------------

    def use(self, eviction: MakeEviction) -> None:
        """Another decides from now on. The same one as before keeps what it has learned."""
        if eviction is self._eviction:
            return
        self._eviction = eviction
        for shelf in (*self, *([self._loading[0]] if self._loading else [])):
            shelf.use(eviction(shelf.capacity))

    def down(self, tier: str) -> Shelf:
        """A tier is out of use, but not emptied yet. A disk half loaded is forgotten."""
        shelf = self.named(tier)
        shelf.up = False
        self._loading = None
        return shelf

    def load(self, up: TierUp, now: float) -> list[Key]:
        """What a disk holds, or a part: nobody finds it before the last one is here. Returns what has no room."""
        shelf, began = self._loading or (self._empty_disk(up), now)
        self._loading = (shelf, began) if up.more else None
        room = shelf.room
        shelf.load(up.records[:room], began)
        if not up.more:
            self.disk = shelf
            shelf.up = True
        return [place.key for place in up.records[room:]]

    def _empty_disk(self, up: TierUp) -> Shelf:
        """A shelf that nobody knows yet, for what a disk holds."""
        assert up.tier == DISK
        capacity = self.disk.capacity if up.capacity_blocks is None else up.capacity_blocks
        return Shelf(DISK, capacity, self._eviction(capacity), addressed=False)

    # --- invariants -----------------------------------------------------------------------------------------------

    def check_chains(self) -> None:
        """Asserts that no parent has left before its child, which is so as long as nothing has failed."""
        for entry in self.disk.entries():
            assert not entry.parent or entry.parent in self.disk, "a parent left the disk before its child"
        for entry in self.host.entries():
            assert not entry.parent or entry.parent in self, "a parent left its last tier before its child"
