"""Who gives its place up: for blocks that are missing, by the victim policy; for a waiter, by the order policy.

Nothing is changed here: what becomes of a victim is scheduler.py's. Prices are valuation.py's.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import accumulate

from engine.policy_set import Policies, PolicyConfig
from engine.sequence import Sequence
from engine.valuation import Offer, Valuation
from policies.decisions import Alternative, Decision, Kind

NAMED = 4
"""Alternatives that a decision names, at most."""


@dataclass(slots=True)
class Victims:
    """Asks the policies in force, whose names are in `config`.

    Within a step everybody is priced once: those that go change the others' prices little, and a step may take many.
    """

    policies: Policies
    config: PolicyConfig
    valuation: Valuation
    _offers: dict[Sequence, Offer] = field(default_factory=dict)  # of this step

    def new_step(self) -> None:
        """Prices are asked anew from here on."""
        self._offers.clear()

    def for_blocks(
        self, sequence: Sequence, missing: int, running: List[Sequence]
    ) -> tuple[Sequence, Decision]:
        """Whom the victim policy names: promoted ones only when there is nobody else."""
        candidates = [s for s in running if not s.promoted] or running
        victim, alternatives = self._choose(candidates, running)
        reason = f"{missing} blocks were missing for {sequence.request.id}"
        return victim, _preempted(victim, self.config.victim, reason, alternatives)

    def likely(self, missing: int, running: List[Sequence]) -> list[Sequence]:
        """Who would go, the first first, if so many blocks were missing."""
        if not running:
            return []
        self._price(running, running)
        left = sorted((s for s in running if not s.promoted), key=self._rank)
        freed = [0, *accumulate(self._offers[sequence].frees for sequence in left)]
        return [sequence for sequence, before in zip(left, freed, strict=False) if before < missing]

    def for_waiter(self, waiter: Sequence, running: List[Sequence]) -> tuple[Sequence, Decision] | None:
        """Who gives way to the first in line: by the order policy, when it pays; to a promoted one, who came later."""
        candidates = self._displaceable(waiter, running)
        if not candidates:
            return None
        victim, alternatives = self._choose(candidates, running)
        if not (waiter.promoted or self._pays(waiter, victim, running)):
            return None
        reason = f"{waiter.request.id} goes before it" + (", promoted" if waiter.promoted else "")
        return victim, _preempted(victim, self.config.order, reason, alternatives)

    def _displaceable(self, waiter: Sequence, running: List[Sequence]) -> list[Sequence]:
        if waiter.promoted:
            return [s for s in running if s.number > waiter.number]
        displaces = self.policies.order.displaces
        return [s for s in running if not s.promoted and displaces(waiter, s)]

    def _choose(
        self, candidates: List[Sequence], running: List[Sequence]
    ) -> tuple[Sequence, tuple[Alternative, ...]]:
        """The first by the victim policy, and the next few, priced."""
        self._price(candidates, running)
        ranked = nsmallest(NAMED, candidates, key=self._rank)
        alternatives = tuple(Alternative(s.request.id, self._offers[s].price) for s in ranked)
        del self._offers[ranked[0]]  # should it go and come back within the step, it is another
        return ranked[0], alternatives

    def _price(self, candidates: List[Sequence], running: List[Sequence]) -> None:
        """Sees to it that all of them have an offer."""
        if missing := [sequence for sequence in candidates if sequence not in self._offers]:
            situation = self.valuation.situation(running)
            self._offers.update((each, Offer(each, self.valuation, situation)) for each in missing)

    def _rank(self, sequence: Sequence) -> tuple[tuple[float, ...], int]:
        return self.policies.victim(sequence, self._offers[sequence]), sequence.admitted_as

    def _pays(self, waiter: Sequence, victim: Sequence, running: List[Sequence]) -> bool:
        """Whether what the waiter would wait for somebody's natural end, weighted, is more than the victim's price.

        A victim that gave way already costs more each time, so two never displace each other for long.
        """
        situation = self.valuation.situation(running)
        offer = Offer(victim, self.valuation, situation)
        rounds = min(sequence.expected_remaining_tokens for sequence in running)
        gain = waiter.weight * rounds * self.valuation.step_seconds(situation)
        return offer.frees > 0 and offer.price * offer.frees < gain


def _preempted(victim: Sequence, policy: str, reason: str, alternatives: tuple[Alternative, ...]) -> Decision:
    return Decision(Kind.PREEMPTED, policy, victim.request.id, reason, None, alternatives)
