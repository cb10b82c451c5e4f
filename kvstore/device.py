"""The device pool's books: who holds which block, which blocks are cached, which are free.

A block is *held* by sequences (reference count), or *idle*: cached under its key and kept until its room is
needed, or *free*. The bytes are the runner's; here are only numbers, so this is pure and cheap to test.

Whoever holds a keyed block holds its parents too (block tables are prefixes), and tables are released from the
tail, so idle blocks leave child before parent: no block stays cached that a prefix match cannot reach.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from kvstore.block import Key


class DevicePool:
    """`blocks` blocks, numbered from 0. Not thread-safe: the core alone changes it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._references = [0] * blocks
        self._key_of: dict[int, Key] = {}
        self._block_of: dict[Key, int] = {}
        self._parent_of: dict[Key, Key] = {}
        self._children: Counter[Key] = Counter()  # cached ones
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # the demoted first, then the least recently released

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks some sequence holds."""
        return self.blocks - self.available

    @property
    def idle(self) -> int:
        """Blocks nobody holds that are kept for a prefix match."""
        return len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that a prefix match can find, held or idle."""
        return len(self._key_of)

    def match(self, keys: Sequence[Key]) -> list[int]:
        """The blocks of the longest cached prefix of `keys`. Changes nothing: `hold` them before the next call."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def block_of(self, key: Key) -> int | None:
        """The block cached under `key`, if there is one."""
        return self._block_of.get(key)

    def references(self, block: int) -> int:
        """How many hold it."""
        return self._references[block]

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these cached or held blocks."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content, held once each; idle ones give way, those demoted first."""
        assert count <= self.available, f"{count} blocks asked, {self.available} available"
        while len(self._free) < count:
            self._evict()
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        key = self._key_of.pop(block)
        del self._block_of[key]
        parent = self._parent_of.pop(key)
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
        self._free.append(block)

    def release(self, table: Sequence[int]) -> None:
        """One holder less for each block of a block table (or its tail). Keyed ones stay cached, idle."""
        for block in reversed(table):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released more often than held"
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def demote(self, table: Sequence[int]) -> None:
        """Of a block table just released, what is its alone is the first to give way: another device has it.

        That is its end, up to the first block that somebody holds, or that more than this table leads through.
        """
        demoted: list[int] = []
        for block in reversed(table):
            if block not in self._key_of and not demoted:
                continue  # not full yet
            if block not in self._idle or self._children[self._key_of[block]] > bool(demoted):
                break
            demoted.append(block)
        for block in reversed(demoted):
            self._idle.move_to_end(block, last=False)

    def publish(self, block: int, key: Key, parent: Key) -> int:
        """Caches a held, fully computed block under `key` and returns the block that stands for the key now.

        `parent`: the key of the block before it, or b"". When another block has the key already, that one is returned,
        with the caller's hold moved to it: equal keys have equal bytes.
        """
        known = self._block_of.setdefault(key, block)
        if known == block:
            self._key_of[block] = key
            self._parent_of[key] = parent
            self._children[parent] += 1
        else:
            self.hold((known,))
            self.release((block,))
        return known

    def clear_cache(self) -> int:
        """Forgets every idle block; returns how many."""
        count = len(self._idle)
        while self._idle:
            self._evict()
        return count

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that the books balance, given the block tables of all sequences."""
        holders = Counter(block for table in tables for block in table)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        for block in range(self.blocks):
            assert self._references[block] == holders[block], f"block {block}: references and holders differ"
            held, keyed = holders[block] > 0, block in self._key_of
            assert (block in free) == (not held and not keyed), f"block {block}: free, or not?"
            assert (block in idle) == (not held and keyed), f"block {block}: idle, or not?"
        assert {block: key for key, block in self._block_of.items()} == self._key_of
        assert self._parent_of.keys() == self._block_of.keys()
        assert Counter(self._parent_of.values()) == self._children
