"""Coming back, and coming in on what is kept: what the tiers have of a waiter, and the copies that bring it up.

It holds all its blocks and its slot before the first begins, so those half way can never hold each other up (design
§4.5). Which way it comes is intake.py's.
"""

from collections import Counter
from collections.abc import Container
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from engine.sequence import Sequence
from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, CopyDone, Loss
from kvstore.residency import Residency
from kvstore.shelf import Entry
from policies.pricing import Way


@dataclass(frozen=True, slots=True)
class Match:
    """What the tiers have of a sequence: its first blocks, each a device block or an entry below."""

    blocks: list[int | Entry]
    full: int  # of these; one more is the tail of its snapshot
    tokens: int  # positions that need not be computed
    waits_for: Key | None  # the next block is being computed, or on its way up: worth waiting for

    @property
    def device_blocks(self) -> list[int]:
        """What the device has: the beginning, as a block below it is found only where the device has it not."""
        return [found for found in self.blocks if isinstance(found, int)]

    @property
    def entries(self) -> list[tuple[int, Entry]]:
        """What must be fetched, with its index in the block table."""
        return [(index, found) for index, found in enumerate(self.blocks) if isinstance(found, Entry)]

    def tokens_by_tier(self, first: int, block_size: int) -> Counter[str]:
        """Positions by the tier they come from, when the blocks below the device are fetched from the `first` on."""
        if not self.blocks:
            return Counter()
        counts = Counter({DEVICE: sum(isinstance(found, int) for found in self.blocks) * block_size})
        for _, entry in self.entries[first:]:
            counts[entry.tier] += entry.tokens
        return +counts


@dataclass(slots=True)
class Load:
    """A sequence's fetches under way."""

    sequence: Sequence
    epoch: int  # of the sequence when they began
    match: Match
    wanted: list[tuple[int, Entry]]  # what is fetched, by index into the block table
    way: Way
    copies: set[int] = field(default_factory=set)
    arrived: set[int] = field(default_factory=set)  # indices into the block table
    whole: bool = True  # nothing was lost so far

    @property
    def first_arrived(self) -> list[int]:
        """Of what was wanted, by index, all before the first that did not come."""
        missing = next((n for n, (index, _) in enumerate(self.wanted) if index not in self.arrived), None)
        return [index for index, _ in self.wanted[:missing]]

    @property
    def current(self) -> bool:
        """Whether the sequence still waits for it."""
        return self.sequence.epoch == self.epoch


def find(
    sequence: Sequence, residency: Residency, computing: Container[Key], block_size: int, device_only: bool
) -> Match:
    """Of the full blocks short of the last token, and of its snapshot's tail, what some tier has.

    `computing`: keys of blocks that somebody is about to cache on the device. Changes nothing.
    """
    keys = sequence.block_keys(block_size)[: (len(sequence.tokens) - 1) // block_size]
    blocks = residency.find(keys, device_only=device_only)
    full, tokens = len(blocks), len(blocks) * block_size
    below = next((key for key, found in zip(keys, blocks, strict=False) if isinstance(found, Entry)), None)
    for key in (below, *keys[full : full + 1]):  # never fetched twice, never computed twice
        if key is not None and (key in computing or residency.coming(key)):
            return Match(blocks, full, tokens, waits_for=key)
    snapshot = sequence.snapshot
    if not device_only and snapshot and snapshot.tail and full == len(snapshot.keys):
        key = snapshot.tail.key
        if residency.writing(key):
            return Match(blocks, full, tokens, waits_for=key)  # it will be there when its save has ended
        tail = residency.find((key,))
        blocks, tokens = blocks + tail, tokens + len(tail) * snapshot.tail.tokens
    return Match(blocks, full, tokens, waits_for=None)


def lowest_tier(tokens_by_tier: Counter[str]) -> str:
    """Of those that something comes from, the farthest from the device; "none" where nothing does."""
    return next((tier for tier in (DISK, HOST, DEVICE) if tokens_by_tier[tier]), "none")


class Loads:
    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._by_copy: dict[int, tuple[Load, list[int]]] = {}

    def begin(self, sequence: Sequence, match: Match, way: Way, after: int) -> None:
        """Starts the copies into the sequence's block table, which holds a block for each."""
        load = Load(sequence, sequence.epoch, match, match.entries[way.first_fetched :], way)
        indices = [index for index, _ in load.wanted]
        wanted = [(entry, sequence.table[index]) for index, entry in load.wanted]
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
