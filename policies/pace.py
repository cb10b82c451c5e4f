"""How quick replicas are beside others like them: 1, but for one whose steps take longer, or less, for good.

A ratio is what a step took over what was predicted for the group. Medians are compared: of a replica's last ratios, so
that single steps count for nothing; and with the middle one of all replicas, so that what is wrong with the prediction,
or slow for all of them, is nobody's own pace. A replica alone has pace 1 always: what changes there the fit follows
(fitting.py). One that is lost counts as it was until it joins anew: a pace is beside the fit, which does not change by
its going. No clock, no randomness.
"""

from collections import deque
from statistics import median_low

STEPS = 32
"""Whose ratios count, of a replica."""

ENOUGH = 16
"""Ratios, before anything is said of a replica."""

BAND = 1.25
"""Paces up to this, either way, are taken for 1: so far do like replicas differ with what is in their batches."""


class Paces:
    """Of the replicas of a group, by number."""

    def __init__(self) -> None:
        self._ratios: dict[int, deque[float]] = {}
        self._usual: dict[int, float] = {}
        self._paces: dict[int, float] = {}

    def join(self, number: int) -> None:
        """Nothing is known of it, or nothing any more."""
        self._ratios[number] = deque(maxlen=STEPS)
        self._usual.pop(number, None)
        self._paces[number] = 1.0

    def of(self, number: int) -> float:
        return self._paces[number]

    def observe(self, number: int, ratio: float) -> None:
        """One that is slower from now on is priced so after half of STEPS + 1 of its steps."""
        ratios = self._ratios[number]
        ratios.append(ratio)
        if len(ratios) >= ENOUGH:
            usual = self._usual[number] = median_low(ratios)
            pace = usual / median_low(self._usual.values())
            self._paces[number] = 1.0 if 1 / BAND <= pace <= BAND else pace
