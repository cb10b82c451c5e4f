"""Who has a place: the runner's slots, the running and the loading, their device blocks, and the keys under way.

A place is a slot and a block table. Who gets one, and who gives one up, is decided elsewhere (scheduler.py, intake.py).
"""

from engine.resumption import Match
from engine.sequence import Sequence, State
from kvstore.block import Key
from kvstore.device import DevicePool


class Places:
    def __init__(self, blocks: int, max_sequences: int, block_size: int) -> None:
        self.pool = DevicePool(blocks)
        self.running: list[Sequence] = []
        self.loading: list[Sequence] = []  # blocks and slot reserved, fetches under way or just over
        self.computing: dict[Key, Sequence] = {}  # who is about to cache which block on the device
        self.block_size = block_size
        self._max_sequences = max_sequences
        self._slots = list(range(max_sequences - 1, -1, -1))

    @property
    def taken(self) -> list[Sequence]:
        return [*self.running, *self.loading]

    @property
    def slots_left(self) -> int:
        return len(self._slots)

    # --- room -----------------------------------------------------------------------------------------------------

    def known_blocks(self, sequence: Sequence) -> int:
        """Blocks that all its known tokens need."""
        return -(-len(sequence.tokens) // self.block_size)

    def missing_blocks(self, sequence: Sequence, count: int) -> int:
        """Blocks that a running sequence lacks for its next `count` positions."""
        missing = -(-(sequence.scheduled + count) // self.block_size) - len(sequence.table)
        return missing if missing > 0 else 0

    def fits(self, sequence: Sequence, match: Match, soon: int = 0) -> bool:
        """Whether a waiter has room for all it knows; one block is left for those who run.

        `soon`: blocks that will be free in a moment.
        """
        found = match.device_blocks
        idle = sum(not self.pool.references(block) for block in found)
        wanted = self.known_blocks(sequence) - len(found) + idle
        return wanted + bool(self.running or self.loading) <= self.pool.available + soon

    def grow(self, sequence: Sequence, count: int) -> None:
        """Blocks for its next `count` positions; they must be available."""
        if missing := self.missing_blocks(sequence, count):
            sequence.table += self.pool.allocate(missing)

    # --- coming and going -----------------------------------------------------------------------------------------

    def take(self, sequence: Sequence, match: Match) -> None:
        """A slot, what the device has of it, and fresh blocks for the rest: it fits."""
        held = match.device_blocks
        self.pool.hold(held)
        fresh = iter(self.pool.allocate(self.known_blocks(sequence) - len(held)))
        sequence.table = [found if isinstance(found, int) else next(fresh) for found in match.blocks]
        sequence.table += fresh
        sequence.slot = self._slots.pop()

    def leave(self, sequence: Sequence) -> None:
        """It gives up its place, running or loading. Its state is the caller's to change."""
        self.no_longer_computing(sequence, *sequence.keys[sequence.published :])
        self.pool.release(sequence.table)
        self._slots.append(sequence.slot)
        (self.loading if sequence in self.loading else self.running).remove(sequence)
        sequence.lose_place()

    # --- blocks that fill -----------------------------------------------------------------------------------------

    def announce(self, sequence: Sequence, first: int) -> None:
        """Its blocks from `first` on are under way: others wait for them rather than compute them too."""
        for key in sequence.keys[first:]:
            self.computing.setdefault(key, sequence)

    def no_longer_computing(self, sequence: Sequence, *keys: Key) -> None:
        for key in keys:
            if self.computing.get(key) is sequence:
                del self.computing[key]

    def cache(self, sequence: Sequence, index: int) -> None:
        """A block of its table is whole: it is cached, or gives way to an equal one that is already."""
        key = sequence.keys[index]
        parent = sequence.keys[index - 1] if index else b""
        block = self.pool.publish(sequence.table[index], key, parent)
        if block != sequence.table[index]:
            sequence.table[index] = block
            sequence.told = min(sequence.told, index)
        self.no_longer_computing(sequence, key)

    def check(self) -> None:
        """Asserts that sequences, slots and positions agree. (Blocks: Residency.check.)"""
        slots = [sequence.slot for sequence in self.taken]
        assert sorted(slots + self._slots) == list(range(self._max_sequences)), "a slot is lost or shared"
        for sequence in self.running:
            assert sequence.state is State.RUNNING
            assert sequence.computed <= sequence.scheduled <= len(sequence.tokens) + sequence.pending
            assert sequence.scheduled <= len(sequence.table) * self.block_size
            assert not sequence.head_end or sequence.scheduled <= sequence.head_end
        assert all(sequence.state is State.LOADING for sequence in self.loading)
        taken = self.taken
        assert all(owner in taken for owner in self.computing.values()), "a key is announced by nobody"
