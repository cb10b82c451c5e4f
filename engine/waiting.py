"""The line of waiters: a heap by the order policy's key, so that ten thousand of them are not sorted at each step.

The line owns a waiter's rank: the order's key, and above it promotion (policies/promotion.py). While it waits a key may
grow, or fall after a new look at the cache: what comes up is looked at again, so growth is noticed in time. By an order
whose keys grow for all of a tenant's waiters at once, only each tenant's first stands in the heap.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import chain

from engine.sequence import Sequence, State
from policies.order import Order
from policies.promotion import Promotion

STALE = 64
"""Entries of sequences that have left that each heap may hold beyond as many as it has waiters."""

Entry = tuple[tuple[float, ...], int, int, Sequence]
"""(rank, order of arrival, ticket, waiter): one of several of a sequence counts, that with its ticket."""

Spell = tuple[float, int, int, Sequence]
"""(when it began, ticket, epoch, waiter) of one spell of waiting: by the time, or by what had been served."""


class WaitingLine:
    """Sequences in state WAITING. One that ends where it stands is told by `left`; its entry goes when it comes up."""

    def __init__(self, order: Order, promotion: Promotion) -> None:
        self._order = order
        self._promotion = promotion
        self._heap: list[Entry] = []
        # heaps: who comes from another replica may have waited longer by the one, and less by the other
        self._by_service: list[Spell] = []
        self._by_time: list[Spell] = []
        # where the order is by tenant: who of it stands in the heap, and a heap by arrival of those behind
        self._first_of: dict[str, Sequence] = {}
        self._behind: dict[str, list[tuple[int, int, Sequence]]] = {}
        self._tickets = 0
        self._left_behind = 0  # entries in all of `_behind`
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """All waiters, in no order but that the first is the first."""
        in_front = ((ticket, sequence) for *_, ticket, sequence in self._heap)
        behind = ((ticket, sequence) for entries in self._behind.values() for _, ticket, sequence in entries)
        everyone = chain(in_front, behind)
        return (sequence for ticket, sequence in everyone if _stands(sequence) and sequence.ticket == ticket)

    def enter(self, sequence: Sequence, now: float, served: int) -> str | None:
        """A spell of waiting begins, at a time when `served` tokens have been computed for anybody.

        Returns why it is promoted at once, if it is.
        """
        sequence.waiting_since, sequence.served_before, sequence.promoted = now, served, ""
        reason = self._promotion.reason_at_enqueue(sequence)
        sequence.promoted = reason or ""
        self.go_on(sequence)
        return reason

    def go_on(self, sequence: Sequence) -> None:
        """A spell of waiting goes on: it had left the line, here or elsewhere, and is back without having run."""
        self.put_back(sequence)
        bounds, spell = self._promotion, (sequence.ticket, sequence.epoch, sequence)
        if bounds.service_tokens:
            heappush(self._by_service, (sequence.served_before, *spell))
        if bounds.wait_seconds:
            heappush(self._by_time, (sequence.waiting_since, *spell))
        self._clear_away()

    def put_back(self, sequence: Sequence) -> None:
        """A waiter that was popped, and could not move."""
        assert sequence.state is State.WAITING
        self._count += 1
        self._push(sequence)

    def first(self) -> Sequence | None:
        while self._heap:
            entry = self._heap[0]
            if not _counts(entry):
                heappop(self._heap)
                self._gone(entry[-1])
            elif (rank := self._rank(entry[-1])) > entry[0]:
                heappop(self._heap)
                heappush(self._heap, (rank, *entry[1:]))
            else:
                return entry[-1]
        return None

    def pop(self) -> Sequence:
        """Takes the first out: `first` has just returned it."""
        self._count -= 1
        sequence = heappop(self._heap)[-1]
        sequence.ticket = 0
        self._gone(sequence)
        return sequence

    def left(self) -> None:
        """A waiter's state is no longer WAITING. Clients may come and leave while the first cannot move."""
        self._count -= 1
        self._clear_away()

    def _clear_away(self) -> None:
        """What is left of those who left goes when it comes up, or here: behind one who waits long it never would."""
        most = 2 * self._count + STALE
        if len(self._heap) + self._left_behind > most:
            self._rank_anew()
        for spells in (self._by_service, self._by_time):
            if len(spells) > most:
                spells[:] = filter(_lasts, spells)
                heapify(spells)

    def next_few(self, count: int) -> list[Sequence]:
        """The first, and some of those that follow it soon: the top of the heap, unsorted."""
        return [entry[-1] for entry in self._heap[:count] if _counts(entry)]

    def look_again(self, sequence: Sequence) -> None:
        """What its rank depends on has changed, perhaps for the better."""
        if sequence.ticket:
            self._push(sequence)

    def promote(self, now: float, served: int) -> list[Sequence]:
        """Those whose wait has reached a bound go before all others from now on."""
        bounds = self._promotion
        return [
            *self._due(self._by_service, served, bounds.service_tokens, "service"),
            *self._due(self._by_time, now, bounds.wait_seconds, "wait"),
        ]

    def _due(self, spells: list[Spell], now: float, bound: float, reason: str) -> Iterator[Sequence]:
        """Promotes those whose spell has lasted for `bound` by now; 0: nobody."""
        while spells:
            began, *_, sequence = spells[0]
            if _lasts(spells[0]):
                if not 0 < bound <= now - began:
                    return  # those behind it have waited less
                sequence.promoted = reason
                self.look_again(sequence)
                yield sequence
            heappop(spells)

    def due(self, sequence: Sequence, now: float, served: int) -> str:
        """Which bound has been reached since it began to wait, if one has."""
        bounds = self._promotion
        if 0 < bounds.service_tokens <= served - sequence.served_before:
            return "service"
        return "wait" if 0 < bounds.wait_seconds <= now - sequence.waiting_since else ""

    def use(self, order: Order, promotion: Promotion) -> None:
        """All ranks are by these from now on. Thresholds are on that were so before: spells are kept for them alone."""
        self._order, self._promotion = order, promotion
        self._rank_anew()

    def _rank_anew(self) -> None:
        waiting = list(self)
        self._heap.clear()
        self._first_of.clear()
        self._behind.clear()
        self._left_behind = 0
        for sequence in waiting:
            self._push(sequence)

    def _push(self, sequence: Sequence) -> None:
        self._tickets += 1
        sequence.ticket = self._tickets
        if self._by_tenant and not sequence.promoted:
            first = self._first_of.get(sequence.tenant)
            if first is not None and first is not sequence and first.number < sequence.number:
                behind = self._behind.setdefault(sequence.tenant, [])
                heappush(behind, (sequence.number, sequence.ticket, sequence))
                self._left_behind += 1
                return
            self._first_of[sequence.tenant] = sequence
        heappush(self._heap, (self._rank(sequence), sequence.number, sequence.ticket, sequence))

    @property
    def _by_tenant(self) -> bool:
        return getattr(self._order, "by_tenant", False)

    def _gone(self, sequence: Sequence) -> None:
        """An entry has left the heap: if it was its tenant's first, the next stands there now."""
        tenant = sequence.tenant
        if self._first_of.get(tenant) is not sequence or _stands(sequence):
            return
        del self._first_of[tenant]
        behind = self._behind.get(tenant, [])
        while behind and tenant not in self._first_of:
            _, ticket, following = heappop(behind)
            self._left_behind -= 1
            if _stands(following) and following.ticket == ticket:
                self._first_of[tenant] = following
                heappush(self._heap, (self._rank(following), following.number, ticket, following))
        if not behind:
            self._behind.pop(tenant, None)

    def _rank(self, sequence: Sequence) -> tuple[float, ...]:
        """Promoted ones by arrival, before all others by the order's key."""
        return (0.0,) if sequence.promoted else (1.0, *self._order(sequence))


def _counts(entry: Entry) -> bool:
    """Whether it is the entry of a waiter that counts."""
    return _stands(entry[-1]) and entry[-1].ticket == entry[-2]


def _lasts(spell: Spell) -> bool:
    """Whether somebody still waits so, and for promotion too."""
    _, _, epoch, sequence = spell
    return sequence.state is State.WAITING and sequence.epoch == epoch and not sequence.promoted


def _stands(sequence: Sequence) -> bool:
    """Whether it is in the line: set aside, it has no ticket."""
    return sequence.state is State.WAITING and sequence.ticket != 0
