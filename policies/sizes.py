"""Limits of size classes: learned from the sizes that sequences ended with, so that classes carry their share of load.

A sequence's load is what it holds × how long: KV positions × decode steps, output × (prompt + output ÷ 2), its prefill
counted as one step more. Where a request goes by its size: routing.py; who moves up when it has grown: `cache_size` in
rebalancing.py.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from policies.survival import BUCKETS, EDGES, Epochs

LEAST_SAMPLES = 32
"""Before so many no limit is drawn."""


class SizeLimits:
    """The limits of as many classes as there are `shares`, smallest sizes first.

    `shares`: the load that each class is to carry beside the others; all alike: equal loads. After `memory` more
    samples, one counts 1/e.

    Limits are drawn anew at first after every sample, later after every thirty-second. Bounded: a number for each
    bucket of survival.py, within which sizes count as evenly spread. Assumes that sizes tomorrow are like today's.
    Worst case: sizes all alike, which no limit can divide; then the bucket's spread does, and one class has them all.
    Source: equal load by size interval (SITA-E), Harchol-Balter, Crovella and Murta, "On Choosing a Task Assignment
    Policy for a Distributed Server System", 1999; learning it online is ours.
    """

    def __init__(self, shares: Sequence[float], memory: int = 2000) -> None:
        if not shares or min(shares) <= 0:
            raise ValueError("there must be a class, and every share must be positive")
        if memory < 2:
            raise ValueError("memory must be at least 2")
        total = sum(shares)
        self._upto = [part / total for part in accumulate(shares)][:-1]
        self._memory = memory
        self._loads = [0.0] * BUCKETS
        self._newest = 1.0  # what a sample now counts, beside those before
        self._samples = 0
        self._epochs = Epochs()
        self._limits, self._limits_of = self._none, 0

    @property
    def limits(self) -> tuple[int, ...]:
        """Tokens, one a class, ascending; 0 is no limit: the last, and all of them before there are samples enough."""
        if self._samples >= LEAST_SAMPLES and self._limits_of != self._epochs.now:
            self._limits, self._limits_of = self._drawn(), self._epochs.now
        return self._limits

    def observe(self, prompt_tokens: int, output_tokens: int) -> None:
        """A sequence has ended so."""
        size = max(1, prompt_tokens + output_tokens)
        self._newest /= 1.0 - 1.0 / self._memory
        bucket = min(bisect_right(EDGES, size), BUCKETS) - 1
        self._loads[bucket] += self._newest * load(prompt_tokens, output_tokens)
        if self._newest > 1e12:
            self._loads = [each / self._newest for each in self._loads]
            self._newest = 1.0
        self._samples += 1
        self._epochs.seen()

    @property
    def _none(self) -> tuple[int, ...]:
        return (0,) * (len(self._upto) + 1)

    def _drawn(self) -> tuple[int, ...]:
        """Where the load summed from the smallest size reaches each class's share."""
        sums = [*accumulate(self._loads, initial=0.0)]
        limits: list[int] = []
        for share in self._upto:
            target = share * sums[-1]
            bucket = bisect_left(sums, target) - 1  # the one in which it is reached
            part = (target - sums[bucket]) / self._loads[bucket]
            limit = EDGES[bucket] + part * (EDGES[bucket + 1] - EDGES[bucket]) - 1
            limits.append(max(round(limit), 1, *(each + 1 for each in limits)))
        return (*limits, 0)


def load(prompt_tokens: int, output_tokens: int) -> float:
    """KV positions × steps."""
    return (output_tokens + 1) * max(1.0, prompt_tokens + output_tokens / 2)
