"""How a preempted sequence comes back, and how a waiter takes what tiers below the device have of it.

A resume policy names the ways it allows (policies/pricing.py) and chooses among those that are possible.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.pricing import RECOMPUTE, RELOAD, SPLIT, Way

__all__ = ["RECOMPUTE", "RELOAD", "RESUMES", "SPLIT", "Cheapest", "Recompute", "Reload", "Resume", "Split"]


class Resume(Protocol):
    @property
    def enabled(self) -> tuple[str, ...]:
        """The ways that are priced at all. Without one that loads, a preemption saves nothing either."""

    def __call__(self, ways: Sequence[Way]) -> Way:
        """One of `ways`, which are not empty."""


def _cheapest(ways: Sequence[Way]) -> Way:
    return min(ways, key=lambda way: way.price)


def _first(name: str, ways: Sequence[Way]) -> Way:
    """The way of that name; where there is none, the first."""
    return next((way for way in ways if way.name == name), ways[0])


@dataclass(frozen=True, slots=True)
class Cheapest:
    """The way with the lowest predicted price. Ties: reload before split before recompute.

    Assumes that the cost model has seen steps and copies like these. Worst case: a tier that has just become slow is
    believed fast for five copies. Source: ours; no engine compares the two (vllm#54644 has what that costs).
    """

    enabled: tuple[str, ...] = (RELOAD, SPLIT, RECOMPUTE)

    def __call__(self, ways: Sequence[Way]) -> Way:
        return _cheapest(ways)


@dataclass(frozen=True, slots=True)
class Split:
    """The head is computed while the rest loads, whatever it costs, where there are two blocks to load or more.

    Worst case: where loading is much faster, the head's block is computed for nothing. Source: Cake
    (Jin et al., 2024), which computes from the front while it loads from the back.
    """

    enabled: tuple[str, ...] = (SPLIT, RELOAD)

    def __call__(self, ways: Sequence[Way]) -> Way:
        return _first(SPLIT, ways)


@dataclass(frozen=True, slots=True)
class Reload:
    """What is on the device but not in the store yet is saved first, the partial tail block too; then it is loaded.

    What the store lost meanwhile, or had no room for, is computed again. Worst case: a slow tier, a short sequence.
    Source: swapping, as in vLLM before version 1, and FastServe (Wu et al., 2023).
    """

    enabled: tuple[str, ...] = (RELOAD,)

    def __call__(self, ways: Sequence[Way]) -> Way:
        return _first(RELOAD, ways)


@dataclass(frozen=True, slots=True)
class Recompute:
    """Nothing is saved at a preemption, and only what the device still caches is used again.

    Worst case: a long context computed again and again. Source: vLLM's and SGLang's only way.
    """

    enabled: tuple[str, ...] = (RECOMPUTE,)

    def __call__(self, ways: Sequence[Way]) -> Way:
        return _cheapest(ways)


RESUMES: dict[str, type[Cheapest | Split | Reload | Recompute]] = {
    "cheapest": Cheapest,
    "split": Split,
    "reload": Reload,
    "recompute": Recompute,
}
