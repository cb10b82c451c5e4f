"""Which cached block leaves a tier.

The books (`kvstore/candidates.py`) keep the blocks that may leave in *groups*, each in order by one score or several,
lowest first. The first of each order is a candidate, and of all groups' candidates the one that is worth least leaves.
So a policy may let worth fall with time, as long as it falls alike for all blocks of a group. Group and scores change
only when the block is used, or what it saves does. Scores end with the block's depth, deepest first, so that of a chain
used at one moment the children go before their parents.

A policy belongs to one tier. It hears of every use, and leaves a note in `block.past`.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import frexp
from typing import Protocol

from policies.reuse import Reuse
from policies.views import BlockView

Scores = tuple[tuple[float, ...], ...]


class Eviction(Protocol):
    def added(self, block: BlockView, now: float) -> int:
        """A block has come into the tier for a use. Returns its `past`."""

    def adopted(self, block: BlockView) -> int:
        """It is in the tier already, at a start or when this policy takes over. Returns its `past`."""

    def hit(self, block: BlockView, now: float) -> int:
        """It is used; `used` still tells of the time before. Returns its `past` from now on."""

    def left(self, block: BlockView) -> None:
        """It has left the tier."""

    def group(self, block: BlockView) -> int: ...

    def scores(self, block: BlockView) -> Scores:
        """Its place in each of its group's orders."""

    def worth(self, block: BlockView, now: float) -> float:
        """What keeping it is worth, beside blocks of other groups."""


Score = Callable[[BlockView], tuple[float, ...]]
"""The lowest leaves first. It may change only when the block is used."""


class Scored:
    """A policy whose score says all: one group, nothing to remember."""

    def __init__(self, score: Score) -> None:
        self._score = score

    def added(self, block: BlockView, now: float) -> int:
        return 0

    def adopted(self, block: BlockView) -> int:
        return 0

    def hit(self, block: BlockView, now: float) -> int:
        return 0

    def left(self, block: BlockView) -> None: ...

    def group(self, block: BlockView) -> int:
        return 0

    def scores(self, block: BlockView) -> Scores:
        return (self._score(block),)

    def worth(self, block: BlockView, now: float) -> float:
        return 0.0


def lru(block: BlockView) -> tuple[float, ...]:
    """The longest unused. Ties: the deepest in its chain.

    Assumes that what was used lately is used again soon. Worst case: one scan of blocks that never return, longer than
    the tier, turns it over entirely. Source: the usual one of every engine's prefix cache (vLLM, SGLang).
    """
    return (block.used, -block.depth)


def lfu(block: BlockView) -> tuple[float, ...]:
    """The least often used; among these the longest unused.

    Assumes that use so far predicts use to come. Worst case: once-popular blocks that nobody asks for again stay for
    ever, as counts never fall. A scan cannot turn the tier over. Source: the usual one (Redis, textbooks).
    """
    return (block.hits, block.used, -block.depth)


MOST_USES = 4
CLASSES = 8
TAIL = (MOST_USES + 1) * CLASSES
"""A block's `past` is its kind: of uses after the first, up to MOST_USES, and a class; TAIL: a snapshot's partial
block. Kinds of as many uses are a family."""
FAMILIES = [kind // CLASSES for kind in range(TAIL + 1)]
KINDS = len(FAMILIES)
SHORT_GAP = 16.0
"""Seconds. Uses no further apart are of one class, above it each octave is one."""
HALF_OCTAVE = 0.7071
REMEMBERED_PER_BLOCK, REMEMBERED_MOST = 8, 2**18


class Cost:
    """The least seconds saved by a second of room: seconds saved over the next copy below × chance of reuse.

    The chance is learned from the tier's own uses (reuse.py), by how long ago the last was, how often a block was used,
    and, once it was used again, after how long: who came back soon does so soon again. Blocks that have left are
    remembered, eight for each that the tier holds (at most 262,144, at some 200 bytes each), so that a chat's second
    turn is known for one even when the first was dropped. A group is a kind of the same saving, to half an octave; its
    first and its last used block are looked at, as worth rises until the next use is due and falls after. Ties: the
    deepest in its chain.

    Assumes that blocks are of one size, and that kinds fare as they did within the last hours. A scan of blocks that
    never return costs the room that it takes to learn so, and then next to none. Worst case: the ways of use change all
    at once; until that is learned, it keeps what was good. Source: hit density as in LHD (Beckmann et al., NSDI 2018),
    ghosts as in ARC (Megiddo and Modha, FAST 2003), cost as in GDSF (Cherkasova 1998).
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._reuse = Reuse(FAMILIES)
        self._remembered: OrderedDict[bytes, tuple[float, int]] = OrderedDict()  # key: (last used, past)
        self._most = min(REMEMBERED_PER_BLOCK * capacity_blocks, REMEMBERED_MOST)

    def added(self, block: BlockView, now: float) -> int:
        known = self._remembered.pop(block.key, None)
        if known is not None:
            return self._used_again(known[1], now - known[0], now)
        past = self.adopted(block)
        self._reuse.used(past, now)
        return past

    def adopted(self, block: BlockView) -> int:
        return TAIL if block.partial else min(block.hits, MOST_USES) * CLASSES

    def hit(self, block: BlockView, now: float) -> int:
        return self._used_again(block.past, now - block.used, now)

    def _used_again(self, past: int, seconds: float, now: float) -> int:
        self._reuse.again(past, seconds)
        kind = past if past == TAIL else min(past // CLASSES + 1, MOST_USES) * CLASSES + _gap_class(seconds)
        self._reuse.used(kind, now)
        return kind

    def left(self, block: BlockView) -> None:
        if block.past == TAIL:
            return
        self._remembered[block.key] = (block.used, block.past)
        if len(self._remembered) > self._most:
            self._remembered.popitem(last=False)

    def group(self, block: BlockView) -> int:
        mantissa, exponent = frexp(block.saves_seconds)
        return (2 * exponent + (mantissa >= HALF_OCTAVE)) * KINDS + block.past

    def scores(self, block: BlockView) -> Scores:
        return ((block.used, -block.depth), (-block.used, -block.depth))

    def worth(self, block: BlockView, now: float) -> float:
        return self._reuse.worth(block.past, now - block.used) * block.saves_seconds


def _gap_class(seconds: float) -> int:
    """1 … 7, by octaves; 0 is for those used once, or whose last gap nobody knows."""
    return 1 + min(int(max(0.0, seconds) / SHORT_GAP).bit_length(), CLASSES - 2)


MakeEviction = Callable[[int], Eviction]
"""Given how many blocks the tier holds: a policy keeps what it learns of one tier."""

EVICTIONS: dict[str, MakeEviction] = {
    "cost": lambda capacity_blocks: Cost(capacity_blocks),
    "lru": lambda capacity_blocks: Scored(lru),
    "lfu": lambda capacity_blocks: Scored(lfu),
}
