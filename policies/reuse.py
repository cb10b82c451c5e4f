"""The chance that a block is used again, learned online: not whether only, but how soon. Pure arithmetic, no views.

Uses are of a *kind* (eviction.py says which). For each kind the time from one use to the next is counted in buckets
of half an octave. What room is worth to a block of a kind, unused for some time, is the reuse it promises per second
that it is kept, up to the moment at which giving it up is best: max over h of P(used again within h) ÷ E[seconds kept],
Gittins' index of optimal stopping (Gittins 1979; for caches: LHD, Beckmann et al., NSDI 2018, without the choice of h).
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

EDGES = [2.0 ** (half / 2) for half in range(-8, 29)]
"""Seconds; bucket b ends at EDGES[b], and the last holds what is longer: from 1/16 s to 4.5 hours."""
BUCKETS = len(EDGES) + 1
WIDTHS = [EDGES[0], *(end - start for start, end in pairwise(EDGES)), EDGES[-1]]

BELIEVED_REUSE = 0.3
"""Before anything is known: as likely in any bucket, so what was used lately is worth most, as LRU has it."""
BACKING_USES, BACKING_SHARE = 32.0, 0.01
"""What all kinds together count, beside a kind's own uses: a prompt's blocks fare alike, so few uses say little."""
LEAST_ALIVE = 0.02
"""Of any kind so many are held to stay unused for ever, so that a rare late reuse is not a sure one."""
MEMORY_SECONDS, MEMORY_USES = 3600.0, 16384
"""What is older counts half, a quarter …; but not before there is enough to forget."""
REFRESH_USES = 128
"""One kind's worths are made anew after so many uses, the next kind's after as many more; sooner at the start."""


class Cell:
    """Uses of one kind, and after how long the next one came."""

    __slots__ = ("again", "uses")

    def __init__(self) -> None:
        self.uses = 0.0
        self.again = [0.0] * BUCKETS

    def shares(self, above: Sequence[float], backing: float) -> list[float]:
        """P(the next use comes in the bucket), [BUCKETS]; `above` counts like `backing` uses."""
        total = self.uses + backing
        return [(count + backing * share) / total for count, share in zip(self.again, above, strict=True)]

    def halve(self) -> None:
        self.uses /= 2
        self.again = [count / 2 for count in self.again]


class Reuse:
    """Of so many kinds, numbered from 0."""

    def __init__(self, kinds: int) -> None:
        self._all = Cell()
        self._cells = [Cell() for _ in range(kinds)]
        self._since_refresh = 0
        self._next = 0
        self._halved_at: float | None = None
        self._worths = [self._made(kind) for kind in range(kinds)]

    def used(self, kind: int, now: float) -> None:
        """A block was used, and is of this kind from now on."""
        self._all.uses += 1
        self._cells[kind].uses += 1
        self._since_refresh += 1
        if self._since_refresh >= min(REFRESH_USES, 1 + self._all.uses / 32):
            self._refresh(now)

    def again(self, kind: int, seconds: float) -> None:
        """A block of this kind was used again, after so long."""
        bucket = bisect_right(EDGES, seconds)
        self._all.again[bucket] += 1
        self._cells[kind].again[bucket] += 1

    def worth(self, kind: int, seconds: float) -> float:
        """Reuses that a second of room promises, of a block of this kind that has been unused for so long."""
        return self._worths[kind][bisect_right(EDGES, seconds)]

    def _refresh(self, now: float) -> None:
        self._since_refresh = 0
        self._worths[self._next] = self._made(self._next)
        self._next = (self._next + 1) % len(self._cells)
        if self._halved_at is None:
            self._halved_at = now
        if now - self._halved_at >= MEMORY_SECONDS and self._all.uses >= MEMORY_USES:
            self._halved_at = now
            for cell in (self._all, *self._cells):
                cell.halve()

    def _made(self, kind: int) -> list[float]:
        backing = BACKING_USES + BACKING_SHARE * self._all.uses
        believed = self._all.shares([BELIEVED_REUSE / BUCKETS] * BUCKETS, backing)
        return worths(self._cells[kind].shares(believed, backing))


def worths(shares: Sequence[float]) -> list[float]:
    """The index at the start of each bucket, [BUCKETS], of P(next use in the bucket).

    With reuse so far over time kept so far as points of a plane, it is the steepest slope to a later point: an edge
    of the upper hull, which one pass from the right finds.
    """
    alive = [max(1.0 - share, LEAST_ALIVE) for share in accumulate(shares, initial=0.0)]
    halves = [(before + after) / 2 for before, after in pairwise(alive)]
    kept = [width * half for width, half in zip(WIDTHS, halves, strict=True)]
    points = list(zip(accumulate(kept, initial=0.0), accumulate(shares, initial=0.0), strict=True))
    hull = [points[-1]]
    found = []
    for point in reversed(points[:-1]):
        while len(hull) > 1 and _slope(point, hull[-2]) >= _slope(point, hull[-1]):
            hull.pop()
        found.append(_slope(point, hull[-1]))
        hull.append(point)
    return found[::-1]


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
