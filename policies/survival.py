"""How long things last that began alike: survival curves of lengths, learned online. Pure arithmetic, no views.

A length is at least 1. Curves are kept by buckets whose edges grow by 2^¼ (single tokens up to 6, then within a
fifth); inside a bucket lengths count as evenly spread. prediction.py makes predictors of them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate, pairwise
from math import erfc, log, sqrt


def _edges() -> list[int]:
    edges = [1]
    while edges[-1] < 2**20:
        edges.append(max(edges[-1] + 1, int(edges[-1] * 2**0.25)))
    return edges


EDGES = _edges()  # bucket b holds the lengths EDGES[b] … EDGES[b + 1] - 1
BUCKETS = len(EDGES) - 1  # what is longer counts in the last


class Curve:
    """P(length ≥ x), falling, and its sums from the end: any question about it is two look-ups."""

    __slots__ = ("_falling", "_slopes", "_tails", "survival")

    def __init__(self, survival: list[float]) -> None:
        """`survival[b]`: P(length ≥ EDGES[b]), 1 first, 0 last, [BUCKETS + 1]."""
        widths = [end - start for start, end in pairwise(EDGES)]
        self.survival = survival
        self._falling = [-share for share in survival]
        self._slopes = [
            (after - before) / width
            for before, after, width in zip(survival, survival[1:], widths, strict=False)
        ]
        sums = [
            width * (first + last - slope) / 2
            for width, first, last, slope in zip(widths, survival, survival[1:], self._slopes, strict=False)
        ]
        self._tails = [*accumulate(reversed(sums), initial=0.0)][::-1]  # over all lengths ≥ EDGES[b]

    def remaining(self, so_far: float, limit: float) -> float:
        """E[min(length, limit) − so_far | length > so_far]: at least 1, but 0 at the limit.

        Beyond the last edge nothing is known: all that the limit leaves.
        """
        if so_far >= limit:
            return 0.0
        alive, area = self._from(so_far + 1)
        left = (area - self._from(limit + 1)[1]) / alive if alive else limit
        return min(max(1.0, left), limit - so_far)

    def quantile(self, so_far: float, limit: float, q: float) -> float:
        """The r at which a share q of those longer than so_far has ended: P(length ≤ so_far + r | length > so_far)
        = q.

        Between 1 and limit − so_far; 0 at the limit.
        """
        if so_far >= limit:
            return 0.0
        target = self._from(so_far + 1)[0] * (1.0 - q)
        bucket = bisect_left(self._falling, -target) - 1  # the last whose start more survive
        if bucket < 0:
            return 1.0
        slope = self._slopes[bucket] if bucket < BUCKETS else 0.0
        passed = (target - self.survival[bucket]) / slope if slope else 0.0
        return min(max(1.0, EDGES[bucket] + passed - 1 - so_far), limit - so_far)

    def beyond(self, so_far: float, limit: float, more: float) -> float:
        """P(length > so_far + more | length > so_far); 0 from the limit on. Beyond the last edge all go on to it."""
        if so_far + more >= limit:
            return 0.0
        alive = self._from(so_far + 1)[0]
        return self._from(so_far + more + 1)[0] / alive if alive else 1.0

    def _from(self, x: float) -> tuple[float, float]:
        """P(length ≥ x), and the sum of that over x, x + 1, …"""
        bucket = bisect_right(EDGES, x) - 1
        if bucket >= BUCKETS:
            return 0.0, 0.0
        slope, after = self._slopes[bucket], self.survival[bucket + 1]
        share = self.survival[bucket] + (x - EDGES[bucket]) * slope
        return share, self._tails[bucket + 1] + (EDGES[bucket + 1] - x) * (share + after - slope) / 2


def log_normal(median: float, sigma: float) -> Curve:
    """What is believed before the first sample: ln(length) is normal. Nowhere 0 before the last edge."""
    shares = [erfc(log(edge / median) / (sigma * sqrt(2))) / 2 for edge in EDGES]
    return Curve([share / shares[0] for share in shares[:-1]] + [0.0])


class Epochs:
    """When curves are made again: at first after every sample, later after every sixteenth of them, at most 32."""

    def __init__(self) -> None:
        self.now = 0
        self._seen = 0
        self._next = 1

    def seen(self) -> None:
        """One more sample."""
        self._seen += 1
        if self._seen >= self._next:
            self.now += 1
            self._next = self._seen + min(max(1, self._seen // 16), 32)


class Cell:
    """Lengths of one kind. Old ones fade: after n more, one counts (1 − 1/memory)^n.

    Some lengths are only known to be longer than they were let be; they count as survivors until then (Kaplan and
    Meier 1958; within a bucket, as life tables do, for half of it). What it has not seen enough of it takes from
    the coarser kind `above`, which counts like `backing` samples more.
    """

    def __init__(self, above: Callable[[int], Curve], memory: int, backing: float) -> None:
        self._above, self._memory, self._backing = above, memory, backing
        self._ended = [0.0] * BUCKETS
        self._cut = [0.0] * BUCKETS
        self._newest = 1.0  # what a sample now counts, beside those before
        self._empty = True
        self._curve: Curve | None = None
        self._curve_of = -1

    def observe(self, length: float, *, ended: bool) -> None:
        """One more. `ended`: by itself; else it is only known to be longer."""
        self._empty = False
        bucket = min(bisect_right(EDGES, max(1, length)), BUCKETS) - 1
        self._newest /= 1.0 - 1.0 / self._memory
        (self._ended if ended else self._cut)[bucket] += self._newest
        if self._newest > 1e12:
            self._ended = [count / self._newest for count in self._ended]
            self._cut = [count / self._newest for count in self._cut]
            self._newest = 1.0

    def curve(self, epoch: int) -> Curve:
        """The curve as of `epoch`: made when first asked for in it, then kept until the next."""
        if self._curve is None or self._curve_of != epoch:
            above = self._above(epoch)
            self._curve = above if self._empty else Curve(self._survival(above.survival))
            self._curve_of = epoch
        return self._curve

    def _survival(self, above: list[float]) -> list[float]:
        """Only sums and quotients of what is positive, so that the far end stays positive too."""
        backing = self._backing * self._newest
        totals = [ended + cut for ended, cut in zip(self._ended, self._cut, strict=True)]
        longer = [*accumulate(reversed(totals), initial=0.0)][::-1]
        survival = [1.0]
        for bucket, (ended, cut) in enumerate(zip(self._ended, self._cut, strict=True)):
            through = longer[bucket + 1] + cut / 2 + backing * above[bucket + 1]
            entered = longer[bucket + 1] + ended + cut / 2 + backing * above[bucket]
            survival.append(survival[-1] * through / entered)
        survival[-1] = 0.0
        return survival
