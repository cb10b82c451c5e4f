"""The line of waiters: a heap by the order policy's key, so that ten thousand of them are not sorted at each step."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from engine.sequence import Sequence, State
from policies.order import Order

STALE = 64
"""Entries of ended sequences that the heap may hold beyond as many as it has waiters."""


class WaitingLine:
    """Sequences in state WAITING. One that ends where it stands is told by `left`; its entry goes when it comes up."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._heap: list[tuple[tuple[float, ...], int, int, Sequence]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """All waiters, in no order but that the first is the first."""
        return (entry[-1] for entry in self._heap if entry[-1].state is State.WAITING)

    def add(self, sequence: Sequence) -> None:
        assert sequence.state is State.WAITING
        self._count += 1
        self._push(sequence)

    def first(self) -> Sequence | None:
        while self._heap:
            *_, sequence = self._heap[0]
            if sequence.state is State.WAITING:
                return sequence
            heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        """Takes the first out: `first` has just returned it."""
        self._count -= 1
        sequence: Sequence = heappop(self._heap)[-1]
        return sequence

    def left(self) -> None:
        """A waiter's state is no longer WAITING. Clients may come and leave while the first cannot move."""
        self._count -= 1
        if len(self._heap) > 2 * self._count + STALE:
            self._heap = [entry for entry in self._heap if entry[-1].state is State.WAITING]
            heapify(self._heap)

    def next_few(self, count: int) -> list[Sequence]:
        """The first, and some of those that follow it soon: the top of the heap, unsorted."""
        return [entry[-1] for entry in self._heap[:count] if entry[-1].state is State.WAITING]

    def _push(self, sequence: Sequence) -> None:
        heappush(self._heap, (self._order(sequence), sequence.number, sequence.epoch, sequence))
