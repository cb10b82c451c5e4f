"""Who gives its place up: for blocks that are missing, by the victim policy; for a waiter, by the order policy.

Nothing is changed here: what becomes of a victim is lifecycle.py's. Prices are valuation.py's.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from itertools import accumulate, islice

from engine.policy_set import Policies, PolicyConfig
from engine.sequence import Sequence
from engine.valuation import Offer, Valuation
from policies.decisions import Alternative, Decision, Kind
from policies.order import Patient
from policies.pricing import Situation

PRICED_STEPS = 16
"""Steps after which all who run are priced anew, when somebody is to give way."""

PEER_STEPS = 4
"""Of so many steps one is looked for a peer that gives way, once: to compare a waiter with all who run, and to preempt,
takes as long as a step of the core should. For who is less urgent by class or priority, every step looks."""

NAMED = 4
"""Alternatives that a decision names, at most."""


Ranked = tuple[tuple[float, ...], int, Sequence]
"""(the victim policy's key, admission, sequence): no two are from one admission."""


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
        reason = f"{missing} blocks were missing for {sequence.request.id}"
        return self._preempted(self._first_few(candidates, running), self.config.victim, reason)

    def likely(self, missing: int, running: List[Sequence]) -> list[Sequence]:
        """Who would go, the first first, if so many blocks were missing."""
        if not running:
            return []
        self._price(running, running)
        left = [sequence for *_, sequence in sorted(self._ranked([s for s in running if not s.promoted]))]
        freed = [0, *accumulate(self._offer(sequence).frees for sequence in left)]
        return [sequence for sequence, before in zip(left, freed, strict=False) if before < missing]

    def for_waiter(
        self, waiter: Sequence, waiting: int, running: List[Sequence]
    ) -> tuple[Sequence, Decision] | None:
        """Who gives way to the first of so many in line: by the order policy, when it pays; to a promoted one, who came
        later.
        """
        candidates, peers = self._displaceable(waiter, running)
        if not candidates:
            return None
        situation = self.valuation.situation(running)

        def loses_nothing(sequence: Sequence) -> bool:
            return self.valuation.comes_back_whole(sequence, situation)

        few = self._first_few(candidates, running, situation, loses_nothing if peers else None)
        if not few or not (waiter.promoted or self._pays(waiter, waiting, few[0], running, situation)):
            return None
        reason = f"{waiter.request.id} goes before it" + (", promoted" if waiter.promoted else "")
        return self._preempted(few, self.config.order, reason)

    def _displaceable(self, waiter: Sequence, running: List[Sequence]) -> tuple[list[Sequence], bool]:
        """Whom it goes before, and whether they are its peers: nobody called them more or less urgent, so none of them
        gives way if work would be lost by it.
        """
        if waiter.promoted:
            return [s for s in running if s.number > waiter.number], False
        if isinstance(self.policies.order, Patient):
            return [], False
        displaces = self.policies.order.displaces
        rank, priority = waiter.class_rank, waiter.priority
        found = [
            s
            for s in running
            if (s.class_rank > rank or (s.class_rank == rank and s.priority > priority))
            and not s.promoted
            and displaces(waiter, s)
        ]
        if found or not self._peer_may:
            return found, False
        self._peer_may = False
        return [s for s in running if not s.promoted and displaces(waiter, s)], True

    def _first_few(
        self,
        candidates: List[Sequence],
        running: List[Sequence],
        situation: Situation | None = None,
        eligible: Callable[[Sequence], bool] | None = None,
    ) -> list[Sequence]:
        """By the victim policy, of those who are `eligible`; None: all are. It is asked last: a price may be known.

        `situation`: theirs, if it is known.
        """
        self._price(candidates, running, situation)
        in_order = (sequence for *_, sequence in sorted(self._ranked(candidates)))
        return list(islice(filter(eligible, in_order) if eligible else in_order, NAMED))

    def _price(
        self, candidates: List[Sequence], running: List[Sequence], situation: Situation | None = None
    ) -> None:
        """Sees to it that all of them have an offer."""
        offers = self._offers
        missing = [each for each in candidates if each.admitted_as not in offers]
        if missing:
            if situation is None:
                situation = self.valuation.situation(running)
            for each in missing:
                offers[each.admitted_as] = Offer(each, self.valuation, situation)

    def _ranked(self, candidates: List[Sequence]) -> list[Ranked]:
        """All of them, who have offers, with their places by the victim policy. The lowest goes first."""
        victim, offers = self.policies.victim, self._offers
        return [(victim(s, offers[s.admitted_as]), s.admitted_as, s) for s in candidates]

    def _pays(
        self,
        waiter: Sequence,
        waiting: int,
        victim: Sequence,
        running: List[Sequence],
        situation: Situation,
    ) -> bool:
        """Whether what the waiter would wait for somebody's natural end, weighted, is more than the victim's price: for
        each in line, as each is let in one such end sooner.

        A victim that gave way already costs more each time, so two never displace each other for long.
        """
        offer = Offer(victim, self.valuation, situation)
        rounds = min(sequence.expected_remaining_tokens for sequence in running)
        gain = waiting * waiter.weight * rounds * situation.step_seconds
        return offer.frees > 0 and offer.price * offer.frees < gain

    def _preempted(self, few: List[Sequence], policy: str, reason: str) -> tuple[Sequence, Decision]:
        """The first of these gives way."""
        victim = few[0]
        prices = tuple(Alternative(each.request.id, self._offer(each).price) for each in few)
        return victim, Decision(Kind.PREEMPTED, policy, victim.request.id, reason, None, prices)
