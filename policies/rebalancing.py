"""Which sequences move to another replica, decided on a frozen snapshot of all replicas.

A policy returns moves in the order in which they pay; carrying them out, and giving one up, is the fleet's. No
sequence is in two moves of a round, so rounds end. The snapshot has all replicas; only those that accept take part.
Where requests go at first: routing.py.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby
from math import inf
from typing import Protocol


class LoadView(Protocol):
    """A replica in the snapshot."""

    @property
    def number(self) -> int: ...

    @property
    def role(self) -> str:
        """ "any", "long" or "burst"."""

    @property
    def limit_tokens(self) -> int:
        """Of size classes: prompt and output up to here belong here; 0: no limit."""

    @property
    def capacity_tokens(self) -> int:
        """KV positions that its device has."""

    @property
    def used_tokens(self) -> int:
        """Of these, what sequences hold now."""

    @property
    def slots_left(self) -> int:
        """Sequences that may run beside those that do."""

    @property
    def backlog_seconds(self) -> float:
        """Predicted device seconds of all that are here."""

    @property
    def accepting(self) -> bool:
        """Up, and not draining."""

    @property
    def waiting(self) -> int:
        """Sequences that wait here for room."""

    @property
    def requests(self) -> int:
        """Sequences that are here."""


class MovableView(Protocol):
    """A sequence in the snapshot."""

    @property
    def request(self) -> str: ...

    @property
    def choice(self) -> int: ...

    @property
    def replica(self) -> int:
        """Where it is, by number."""

    @property
    def load_seconds(self) -> float:
        """What its replica's backlog falls by when it leaves."""

    @property
    def disturbs_seconds(self) -> float:
        """What it delays each of those that are where it is: its prompt, and what it adds to steps."""

    @property
    def tokens(self) -> int:
        """KV positions held now."""

    @property
    def size_tokens(self) -> float:
        """KV positions expected at its end."""

    @property
    def remaining_tokens(self) -> float:
        """Expected to be generated yet."""

    @property
    def cost_seconds(self) -> float:
        """Of the move: pause and transfer as predicted, weighted."""

    @property
    def moves(self) -> int:
        """How often it has been moved."""

    @property
    def moved_at(self) -> float:
        """When, the last time, or when a move of it failed; -inf: never."""

    @property
    def waits(self) -> bool:
        """Whether it has no place on its replica yet."""

    @property
    def crossed(self) -> bool:
        """Whether it has been moved up for its size before."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What keeps moves few. `min_gain`: a gain must be above so many times the cost."""

    cooldown_seconds: float = 10.0  # of one sequence, between two moves
    max_moves: int = 3  # of one sequence, ever
    moves_per_round: int = 4
    min_gain: float = 8.0
    least_gap: float = 0.0  # share of the high one's load that a pair must differ by
    disturbance: float = 0.1  # what a second of others' delay counts

    def __post_init__(self) -> None:
        if min(self.cooldown_seconds, self.max_moves, self.moves_per_round) < 0:
            raise ValueError("cooldown_seconds, max_moves and moves_per_round must not be negative")
        if not self.min_gain >= 1.0:
            raise ValueError("min_gain must be at least 1")
        if not self.disturbance >= 0.0:
            raise ValueError("disturbance must not be negative")
        if not 0.0 <= self.least_gap < 1.0:
            raise ValueError("least_gap must be at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class Move:
    """`reason`: for people. `gain_seconds`: what the difference of the two replicas' backlogs falls by, as predicted.

    `for_size`: it has outgrown its replica's limit; it is then `crossed`.
    """

    request: str
    choice: int
    source: int
    target: int
    reason: str
    gain_seconds: float
    cost_seconds: float
    for_size: bool = False


@dataclass(frozen=True, slots=True)
class Round:
    """`stayed`: sequences that should move up for their size now, but there is no room."""

    moves: tuple[Move, ...] = ()
    stayed: int = 0


Rebalancing = Callable[[Sequence[LoadView], Sequence[MovableView], float, Limits], Round]
"""(replicas, sequences, now, limits) → a round. It changes nothing."""


def none(loads: Sequence[LoadView], movables: Sequence[MovableView], now: float, limits: Limits) -> Round:
    """Every sequence ends where it was placed.

    Worst case: those that routing took for short run long, all on one replica. Source: every router without
    migration.
    """
    return Round()


def load_pairs(
    loads: Sequence[LoadView], movables: Sequence[MovableView], now: float, limits: Limits
) -> Round:
    """The highest backlog is paired with the lowest, the second highest with the second lowest, …, and from the high
    one of each pair the sequence moves whose load is nearest to half the gap. Then again, with loads as they are then,
    until no pair has such a move.

    Only between replicas that differ by more than `least_gap`. Only a sequence whose move repays it: the gap of the
    pair must fall by more than `min_gain` × its cost, which is so for no load of the gap's size or above. If more are
    at the low one than at the high one, its cost has what it delays these: a load that is high as few long ones are
    there stays with those whom it delays least. And only if the target has room for it as long as expected, a slot if
    it runs, and takes its size. By each move Σ load² falls, as it does by 2 · load · (gap − load). Pools are balanced
    each by itself: it is for routing to spill between them. It never moves one within `cooldown_seconds` of its last
    move, or of one that failed, nor more than `max_moves` times in all: loads that go up and down cannot send it back
    and forth.

    Assumes that a load is the same on either replica. Ties: the cheaper move, then who moved less often, then by
    request and choice; of replicas, the lower number is the higher one. Worst case: a gap that consists of one
    sequence, which no move mends; where costs and room do not bind, the highest load of m replicas is then within
    2 − 2/(m + 1) of the least possible. O(moves × sequences). Source: pairs are ours; Finn and Horowitz, "A Linear
    Time Approximation Algorithm for Multiprocessor Scheduling", 1979, for the bound; Llumnix, Sun et al., OSDI'24,
    for pairing the most with the least loaded of LLM instances.
    """
    books = _Books(loads)
    mobile: dict[int, list[MovableView]] = {load.number: [] for load in loads}
    for each in movables:
        if each.moves < limits.max_moves and now - each.moved_at >= limits.cooldown_seconds:
            mobile[each.replica].append(each)
    by_load: dict[int, _ByLoad] = {}  # of those that have been a high one
    moves: list[Move] = []
    while True:
        before = len(moves)
        for high, low in _pairs(loads, books, limits.least_gap):
            if len(moves) == limits.moves_per_round:
                return Round(tuple(moves))
            if high.number not in by_load:
                by_load[high.number] = _ByLoad(mobile[high.number])
            chosen = _nearest_to_half(high, low, by_load[high.number], books, limits)
            if chosen:
                reason = f"{books.seconds[high.number]:.3g} s here, {books.seconds[low.number]:.3g} s there"
                moves.append(books.move(chosen, low.number, reason))
                by_load[high.number].remove(chosen)
        if len(moves) == before:
            return Round(tuple(moves))


def cache_size(
    loads: Sequence[LoadView], movables: Sequence[MovableView], now: float, limits: Limits
) -> Round:
    """A sequence that holds more than its replica's limit moves up: to the smallest limit that it fits in at its end.

    Replicas stand in ascending order of their limits, those without one last. A sequence moves up once: to where its
    expected size belongs, or if that is above all limits of those that accept, to the highest of them. If all of
    these are full, it stays, and is counted, in every round in which it is so. Of `limits`, only `moves_per_round` is
    heeded: a move for size is neither repaid nor repeated.

    Assumes that the load of a class comes from sequences of its size (sizes.py). Ties: replicas of one limit by
    backlog, then number; of sequences the longest first, which make room for those that come from below, then by
    request and choice. Worst case: all sequences cross a limit at about the same length, and all their KV is moved;
    at most once each. Source: ours; size intervals as in Harchol-Balter, Crovella and Murta, 1999, without a size
    known in advance as in "Task Assignment with Unknown Duration", Harchol-Balter, 2002.
    """
    books = _Books(loads)
    limit = {load.number: load.limit_tokens or inf for load in loads}
    accepting = {load.number for load in loads if load.accepting}
    crossing = [
        each
        for each in movables
        if not each.crossed and each.tokens > limit[each.replica] and each.replica in accepting
    ]
    crossing.sort(key=lambda each: (-each.tokens, each.request, each.choice))
    moves: list[Move] = []
    stayed = 0
    for each in crossing:
        above = [load for load in loads if limit[load.number] > limit[each.replica]]
        highest = max((limit[load.number] for load in above if load.number in accepting), default=0.0)
        fitting = [
            load
            for load in above
            if load.number in accepting
            and limit[load.number] >= min(_at_end(each), highest)
            and books.has_room(load, each)
        ]
        if fitting and len(moves) < limits.moves_per_round:
            target = min(
                fitting, key=lambda load: (limit[load.number], books.seconds[load.number], load.number)
            )
            reason = f"{each.tokens} tokens, above {limit[each.replica]:.0f}"
            moves.append(books.move(each, target.number, reason, for_size=True))
        elif above and not fitting:
            stayed += 1
    return Round(tuple(moves), stayed)


REBALANCINGS: Mapping[str, Rebalancing] = {
    "none": none,
    "load_pairs": load_pairs,
    "cache_size": cache_size,
}


class _Books:
    """Loads and room as they will be after the moves so far."""

    def __init__(self, loads: Iterable[LoadView]) -> None:
        self.seconds = {each.number: each.backlog_seconds for each in loads}
        self._free = {each.number: float(each.capacity_tokens - each.used_tokens) for each in loads}
        self._slots = {each.number: each.slots_left for each in loads}

    def gap(self, high: LoadView, low: LoadView) -> float:
        return self.seconds[high.number] - self.seconds[low.number]

    def has_room(self, target: LoadView, movable: MovableView) -> bool:
        """For all that it is expected to hold at its end; and a slot, if it has one now."""
        if not (movable.waits or self._slots[target.number] > 0):
            return False
        return _at_end(movable) <= self._free[target.number]

    def move(self, movable: MovableView, target: int, reason: str, *, for_size: bool = False) -> Move:
        source, load = movable.replica, movable.load_seconds
        gain = _gain(self.seconds[source] - self.seconds[target], load)
        self.seconds[source] -= load
        self.seconds[target] += load
        self._free[source] += movable.tokens
        self._free[target] -= _at_end(movable)
        if not movable.waits:
            self._slots[source] += 1
            self._slots[target] -= 1
        cost = movable.cost_seconds
        return Move(movable.request, movable.choice, source, target, reason, gain, cost, for_size)


def _at_end(movable: MovableView) -> float:
    """KV positions: what is expected, but no less than it holds already."""
    return max(movable.tokens, movable.size_tokens)


def _gain(gap: float, load: float) -> float:
    """What a pair's imbalance falls by when `load` goes from the high one to the low one."""
    return abs(gap) - abs(gap - 2 * load)


Check = Callable[[MovableView], bool]


class _ByLoad:
    """Who may move from one replica. There may be ten thousand, many of them of one load: few are to be priced."""

    def __init__(self, movables: Iterable[MovableView]) -> None:
        self._alike: dict[float, list[MovableView]] = {}
        for each in movables:
            self._alike.setdefault(each.load_seconds, []).append(each)
        self._loads = sorted(self._alike)
        self._in_order: set[float] = set()  # loads of which the cheapest stands first

    def outwards(self, gap: float) -> Iterable[Iterable[float]]:
        """Loads above 0 and below the gap, from those nearest to its half on; those that are as near together."""
        loads, half = self._loads, gap / 2
        first, middle, end = bisect_right(loads, 0.0), bisect_left(loads, half), bisect_left(loads, gap)

        def from_half(load: float) -> float:
            return abs(load - half)

        outwards = merge(reversed(loads[first:middle]), loads[middle:end], key=from_half)
        return (near for _, near in groupby(outwards, key=from_half))

    def cheapest(self, load: float, fits: Check, repays: Check) -> MovableView | None:
        """Of that load, among those that fit and whose move repays it."""
        alike = self._alike[load]
        if load not in self._in_order:
            if not any(map(fits, alike)):
                return None
            alike.sort(key=_preference)
            self._in_order.add(load)
        return next((each for each in alike if fits(each) and repays(each)), None)

    def remove(self, movable: MovableView) -> None:
        self._alike[movable.load_seconds].remove(movable)


def _preference(movable: MovableView) -> tuple[float, int, str, int]:
    return movable.cost_seconds, movable.moves, movable.request, movable.choice


def _pairs(loads: Iterable[LoadView], books: _Books, least_gap: float) -> list[tuple[LoadView, LoadView]]:
    """Of each role, highest and lowest, second highest and second lowest, …; one in the middle has no partner.

    Without those that differ by no more than `least_gap`, as a share of the higher.
    """
    pools: dict[str, list[LoadView]] = {}
    for each in sorted(loads, key=lambda each: (-books.seconds[each.number], each.number)):
        if each.accepting:
            pools.setdefault(each.role, []).append(each)
    return [
        (high, low)
        for pool in pools.values()
        for high, low in zip(pool[: len(pool) // 2], reversed(pool), strict=False)
        if books.gap(high, low) > least_gap * books.seconds[high.number]
    ]


def _nearest_to_half(
    high: LoadView, low: LoadView, here: _ByLoad, books: _Books, limits: Limits
) -> MovableView | None:
    """Of those whose move repays it and for which the low one has room."""
    gap, limit = books.gap(high, low), low.limit_tokens or inf
    crowd = limits.disturbance * max(0, low.requests - high.requests)

    def fits(each: MovableView) -> bool:
        return max(each.tokens, each.size_tokens) <= limit and books.has_room(low, each)

    def repays(each: MovableView) -> bool:
        cost = each.cost_seconds + crowd * each.disturbs_seconds
        return _gain(gap, each.load_seconds) > cost * limits.min_gain

    for near in here.outwards(gap):
        found = [here.cheapest(load, fits, repays) for load in near]
        if worth := [each for each in found if each]:
            return min(worth, key=_preference)
    return None
