"""Entries of one shelf that may leave it, in the order of the eviction policy (`policies/eviction.py`). Pure.

Each stands in its group once per order, under a ticket; one that has been used or withdrawn leaves its old items
behind, which are dropped when they come up. Groups are ranked by what their candidates are worth: all anew after RANKED
evictions or a second, as worth changes with time; in between those that got an entry, and the one whose turn it is. So
an eviction is O(log n), amortised, and what it compares is at most that old.
"""

from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from policies.eviction import Eviction
from policies.views import BlockView

RANKED, RANKED_SECONDS = 64, 1.0


class Candidate(BlockView, Protocol):
    ticket: int  # 0: it does not stand here


C = TypeVar("C", bound=Candidate)
Heap = list[tuple[tuple[float, ...], int, C]]  # score, ticket, entry


class Candidates(Generic[C]):
    def __init__(self, eviction: Eviction) -> None:
        self._eviction = eviction
        self._groups: dict[int, tuple[Heap[C], ...]] = {}
        self._ranking: list[
            tuple[float, int]
        ] = []  # (worth of its candidate, group): a heap, with old places
        self._worths: dict[int, float] = {}  # by group, as ranked last
        self._unranked: dict[int, None] = {}  # groups that got an entry since
        self._ranked_at = 0.0
        self._unranked_after = 0  # evictions until all are ranked anew
        self._tickets = 0
        self._standing = 0
        self._items = 0

    def __len__(self) -> int:
        return self._standing

    def put(self, entry: C) -> None:
        """Takes an entry in, or moves one whose group or scores have changed."""
        self._standing += not entry.ticket
        self._tickets += 1
        entry.ticket = self._tickets
        group, scores = self._eviction.group(entry), self._eviction.scores(entry)
        heaps = self._groups.get(group)
        if heaps is None:
            heaps = self._groups[group] = tuple([] for _ in scores)
        for heap, score in zip(heaps, scores, strict=True):
            heappush(heap, (score, entry.ticket, entry))
        self._unranked[group] = None
        self._items += len(heaps)
        if self._items > 2 * len(heaps) * self._standing + 64:
            self._tidy()

    def withdraw(self, entry: C) -> None:
        """It may not leave any more, or is gone. Nothing, if it does not stand here."""
        self._standing -= entry.ticket > 0
        entry.ticket = 0

    def pop(self, now: float) -> C | None:
        """The one to leave, taken out; None when there is none."""
        if not self._unranked_after or abs(now - self._ranked_at) > RANKED_SECONDS:
            self._ranked_at, self._unranked_after, self._ranking = now, RANKED, []
            self._unranked = dict.fromkeys(self._groups)
        self._unranked_after -= 1
        for group in self._unranked:
            self._rank(group, now)
        self._unranked = {}
        while self._ranking:
            worth, group = heappop(self._ranking)
            if self._worths.get(group) != worth:
                continue
            found = self._rank(group, now)
            if found and found[0] <= worth:
                self.withdraw(found[1])
                return found[1]
        return None

    def _rank(self, group: int, now: float) -> tuple[float, C] | None:
        """Gives a group its place by what `_least` finds in it, or ends it."""
        found = self._least(group, now)
        if found is None:
            del self._groups[group]
            self._worths.pop(group, None)
        else:
            self._worths[group] = found[0]
            heappush(self._ranking, (found[0], group))
        return found

    def _least(self, group: int, now: float) -> tuple[float, C] | None:
        """The candidate of a group that is worth least, and its worth; the first order's, where they are equal."""
        found: tuple[float, C] | None = None
        for heap in self._groups[group]:
            while heap and heap[0][1] != heap[0][2].ticket:
                heappop(heap)
                self._items -= 1
            if heap:
                entry = heap[0][2]
                worth = self._eviction.worth(entry, now)
                if found is None or worth < found[0]:
                    found = (worth, entry)
        return found

    def _tidy(self) -> None:
        """Most items are left behind: drops those."""
        self._items = 0
        for heaps in self._groups.values():
            for heap in heaps:
                heap[:] = [item for item in heap if item[1] == item[2].ticket]
                heapify(heap)
                self._items += len(heap)

    def check(self) -> None:
        """Asserts that the books balance."""
        items = [heap for heaps in self._groups.values() for heap in heaps]
        assert self._items == sum(map(len, items)), "items are counted wrongly"
        ranked = {group for worth, group in self._ranking if self._worths.get(group) == worth}
        assert ranked | self._unranked.keys() >= self._groups.keys(), "a group is not ranked"
        firsts = [heaps[0] for heaps in self._groups.values()]
        standing = [entry for heap in firsts for _, ticket, entry in heap if ticket == entry.ticket]
        assert len(standing) == self._standing, "an entry that may leave is lost"
