"""Coming back, and coming in on what is kept: what the tiers have of a waiter, and the copies that bring it up.

A waiter that needs copies is LOADING until the last has ended; it holds all its blocks and its slot before the first
begins, so those half way can never hold each other up (design §4.5).
"""

from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from engine.sequence import Sequence
from kvstore.block import Key
from kvstore.copies import DEVICE, CopyDone, Loss
from kvstore.residency import Residency
from kvstore.shelf import Entry


@dataclass(frozen=True, slots=True)
class Match:
    """What the tiers have of a sequence: its first blocks, each a device block or an entry below."""

    blocks: list[int | Entry]
    full: int  # of these; one more is the tail of its snapshot
    tokens: int  # positions that need not be computed
    waits_for: Key | None  # the next block is being computed, or on its way up: worth waiting for

    @property
    def entries(self) -> list[tuple[int, Entry]]:
        """What must be fetched, with its index in the block table."""
        return [(index, found) for index, found in enumerate(self.blocks) if isinstance(found, Entry)]

    def tokens_by_tier(self, block_size: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        for found in self.blocks:
            if isinstance(found, Entry):
                counts[found.tier] += found.tokens
            else:
                counts[DEVICE] += block_size
        return counts


@dataclass(slots=True)
class Load:
    """A sequence's fetches under way."""

    sequence: Sequence
    epoch: int  # of the sequence when they began
    match: Match
    tiers: Counter[str]
    copies: set[int] = field(default_factory=set)
    arrived: set[int] = field(default_factory=set)  # indices into the block table
    whole: bool = True  # nothing was lost so far

    @property
    def current(self) -> bool:
        """Whether the sequence still waits for it."""
        return self.sequence.epoch == self.epoch


class Loads:
    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._by_copy: dict[int, tuple[Load, list[int]]] = {}

    def begin(self, sequence: Sequence, match: Match, block_size: int, after: int) -> None:
        """Starts the copies into the sequence's block table, which holds a block for each."""
        load = Load(sequence, sequence.epoch, match, match.tokens_by_tier(block_size))
        indices = [index for index, _ in match.entries]
        wanted = [(entry, sequence.table[index]) for index, entry in match.entries]
        for copy, brought in self._residency.fetch(wanted, after):
            load.copies.add(copy)
            self._by_copy[copy] = (load, [indices[which] for which in brought])

    def copied(self, done: CopyDone) -> Load | None:
        """Notes a copy's end. Returns the load whose last one it was, if its sequence still waits for it."""
        load, indices = self._by_copy.pop(done.id, (None, []))
        if load is None:
            return None
        load.copies.discard(done.id)
        lost = dict[int, Loss](done.lost)
        load.arrived.update(index for which, index in enumerate(indices) if which not in lost)
        load.whole = load.whole and not lost
        return load if load.current and not load.copies else None

    def touching(self, copies: List[int]) -> list[Load]:
        """The loads that wait for any of these copies."""
        found = {
            id(load): load for copy in copies for load, _ in [self._by_copy.get(copy, (None, []))] if load
        }
        return [load for load in found.values() if load.current]
