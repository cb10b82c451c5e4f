"""Who computes what in the next step: grow → preempt → admit → build. Pure; no clock but the `now` it is given.

Decides with the policies of the configuration; owns the running list and the runner's slots. Where blocks are, and what
is copied, is the residency's; the line of waiters is waiting.py's; what happens to tokens is core.py's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from engine.checkpoint import CheckpointConfig, Checkpoints
from engine.plan import Placement, Row
from engine.resumption import Load, Loads, Match
from engine.sequence import Sequence, State
from engine.waiting import WaitingLine
from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, CopyDone
from kvstore.device import DevicePool
from kvstore.residency import Residency, ResidencyConfig
from kvstore.shelf import Entry
from policies.order import ORDERS
from policies.preemption import VICTIMS
from policies.resume import RECOMPUTE, RELOAD

PASSED_OVER = 32
"""Waiters that one step passes over, at most, because their next block is being computed: each costs a look-up."""

PREFETCHED = 4
"""Waiters at the head of the line whose blocks are brought up from the disk while they wait."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    block_size: int  # tokens
    blocks: int  # of the device pool
    max_batch_tokens: int  # the token budget of a step
    max_sequences: int  # running at once
    order: str = "fcfs"
    victim: str = "last_admitted"
    resume: str = RELOAD
    residency: ResidencyConfig = field(default_factory=ResidencyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(slots=True)
class Scheduled:
    """The next step's rows, with the sequences they belong to, in the same order."""

    placements: list[Placement]
    rows: list[Row]
    sequences: list[Sequence]
    recomputed_tokens: int


@dataclass(slots=True)
class Counts:
    """What has happened since the start."""

    prompt_tokens: int = 0  # of requests admitted, each counted once
    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the tiers, and of these …
    prefix_hits: int = 0  # … found, both at first admissions alone
    reload_failures: int = 0
    hit_tokens: Counter[str] = field(default_factory=Counter)  # by tier, at every admission
    resumptions: Counter[tuple[str, str]] = field(
        default_factory=Counter
    )  # by way, and the lowest tier it took from

    def copy(self) -> "Counts":
        return replace(self, hit_tokens=self.hit_tokens.copy(), resumptions=self.resumptions.copy())


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = DevicePool(config.blocks)
        self.residency = Residency(self.pool, config.residency)
        self.running: list[Sequence] = []
        self.loading: list[Sequence] = []  # blocks and slot reserved, fetches under way or just over
        self.counts = Counts()
        self._victim = VICTIMS[config.victim]
        self._order = ORDERS[config.order]()
        self._line = WaitingLine(self._order)
        self._checkpoints = Checkpoints(self.residency, config.block_size, config.checkpoint)
        self._loads = Loads(self.residency)
        self._loaded: list[Load] = []  # complete, not yet started
        self._slots = list(range(config.max_sequences - 1, -1, -1))
        self._admissions = 0
        self._computing: dict[Key, Sequence] = {}  # who is about to cache which block on the device

    # --- one step -------------------------------------------------------------------------------------------------

    def schedule(self, now: float, outstanding_step: int = 0) -> Scheduled | None:
        """The next step, or None when there is nothing to compute. Marks what it hands out as scheduled.

        `outstanding_step`: the last one told and not done, whose rows may still write to blocks given up since.
        """
        shares: dict[Sequence, int] = {}
        budget = self._grow(shares, now)
        placed = self._start_loaded(shares, budget, now)
        budget -= sum(shares[sequence] for sequence in placed)
        placed += self._admit(shares, budget, outstanding_step, now)
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
                if missing <= self.pool.available + self.residency.leaving:
                    break  # enough is on its way out: it sits this step out
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
        """A running sequence gives up its place: nothing of it stays but its snapshot, and it waits again."""
        computed_in_the_end = sequence.scheduled  # void or not, the rows under way are computed
        sequence.computed_before = max(sequence.computed_before, computed_in_the_end)
        sequence.preemptions += 1
        self.counts.preemptions += 1
        snapshot = sequence.take_snapshot(self.config.block_size)
        if self.config.resume == RELOAD:
            self._checkpoints.save_snapshot(sequence, snapshot, now)
            tail = (snapshot.tail.key,) if snapshot.tail else ()
            sequence.pins = self.residency.pin((*snapshot.keys, *tail))
        self._leave(sequence, self.running)
        sequence.restore(snapshot)
        self.enqueue(sequence, now)

    def _start_loaded(self, shares: dict[Sequence, int], budget: int, now: float) -> list[Sequence]:
        """Those whose fetches are over run now, as far as the budget goes."""
        started = []
        while budget > 0 and self._loaded:
            load = self._loaded.pop(0)
            if not load.current:
                continue
            sequence = load.sequence
            self.loading.remove(sequence)
            self._start(sequence, load.match, load.tiers, now)
            shares[sequence] = min(sequence.remaining, budget)
            budget -= shares[sequence]
            started.append(sequence)
        return started

    def _admit(
        self, shares: dict[Sequence, int], budget: int, outstanding_step: int, now: float
    ) -> list[Sequence]:
        """Takes waiters in while the budget, the slots and the pool have room for all their tokens."""
        placed: list[Sequence] = []
        set_aside: list[Sequence] = []
        while (
            budget > 0 and self._slots and len(set_aside) < PASSED_OVER and (sequence := self._line.first())
        ):
            match = self._match(sequence)
            if match.waits_for is not None:
                set_aside.append(self._line.pop())
                continue
            if not self._take_blocks(sequence, match):
                break
            self._line.pop()
            sequence.slot = self._slots.pop()
            if match.entries:
                self._load(sequence, match, outstanding_step)
                continue
            self._start(sequence, match, match.tokens_by_tier(self.config.block_size), now)
            shares[sequence] = min(sequence.remaining, budget)
            budget -= shares[sequence]
            placed.append(sequence)
        for sequence in set_aside:
            self._line.add(sequence)
        self._prefetch(now)
        return placed

    def _match(self, sequence: Sequence) -> Match:
        """What need not be computed: of the full blocks short of the last token, and of its snapshot's tail."""
        size = self.config.block_size
        keys = sequence.block_keys(size)[: (len(sequence.tokens) - 1) // size]
        device_only = sequence.snapshot is not None and self.config.resume == RECOMPUTE
        blocks = self.residency.find(keys, device_only=device_only)
        full, tokens = len(blocks), len(blocks) * size
        below = next(
            (key for key, found in zip(keys, blocks, strict=False) if isinstance(found, Entry)), None
        )
        for key in (below, *keys[full : full + 1]):  # never fetched twice, never computed twice
            if key is not None and (key in self._computing or self.residency.coming(key)):
                return Match(blocks, full, tokens, waits_for=key)
        snapshot = sequence.snapshot
        if not device_only and snapshot and snapshot.tail and full == len(snapshot.keys):
            key = snapshot.tail.key
            if self.residency.writing(key):
                return Match(blocks, full, tokens, waits_for=key)  # it will be there when its save has ended
            tail = self.residency.find((key,))
            blocks, tokens = blocks + tail, tokens + len(tail) * snapshot.tail.tokens
        return Match(blocks, full, tokens, waits_for=None)

    def _take_blocks(self, sequence: Sequence, match: Match) -> bool:
        """Holds what the device has and room for the rest, all or nothing; one block is left for those who run."""
        held = [found for found in match.blocks if isinstance(found, int)]
        self.pool.hold(held)
        missing = -(-len(sequence.tokens) // self.config.block_size) - len(held)
        if missing + bool(self.running or self.loading) > self.pool.available:
            self.pool.release(held)
            return False
        fresh = iter(self.pool.allocate(missing))
        sequence.table = [found if isinstance(found, int) else next(fresh) for found in match.blocks]
        sequence.table += fresh
        return True

    def _load(self, sequence: Sequence, match: Match, outstanding_step: int) -> None:
        """Its missing blocks are fetched while others go on; it starts in the step after the last has come."""
        sequence.state = State.LOADING
        self.loading.append(sequence)
        self._announce(sequence, match.entries[0][0])
        self._loads.begin(sequence, match, self.config.block_size, outstanding_step)

    def _announce(self, sequence: Sequence, first: int) -> None:
        for key in sequence.keys[first:]:
            self._computing.setdefault(key, sequence)

    def _start(self, sequence: Sequence, match: Match, tiers: Counter[str], now: float) -> None:
        """The books of an admission: positions, keys under way, what the client waited and found."""
        if sequence.admissions == 0:
            sequence.admitted, sequence.cached_tokens = now, match.tokens
            self.counts.prefix_queries += len(sequence.tokens)
            self.counts.prefix_hits += match.tokens
            self.counts.prompt_tokens += sequence.prompt_tokens if sequence.choice == 0 else 0
        elif sequence.snapshot is not None:
            self.counts.resumptions[_way(sequence, match, tiers)] += 1
        self.counts.hit_tokens.update(tiers)
        self.residency.hit(sequence.keys[: match.full], now)
        self._settle_snapshot(sequence)
        sequence.admissions += 1
        sequence.queued_seconds += now - sequence.waiting_since
        sequence.admitted_as = self._admissions
        self._admissions += 1
        sequence.state, sequence.told = State.RUNNING, 0
        sequence.scheduled = sequence.computed = match.tokens
        sequence.published, sequence.saved, sequence.saved_at = match.full, 0, now
        self._no_longer_computing(sequence, *sequence.keys[: match.full])
        self._announce(sequence, match.full)
        self.running.append(sequence)

    def _settle_snapshot(self, sequence: Sequence) -> None:
        """Its snapshot is used up, or nobody will come back to it: the tail is no use to anybody else."""
        self.residency.unpin(sequence.pins)
        sequence.pins = []
        if sequence.snapshot and sequence.snapshot.tail:
            self.residency.discard(sequence.snapshot.tail.key)
        sequence.snapshot = None

    def _prefetch(self, now: float) -> None:
        """Brings up from the disk what those need who could not be taken in."""
        for sequence in self._line.next_few(PREFETCHED) if self.residency.disk.up else ():
            if not sequence.prefetched:
                sequence.prefetched = True
                self.residency.prefetch(sequence.block_keys(self.config.block_size), now)

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

    def computed(self, sequence: Sequence, positions: int, now: float) -> None:
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
        self._checkpoints.grown(sequence, now)

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
            self._checkpoints.save(sequence, now)
        else:
            sequence.queued_seconds += now - sequence.waiting_since
        before, sequence.state = sequence.state, State.FINISHED
        if before is State.WAITING:
            self._line.left()
        else:
            self._leave(sequence, self.running if before is State.RUNNING else self.loading)
        self._settle_snapshot(sequence)

    def _leave(self, sequence: Sequence, those: list[Sequence]) -> None:
        """One of `those` who have a place gives it up."""
        self._no_longer_computing(sequence, *sequence.keys[sequence.published :])
        self.pool.release(sequence.table)
        self._slots.append(sequence.slot)
        those.remove(sequence)
        sequence.lose_place()

    # --- copies end, tiers come and go ----------------------------------------------------------------------------

    def copied(self, done: CopyDone, now: float) -> None:
        """A copy has ended: perhaps a sequence has all its blocks, or must look again for what it lacks."""
        load = self._loads.copied(done)
        if load:
            self._hand_over(load)
        self.residency.copied(done, now)
        if load and not load.whole:
            self._look_again(load.sequence)

    def _hand_over(self, load: Load) -> None:
        """What has arrived is cached on the device, up to the first gap."""
        sequence = load.sequence
        for index, entry in load.match.entries:
            if index not in load.arrived:
                return
            if index < load.match.full:
                self._cache_block(sequence, index, entry.key)
        self._loaded.append(load)

    def _look_again(self, sequence: Sequence) -> None:
        """What a tier promised has not come: back into the line, where the next match knows better."""
        sequence.reload_failures += 1
        self.counts.reload_failures += 1
        self._leave(sequence, self.loading)
        sequence.state = State.WAITING
        self._line.add(sequence)

    def tier_down(self, tier: str) -> None:
        """A tier is out of use: whoever waits for it looks again, without it."""
        for load in self._loads.touching(self.residency.tier_down(tier)):
            self._look_again(load.sequence)

    # --- the queue ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._line) + len(self.loading)

    def enqueue(self, sequence: Sequence, now: float) -> None:
        sequence.state, sequence.waiting_since, sequence.prefetched = State.WAITING, now, False
        self._line.add(sequence)

    def waiters(self) -> Iterator[Sequence]:
        return iter(self._line)

    def check(self) -> None:
        """Asserts that sequences, slots, blocks and positions agree."""
        placed = [*self.running, *self.loading]
        self.residency.check([sequence.table for sequence in placed])
        slots = [sequence.slot for sequence in placed]
        assert sorted(slots + self._slots) == list(range(self.config.max_sequences)), (
            "a slot is lost or shared"
        )
        assert sum(1 for _ in self.waiters()) == len(self._line)
        for sequence in self.running:
            assert sequence.state is State.RUNNING
            assert sequence.computed <= sequence.scheduled <= len(sequence.tokens) + sequence.pending
            assert sequence.scheduled <= len(sequence.table) * self.config.block_size
        assert all(sequence.state is State.LOADING for sequence in self.loading)
        assert all(owner in placed for owner in self._computing.values()), "a key is announced by nobody"


def _way(sequence: Sequence, match: Match, tiers: Counter[str]) -> tuple[str, str]:
    """How a preempted sequence comes back, and the lowest tier that it takes from."""
    lowest = next((tier for tier in (DISK, HOST, DEVICE) if tiers[tier]), "none")
    if not match.tokens:
        return RECOMPUTE, lowest
    assert sequence.snapshot is not None
    return (RELOAD if match.tokens >= sequence.snapshot.computed else "split"), lowest
