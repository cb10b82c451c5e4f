"""The books of one tier below the device: which block is in which slot, in what state, and who may leave.

Bytes are elsewhere (tier.py); what crosses tiers is residency.py's. Pure.

An entry is *busy* while a copy writes or reads it: its slot is then nobody else's. Entries that may leave stand in a
heap by the eviction policy's score, once each; a score only grows, so one that has changed is put back when it comes
up. An entry that may not leave is not in the heap; `offer` puts it back when its last hindrance is gone.
"""

from dataclasses import dataclass
from enum import StrEnum
from heapq import heapify, heappop, heappush

from kvstore.block import Key
from kvstore.copies import Place
from policies.eviction import Eviction


class State(StrEnum):
    WRITING = "writing"  # a copy fills it: nobody may read it
    PRESENT = "present"
    READING = "reading"  # present, and copies read it: it may not leave


@dataclass(slots=True, eq=False)
class Entry:
    """A block in one tier. Implements policies.views.BlockView."""

    tier: str
    key: Key
    parent: Key  # b"": it is the first of its chain
    depth: int
    tokens: int
    slot: int  # -1 where the tier is not memory
    used: float
    hits: int = 0
    writing: bool = True
    doomed: bool = False  # it leaves when its copies have ended; nobody finds it
    readers: int = 0
    pins: int = 0  # snapshots that rely on it
    queued: bool = False  # in the heap

    @property
    def state(self) -> State:
        if self.writing:
            return State.WRITING
        return State.READING if self.readers else State.PRESENT

    @property
    def place(self) -> Place:
        """Where it is, for the store."""
        return Place(self.key, self.slot, self.parent, self.depth, self.tokens)

    @property
    def settled(self) -> bool:
        """No copy touches it and no snapshot relies on it."""
        return not (self.writing or self.readers or self.pins)


class Shelf:
    """`capacity` blocks; `addressed` when the tier is memory, with slots 0 … capacity - 1."""

    def __init__(self, name: str, capacity: int, eviction: Eviction, *, addressed: bool) -> None:
        self.name = name
        self.capacity = capacity
        self.addressed = addressed
        self.up = True
        self.pinned = 0  # entries with pins
        self._eviction = eviction
        self._entries: dict[Key, Entry] = {}
        self._children: dict[Key, int] = {}  # entries here, by their parent's key
        self._free = list(range(capacity - 1, -1, -1)) if addressed else []
        self._doomed = (
            0  # doomed entries whose copies have not ended: not found, but their room is still taken
        )
        self._heap: list[tuple[tuple[float, ...], int, Entry]] = []
        self._serial = 0

    # --- what is here ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        """Whether the block is here or on its way in."""
        return key in self._entries

    def get(self, key: Key) -> Entry | None:
        """The entry, being written or not."""
        return self._entries.get(key)

    def readable(self, key: Key) -> Entry | None:
        entry = self._entries.get(key)
        return None if entry is None or entry.writing else entry

    def children(self, key: Key) -> int:
        """How many entries here have this parent."""
        return self._children.get(key, 0)

    @property
    def room(self) -> int:
        """Blocks that could be added now."""
        return self.capacity - len(self._entries) - self._doomed

    # --- coming and going -----------------------------------------------------------------------------------------

    def add(self, place: Place, now: float) -> Entry:
        """Takes a block in, as WRITING. There must be room, and it must not be here."""
        assert self.room > 0, f"{self.name} is full"
        assert place.key not in self._entries, f"{self.name} has this block"
        slot = self._free.pop() if self.addressed else -1
        entry = Entry(self.name, place.key, place.parent, place.depth, place.tokens, slot, now)
        self._entries[entry.key] = entry
        if entry.parent:
            self._children[entry.parent] = self._children.get(entry.parent, 0) + 1
        return entry

    def remove(self, entry: Entry) -> None:
        """Forgets an entry; its slot is free at once, or when its last copy has ended (`written`, `read`)."""
        if self._entries.get(entry.key) is not entry:
            return
        del self._entries[entry.key]
        if entry.parent:
            self._children[entry.parent] -= 1
            if not self._children[entry.parent]:
                del self._children[entry.parent]
        self.pinned -= entry.pins > 0
        entry.doomed, entry.pins = True, 0
        self._doomed += 1
        self._free_doomed(entry)

    def _free_doomed(self, entry: Entry) -> None:
        if not (entry.writing or entry.readers):
            self._doomed -= 1
            if self.addressed:
                self._free.append(entry.slot)

    def written(self, entry: Entry) -> None:
        """The copy that filled it has ended well: it is PRESENT."""
        assert entry.writing
        entry.writing = False
        if entry.doomed:
            self._free_doomed(entry)

    def read(self, entry: Entry) -> None:
        """A copy from it has ended."""
        assert entry.readers > 0
        entry.readers -= 1
        if entry.doomed:
            self._free_doomed(entry)

    def pin(self, entry: Entry) -> None:
        entry.pins += 1
        self.pinned += entry.pins == 1

    def unpin(self, entry: Entry) -> None:
        """Nothing, if the entry is gone."""
        if not entry.doomed:
            assert entry.pins > 0
            entry.pins -= 1
            self.pinned -= entry.pins == 0

    def load(self, records: tuple[Place, ...], now: float) -> None:
        """Takes in what a tier that is not memory holds already, or a part of it: a parent with its child, or before.

        All parts come at the same `now`, so that children leave before their parents, wherever they were parted.
        """
        assert not self.addressed
        entries = [self.add(place, now) for place in records]
        for entry in entries:
            entry.writing = False
        for entry in entries:
            if not self.children(entry.key):
                self.offer(entry)

    # --- who may leave --------------------------------------------------------------------------------------------

    def offer(self, entry: Entry | None) -> None:
        """Puts an entry back among those that may leave. The caller says so: it knows the other tiers."""
        if entry is None or entry.queued or entry.doomed or not entry.settled:
            return
        if len(self._heap) > 2 * len(self._entries) + 64:  # most of it is gone
            self._heap = [item for item in self._heap if not item[-1].doomed]
            heapify(self._heap)
        heappush(self._heap, self._item(entry))

    def _item(self, entry: Entry) -> tuple[tuple[float, ...], int, Entry]:
        entry.queued = True
        self._serial += 1
        return (self._eviction(entry), self._serial, entry)

    def pop_candidate(self) -> Entry | None:
        """The first that may leave by the policy, taken out of the heap: remove it, or offer it again later."""
        while self._heap:
            score, serial, entry = heappop(self._heap)
            if entry.doomed:
                continue
            current = self._eviction(entry)
            if current != score:
                heappush(self._heap, (current, serial, entry))
                continue
            entry.queued = False
            if entry.settled:
                return entry
        return None

    # --- invariants -----------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def check(self, busy_slots: list[int]) -> None:
        """Asserts that the books balance. `busy_slots`: of doomed entries, which copies still touch."""
        assert len(self._entries) + self._doomed <= self.capacity, f"{self.name} is over its quota"
        if self.addressed:
            taken = [entry.slot for entry in self._entries.values()]
            assert sorted(taken + self._free + busy_slots) == list(range(self.capacity)), (
                f"a slot of {self.name} is lost or shared"
            )
        assert self.pinned == sum(entry.pins > 0 for entry in self._entries.values())
        counted: dict[Key, int] = {}
        for key, entry in self._entries.items():
            assert entry.key == key
            assert not entry.doomed
            if entry.parent:
                counted[entry.parent] = counted.get(entry.parent, 0) + 1
        assert counted == self._children, f"{self.name}: children are counted wrongly"
        queued = [entry for _, _, entry in self._heap if not entry.doomed]
        assert len(queued) == len(set(queued)), "an entry is queued twice"
        assert all(entry.queued for entry in queued)
