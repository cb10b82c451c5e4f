"""Who gives its place up: for blocks that are missing, by the victim policy; for a waiter, by the order policy.

Nothing is changed here: what becomes of a victim is lifecycle.py's. Prices are valuation.py's.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import accumulate

from engine.policy_set import Policies, PolicyConfig
from engine.sequence import Sequence
from engine.valuation import Offer, Valuation
from policies.decisions import Alternative, Decision, Kind
from policies.order import Patient

PRICED_STEPS = 16
"""Steps after which all who run are priced anew, when somebody is to give way."""

PEER_STEPS = 4
"""Of so many steps one is looked for a peer that gives way, once: to compare a waiter with all who run, and to preempt,
takes as long as a step of the core should. For who is less urgent by class or priority, every step looks."""

NAMED = 4
"""Alternatives that a decision names, at most."""


@dataclass(slots=True)
class Victims:
    """Asks the policies in force, whose names are in `config`.

    A price is good for some steps, as long as its sequence keeps its place: a few tokens more, and others that go,
    change it little, and to price all who run takes longer than a step of the core should.
    """

    policies: Policies
    config: PolicyConfig
    valuation: Valuation
    _offers: dict[int, Offer] = field(default_factory=dict)  # by the admission that its place is from
    _steps: int = 0  # since the prices are from
    _peer_may: bool = False  # give way in this step

    def new_step(self) -> None:
        """Prices grow old."""
        self._steps += 1
        self._peer_may = self._steps % PEER_STEPS == 0
        if self._steps >= PRICED_STEPS:
            self._offers.clear()
            self._steps = 0

    def _offer(self, sequence: Sequence) -> Offer:
        return self._offers[sequence.admitted_as]

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
        freed = [0, *accumulate(self._offer(sequence).frees for sequence in left)]
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
        """Among those whom nobody called more or less urgent, none gives way if work would be lost by it."""
        if waiter.promoted:
            return [s for s in running if s.number > waiter.number]
        if isinstance(self.policies.order, Patient):
            return []
        displaces = self.policies.order.displaces
        urgency = (waiter.class_rank, waiter.priority)
        urgent = [s for s in running if urgency < (s.class_rank, s.priority) and not s.promoted]
        found = [s for s in urgent if displaces(waiter, s)]
        if found or not self._peer_may:
            return found
        self._peer_may = False
        peers = [s for s in running if not s.promoted and displaces(waiter, s)]
        if not peers:
            return []
        situation = self.valuation.situation(running)
        return [s for s in peers if self.valuation.comes_back_whole(s, situation)]

    def _choose(
        self, candidates: List[Sequence], running: List[Sequence]
    ) -> tuple[Sequence, tuple[Alternative, ...]]:
        """The first by the victim policy, and the next few, priced."""
        self._price(candidates, running)
        ranked = nsmallest(NAMED, candidates, key=self._rank)
        alternatives = tuple(Alternative(s.request.id, self._offer(s).price) for s in ranked)
        return ranked[0], alternatives

    def _price(self, candidates: List[Sequence], running: List[Sequence]) -> None:
        """Sees to it that all of them have an offer."""
        missing = [each for each in candidates if each.admitted_as not in self._offers]
        if missing:
            situation = self.valuation.situation(running)
            for each in missing:
                self._offers[each.admitted_as] = Offer(each, self.valuation, situation)

    def _rank(self, sequence: Sequence) -> tuple[tuple[float, ...], int]:
        admitted_as = sequence.admitted_as
        return self.policies.victim(sequence, self._offers[admitted_as]), admitted_as

    def _pays(self, waiter: Sequence, victim: Sequence, running: List[Sequence]) -> bool:
        """Whether what the waiter would wait for somebody's natural end, weighted, is more than the victim's price.

        A victim that gave way already costs more each time, so two never displace each other for long.
        """
        situation = self.valuation.situation(running)
        offer = Offer(victim, self.valuation, situation)
        rounds = min(sequence.expected_remaining_tokens for sequence in running)
        gain = waiter.weight * rounds * situation.step_seconds
        return offer.frees > 0 and offer.price * offer.frees < gain


def _preempted(victim: Sequence, policy: str, reason: str, alternatives: tuple[Alternative, ...]) -> Decision:
    return Decision(Kind.PREEMPTED, policy, victim.request.id, reason, None, alternatives)
