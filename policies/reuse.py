"""The chance that a block is used again, learned online: not whether only, but how soon. Pure arithmetic, no views.

Uses are of a *kind*, and kinds of a *family* (eviction.py says which). For each the time from one use to the next is
counted in buckets of half an octave, and the *hazard* of a bucket is those that came back in it ÷ those that were old
enough to and had not yet, as Kaplan and Meier have it (1958): what is too young to tell does not count as gone. A kind
that has seen little fares like its family, a family like all.

What room is worth to a block of a kind, unused for some time, is the reuse it promises per second that it is kept, up
to the moment at which giving it up is best: max over h of P(used again within h) ÷ E[seconds kept], Gittins' index of
optimal stopping (Gittins 1979; for caches: LHD, Beckmann et al., NSDI 2018, without the choice of h).
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import sqrt

EDGES = [2.0 ** (half / 2) for half in range(-8, 29)]
"""Seconds; bucket b ends at EDGES[b], and the last holds what is longer: from 1/16 s to 4.5 hours."""
BUCKETS = len(EDGES) + 1
WIDTHS = [EDGES[0], *(end - start for start, end in pairwise(EDGES)), EDGES[-1]]
MIDDLES = [end - width / 2 for end, width in zip([*EDGES, 2 * EDGES[-1]], WIDTHS, strict=True)]
MOST_TIMES = 512
"""Of a cell so many moments are kept, the older ones more sparsely."""

BELIEVED_REUSE, BELIEVED_USES = 0.3, 1024.0
"""Before anything is known: as likely in any bucket, so what was used lately is worth most, as LRU has it. Counts like
so many uses, for ages that few have reached yet."""
BACKING_USES, BACKING_SHARE = 32.0, 0.02
"""What a kind's family counts, beside its own uses, and all beside a family's; with so many for each use of any kind. A
prompt's blocks fare alike, so few uses say little."""
LEAST_ALIVE = 0.02
"""Of any kind so many are held to stay unused for ever, so that a rare late reuse is not a sure one."""
MEMORY_SECONDS, MEMORY_USES = 3600.0, 16384
"""What is older counts half, a quarter …; but not before there is enough to forget."""
REFRESH_USES = 32
"""One kind's worths are made anew after so many uses, the next kind's after as many more; sooner at the start."""


class Cell:
    """Uses of one sort: how many there had been by when, and after how long the next one came."""

    __slots__ = ("again", "times", "totals")

    def __init__(self) -> None:
        self.again = [0.0] * BUCKETS
        self.times: list[float] = []
        self.totals: list[float] = []  # uses up to then

    def used(self, now: float) -> None:
        total = self.totals[-1] + 1 if self.totals else 1.0
        if self.times and self.times[-1] == now:
            self.totals[-1] = total
            return
        self.times.append(now)
        self.totals.append(total)
        if len(self.times) > MOST_TIMES:
            self._thin(now)

    def _thin(self, now: float) -> None:
        """Keeps moments apart by a sixteenth of how long ago they are."""
        kept: list[int] = []
        for place in range(len(self.times) - 1, -1, -1):
            if not kept or self.times[kept[-1]] - self.times[place] >= (now - self.times[place]) / 16:
                kept.append(place)
        self.times = [self.times[place] for place in reversed(kept)]
        self.totals = [self.totals[place] for place in reversed(kept)]

    def hazards(self, now: float, above: Sequence[float], backing: float) -> list[float]:
        """P(the next use comes in the bucket, if not before), [BUCKETS]; `above` counts like `backing` uses."""
        found, gone = [], 0.0
        for middle, count, hazard in zip(MIDDLES, self.again, above, strict=True):
            old = bisect_right(self.times, now - middle)
            waiting = max(count, (self.totals[old - 1] if old else 0.0) - gone)
            gone += count
            found.append((count + backing * hazard) / (waiting + backing))
        return found

    def halve(self) -> None:
        self.again = [count / 2 for count in self.again]
        self.totals = [total / 2 for total in self.totals]


class Reuse:
    """Of so many kinds, numbered from 0."""

    def __init__(self, families: Sequence[int]) -> None:
        """`families`: by kind, the family's number, from 0."""
        self._families = families
        self._all = Cell()
        self._family_cells = [Cell() for _ in range(max(families) + 1)]
        self._cells = [Cell() for _ in families]
        self._uses = 0.0
        self._since_refresh = 0
        self._next = 0
        self._halved_at: float | None = None
        self._worths = [self._made(kind, 0.0) for kind in range(len(families))]

    def used(self, kind: int, now: float) -> None:
        """A block was used, and is of this kind from now on."""
        self._uses += 1
        for cell in self._of(kind):
            cell.used(now)
        self._since_refresh += 1
        if self._since_refresh >= min(REFRESH_USES, 1 + self._uses / 32):
            self._refresh(now)

    def again(self, kind: int, seconds: float) -> None:
        """A block of this kind was used again, after so long."""
        bucket = bisect_right(EDGES, seconds)
        for cell in self._of(kind):
            cell.again[bucket] += 1

    def worth(self, kind: int, seconds: float) -> float:
        """Reuses that a second of room promises, of a block of this kind that has been unused for so long."""
        return self._worths[kind][bisect_right(EDGES, seconds)]

    def _of(self, kind: int) -> tuple[Cell, Cell, Cell]:
        """From the widest to the narrowest."""
        return self._all, self._family_cells[self._families[kind]], self._cells[kind]

    def _refresh(self, now: float) -> None:
        self._since_refresh = 0
        self._worths[self._next] = self._made(self._next, now)
        self._next = (self._next + 1) % len(self._cells)
        if self._halved_at is None:
            self._halved_at = now
        if now - self._halved_at >= MEMORY_SECONDS and self._uses >= MEMORY_USES:
            self._halved_at = now
            self._uses /= 2
            for cell in (self._all, *self._family_cells, *self._cells):
                cell.halve()

    def _made(self, kind: int, now: float) -> list[float]:
        hazards = hazards_of([BELIEVED_REUSE / BUCKETS] * BUCKETS)
        backing = BACKING_USES + BACKING_SHARE * self._uses
        for cell, counts in zip(self._of(kind), (BELIEVED_USES + backing, backing, backing), strict=True):
            hazards = cell.hazards(now, hazards, counts)
        return single_peaked(worths(shares_of(hazards)))


def hazards_of(shares: Sequence[float]) -> list[float]:
    """Of P(next use in the bucket): the same, if it has not come before."""
    alive = accumulate(shares, lambda left, share: left - share, initial=1.0)
    return [share / left for share, left in zip(shares, alive, strict=False)]


def shares_of(hazards: Iterable[float]) -> list[float]:
    """`hazards_of` the other way."""
    alive, shares = 1.0, []
    for hazard in hazards:
        shares.append(alive * hazard)
        alive -= shares[-1]
    return shares


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


def single_peaked(values: Sequence[float]) -> list[float]:
    """Rising to the highest value and falling after it: between the nearest such curve above, and below.

    So of a kind's blocks the least worth is always the longest or the shortest unused. Dips in between are mostly
    chance, of few uses.
    """
    peak = max(range(len(values)), key=values.__getitem__)
    rising, falling = values[: peak + 1], values[: peak - 1 if peak else None : -1]
    before, after = _between(rising), _between(falling)[::-1]
    return [*before, *after[1:]]


def _between(rising: Sequence[float]) -> list[float]:
    """The last value is the highest. Geometric means."""
    above = accumulate(rising, max)
    below = [*accumulate(reversed(rising), min)][::-1]
    return [sqrt(high * low) for high, low in zip(above, below, strict=True)]
