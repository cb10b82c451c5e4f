"""The books of one tier below the device: which block is in which slot, in what state, and who may leave.

Bytes are elsewhere (tier.py); what crosses tiers is residency.py's. Pure.

An entry is *busy* while a copy writes or reads it: its slot is then nobody else's. Entries that may leave are
candidates.py's, by the eviction policy. One that may not is found out when its turn comes, and is no candidate then;
`offer` makes it one when its last hindrance is gone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kvstore.block import Key
from kvstore.candidates import Candidates
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
    partial: bool = False
    saves_seconds: float = 1.0
    past: int = 0
    ticket: int = 0  # among those that may leave; 0: it is not

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

    @property
    def queued(self) -> bool:
        return self.ticket > 0


def computing(entry: Entry) -> float:
    """What computing it takes, in no unit, as what counts is how blocks compare: its tokens.

    Attention to what is before it is left out: reckoned in, the tier finds fewer tokens again (docs/benchmarks_kv.md).
    """
    return float(max(1, entry.tokens))


class Shelf:
    """`capacity` blocks; `addressed` when the tier is memory, with slots 0 … capacity - 1."""

    def __init__(self, name: str, capacity: int, eviction: Eviction, *, addressed: bool) -> None:
        self.name = name
        self.capacity = capacity
        self.addressed = addressed
        self.up = True
        self.pinned = 0  # entries with pins
        self._block_tokens = 0  # the most that any block here had: one with fewer is a tail
        self.saving: Callable[[Entry], float] = computing
        self._eviction = eviction
        self._candidates: Candidates[Entry] = Candidates(eviction)
        self._entries: dict[Key, Entry] = {}
        self._children: dict[Key, int] = {}  # entries here, by their parent's key
        self._free = list(range(capacity - 1, -1, -1)) if addressed else []
        self._doomed = (
            0  # doomed entries whose copies have not ended: not found, but their room is still taken
        )

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

    def add(self, place: Place, now: float, *, known: bool = False) -> Entry:
        """Takes a block in, as WRITING. There must be room, and it must not be here. `known`: not for a use."""
        assert self.room > 0, f"{self.name} is full"
        assert place.key not in self._entries, f"{self.name} has this block"
        slot = self._free.pop() if self.addressed else -1
        entry = Entry(self.name, place.key, place.parent, place.depth, place.tokens, slot, now)
        self._block_tokens = max(self._block_tokens, place.tokens)
        entry.partial = place.tokens < self._block_tokens
        entry.past = self._eviction.adopted(entry) if known else self._eviction.added(entry, now)
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
        self._candidates.withdraw(entry)
        self._eviction.left(entry)
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
        entries = [self.add(place, now, known=True) for place in records]
        for entry in entries:
            entry.writing = False
        for entry in entries:
            if not self.children(entry.key):
                self.offer(entry)

    # --- use ------------------------------------------------------------------------------------------------------

    def hit(self, entry: Entry, now: float) -> None:
        """A sequence found it."""
        entry.past = self._eviction.hit(entry, now)
        entry.hits += 1
        self.touch(entry, now)

    def touch(self, entry: Entry, now: float) -> None:
        """It counts as used just now, but not as found again: whoever keeps it does so for a use that counts."""
        entry.used = now
        if entry.queued:
            self._candidates.put(entry)

    def use(self, eviction: Eviction) -> None:
        """Another policy from now on. O(n log n): all who may leave are sorted anew."""
        queued = [entry for entry in self._entries.values() if entry.queued]
        self._eviction, self._candidates = eviction, Candidates(eviction)
        for entry in self._entries.values():
            entry.past, entry.ticket = eviction.adopted(entry), 0
        for entry in queued:
            self._candidates.put(entry)

    # --- who may leave --------------------------------------------------------------------------------------------

    def offer(self, entry: Entry | None) -> None:
        """Makes an entry one of those that may leave. The caller says so: it knows the other tiers.

        Again for one that is: what it saves may have changed.
        """
        if entry is None or entry.doomed or not entry.settled:
            return
        saves = self.saving(entry)
        if not entry.queued or saves != entry.saves_seconds:
            entry.saves_seconds = saves
            self._candidates.put(entry)

    def pop_candidate(self, now: float) -> Entry | None:
        """The first that may leave by the policy, not a candidate any more: remove it, or offer it again later."""
        while (entry := self._candidates.pop(now)) is not None:
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
        self._candidates.check()
        assert len(self._candidates) == sum(entry.queued for entry in self._entries.values())
