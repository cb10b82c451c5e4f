"""Who computes what in the next step: grow → preempt → admit → build. Pure; no clock but the `now` it is given.

Decides with the policies of the configuration; owns the waiting heap, the running list, the runner's slots and the
device pool's books. What happens to tokens is core.py's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from engine.plan import Placement, Row
from engine.sequence import Sequence, State
from kvstore.block import Key
from kvstore.device import DevicePool
from policies.order import ORDERS
from policies.preemption import VICTIMS

PASSED_OVER = 32
"""Waiters that one step passes over, at most, because their next block is being computed: each costs a look-up."""

STALE = 64
"""Entries of ended sequences that the waiting heap may hold beyond as many as it has waiters."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    block_size: int  # tokens
    blocks: int  # of the device pool
    max_batch_tokens: int  # the token budget of a step
    max_sequences: int  # running at once
    order: str = "fcfs"
    victim: str = "last_admitted"


@dataclass(slots=True)
class Scheduled:
    """The next step's rows, with the sequences they belong to, in the same order."""

    placements: list[Placement]
    rows: list[Row]
    sequences: list[Sequence]
    recomputed_tokens: int


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = DevicePool(config.blocks)
        self.running: list[Sequence] = []
        self.prefix_queries = 0  # tokens looked up in the prefix cache, and of these …
        self.prefix_hits = 0  # … found, both at first admissions alone
        self.prompt_tokens = 0  # of requests admitted, each counted once
        self.preemptions = 0
        self.resumptions = 0
        self._order = ORDERS[config.order]
        self._victim = VICTIMS[config.victim]
        self._waiting: list[tuple[tuple[float, ...], int, int, Sequence]] = []
        self._waiting_count = 0
        self._slots = list(range(config.max_sequences - 1, -1, -1))
        self._admissions = 0
        self._computing: dict[Key, Sequence] = {}  # who is about to cache which block

    # --- one step -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Scheduled | None:
        """The next step, or None when there is nothing to compute. Marks what it hands out as scheduled."""
        shares: dict[Sequence, int] = {}
        budget = self._grow(shares, now)
        placed = self._admit(shares, budget, now)
        return self._build(shares, placed) if shares else None

    def _grow(self, shares: dict[Sequence, int], now: float) -> int:
        """Gives the running their tokens, those in decode first, preempting where blocks run out.

        Returns the budget left for newcomers: none after a preemption.
        """
        budget, preempted = self.config.max_batch_tokens, False
        for sequence in sorted(self.running, key=lambda s: (s.remaining > 1, self._order(s))):
            count = min(sequence.remaining, budget)
            if count <= 0 or sequence.state is not State.RUNNING:
                continue
            while (missing := self._missing_blocks(sequence, count)) > self.pool.available:
                victim = self._choose_victim()
                preempted = True
                budget += shares.pop(victim, 0)
                self.preempt(victim, now)
                if victim is sequence:
                    break
            else:
                sequence.table += self.pool.allocate(missing)
                shares[sequence] = count
                budget -= count
        return 0 if preempted else budget

    def _missing_blocks(self, sequence: Sequence, count: int) -> int:
        return max(0, -(-(sequence.scheduled + count) // self.config.block_size) - len(sequence.table))

    def _choose_victim(self) -> Sequence:
        victim = self._victim(self.running)
        assert isinstance(victim, Sequence)
        return victim

    def preempt(self, sequence: Sequence, now: float) -> None:
        """Takes a running sequence's blocks and slot; it waits again, and its KV is computed again."""
        computed_in_the_end = sequence.scheduled  # void or not, the rows under way are computed
        sequence.computed_before = max(sequence.computed_before, computed_in_the_end)
        self._leave(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.enqueue(sequence, now)

    def _admit(self, shares: dict[Sequence, int], budget: int, now: float) -> list[Sequence]:
        """Takes waiters in while the budget, the slots and the pool have room for all their tokens."""
        placed: list[Sequence] = []
        set_aside: list[Sequence] = []
        while budget > 0 and self._slots and len(set_aside) < PASSED_OVER and (sequence := self._peek()):
            reusable = self._reusable_keys(sequence)
            matched = self.pool.match(reusable)
            if len(matched) < len(reusable) and reusable[len(matched)] in self._computing:
                # Someone computes its next block right now: never compute it twice.
                set_aside.append(self._pop())
                continue
            if not self._take_blocks(sequence, matched):
                break
            self._pop()
            self._start(sequence, len(matched), now)
            shares[sequence] = min(sequence.remaining, budget)
            budget -= shares[sequence]
            placed.append(sequence)
        for sequence in set_aside:
            self._push(sequence)
        return placed

    def _reusable_keys(self, sequence: Sequence) -> list[Key]:
        """Keys of the blocks that need not be computed when cached: all full ones short of the last token."""
        keys = sequence.block_keys(self.config.block_size)
        return keys[: (len(sequence.tokens) - 1) // self.config.block_size]

    def _take_blocks(self, sequence: Sequence, matched: list[int]) -> bool:
        """Holds the matched blocks and room for the rest, all or nothing; one block is left for those who run."""
        self.pool.hold(matched)
        missing = -(-len(sequence.tokens) // self.config.block_size) - len(matched)
        if missing + bool(self.running) > self.pool.available:
            self.pool.release(matched)
            return False
        sequence.table = matched + self.pool.allocate(missing)
        return True

    def _start(self, sequence: Sequence, matched_blocks: int, now: float) -> None:
        """The books of an admission: slot, positions, keys under way, what the client waited and found cached."""
        matched = matched_blocks * self.config.block_size
        if sequence.admissions == 0:
            sequence.admitted, sequence.cached_tokens = now, matched
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += matched
            self.prompt_tokens += sequence.prompt_tokens if sequence.choice == 0 else 0
        else:
            self.resumptions += 1
        sequence.admissions += 1
        sequence.queued_seconds += now - sequence.waiting_since
        sequence.admitted_as = self._admissions
        self._admissions += 1
        sequence.state, sequence.slot, sequence.told = State.RUNNING, self._slots.pop(), 0
        sequence.scheduled = sequence.computed = matched
        sequence.published = matched_blocks
        for key in sequence.keys[matched_blocks:]:
            self._computing.setdefault(key, sequence)
        self._waiting_count -= 1
        self.running.append(sequence)

    def _build(self, shares: dict[Sequence, int], placed: Iterable[Sequence]) -> Scheduled:
        placements = [Placement(sequence.slot, sequence.sampling) for sequence in placed]
        recomputed = sum(self._advance_recomputed(sequence, count) for sequence, count in shares.items())
        rows = [self._row(sequence, count) for sequence, count in shares.items()]
        return Scheduled(placements, rows, list(shares), recomputed)

    @staticmethod
    def _advance_recomputed(sequence: Sequence, count: int) -> int:
        again = max(0, min(sequence.computed_before, sequence.scheduled + count) - sequence.scheduled)
        sequence.recomputed_tokens += again
        return again

    @staticmethod
    def _row(sequence: Sequence, count: int) -> Row:
        """Hands out `count` positions: from here on they count as scheduled, and the token drawn as pending."""
        samples = count == sequence.remaining
        row = Row(
            slot=sequence.slot,
            start=sequence.scheduled,
            tokens=sequence.next_tokens(count),
            blocks_at=sequence.told,
            blocks=tuple(sequence.table[sequence.told :]),
            samples=samples,
        )
        sequence.told = len(sequence.table)
        sequence.scheduled += count
        sequence.pending += samples
        return row

    # --- positions computed, sequences gone -----------------------------------------------------------------------

    def computed(self, sequence: Sequence, positions: int) -> None:
        """KV of the first `positions` tokens is on the device: caches the blocks that are full and known."""
        sequence.computed = positions
        sequence.computed_before = max(sequence.computed_before, positions)
        full = positions // self.config.block_size
        if full == sequence.published:
            return
        keys = sequence.block_keys(self.config.block_size)
        for index in range(sequence.published, full):
            self._cache_block(sequence, index, keys[index])
        sequence.published = full

    def _cache_block(self, sequence: Sequence, index: int, key: Key) -> None:
        block = self.pool.publish(sequence.table[index], key)
        if block != sequence.table[index]:
            sequence.table[index] = block
            sequence.told = min(sequence.told, index)
        self._no_longer_computing(sequence, key)

    def _no_longer_computing(self, sequence: Sequence, *keys: Key) -> None:
        for key in keys:
            if self._computing.get(key) is sequence:
                del self._computing[key]

    def retire(self, sequence: Sequence, now: float) -> None:
        """A sequence has ended, wherever it stands: nothing of it stays but its cached blocks."""
        if sequence.state is State.RUNNING:
            self._leave(sequence)
        elif sequence.state is State.WAITING:
            self._waiting_count -= 1  # its heap entry is skipped when it comes up
            sequence.queued_seconds += now - sequence.waiting_since
        sequence.state = State.FINISHED
        self._drop_stale()

    def _leave(self, sequence: Sequence) -> None:
        self._no_longer_computing(sequence, *sequence.keys[sequence.published :])
        self.pool.release(sequence.table)
        self._slots.append(sequence.slot)
        self.running.remove(sequence)
        sequence.table, sequence.slot, sequence.epoch = [], -1, sequence.epoch + 1
        sequence.scheduled = sequence.computed = sequence.pending = sequence.published = sequence.told = 0

    # --- the queue ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return self._waiting_count

    def enqueue(self, sequence: Sequence, now: float) -> None:
        sequence.state, sequence.waiting_since = State.WAITING, now
        self._waiting_count += 1
        self._push(sequence)

    def _push(self, sequence: Sequence) -> None:
        heappush(self._waiting, (self._order(sequence), sequence.number, sequence.epoch, sequence))

    def _peek(self) -> Sequence | None:
        """The first waiter that is still one (a retired one is dropped here)."""
        while self._waiting:
            *_, sequence = self._waiting[0]
            if sequence.state is State.WAITING:
                return sequence
            heappop(self._waiting)
        return None

    def _pop(self) -> Sequence:
        sequence: Sequence = heappop(self._waiting)[-1]
        return sequence

    def _drop_stale(self) -> None:
        """Rebuilds the heap when most of it is gone: clients may come and leave while its head cannot move."""
        if len(self._waiting) > 2 * self._waiting_count + STALE:
            self._waiting = [entry for entry in self._waiting if entry[-1].state is State.WAITING]
            heapify(self._waiting)

    def waiters(self) -> Iterator[Sequence]:
        return (entry[-1] for entry in self._waiting if entry[-1].state is State.WAITING)

    def check(self) -> None:
        """Asserts that running sequences, slots and positions agree."""
        slots = [sequence.slot for sequence in self.running]
        assert sorted(slots + self._slots) == list(range(self.config.max_sequences)), (
            "a slot is lost or shared"
        )
        assert sum(1 for _ in self.waiters()) == self._waiting_count
        for sequence in self.running:
            assert sequence.state is State.RUNNING
            assert sequence.computed <= sequence.scheduled <= len(sequence.tokens) + sequence.pending
            assert sequence.scheduled <= len(sequence.table) * self.config.block_size
        assert all(owner.state is State.RUNNING for owner in self._computing.values()), (
            "a key is announced by nobody"
        )
