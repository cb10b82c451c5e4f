"""What the policies' prices are made of: where a sequence's KV is, what runs beside it, what the cost model says.

The arithmetic is policies/pricing.py's and cost.py's; here the engine's books become their terms. Pure.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from functools import cached_property

from engine.plan import Row
from engine.resumption import Match
from engine.sequence import Sequence
from kvstore.copies import DEVICE, DISK, CopyDone
from kvstore.flights import InFlight
from kvstore.residency import Residency
from kvstore.shelf import Entry
from policies.cost import CopySample, CostModel, StepSample
from policies.pricing import RECOMPUTE, RELOAD, Situation, Stake, Standing, price, way_back, ways


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes, in the cost model's terms (policies/cost.py has what they mean)."""

    prefill_tokens: int = 0
    attended: float = 0.0
    decode_rows: int = 0
    decode_context: int = 0
    copies: int = 0
    copied_bytes: int = 0

    def sample(self, seconds: float) -> StepSample:
        work = self.prefill_tokens, self.attended, self.decode_rows, self.decode_context
        return StepSample(*work, seconds, self.copies, self.copied_bytes)


def work_of(rows: Sequence_[Row]) -> Work:
    """A row of one token that samples is a decode; all others are prefill."""
    decoding = [row.start for row in rows if row.samples and len(row.tokens) == 1]
    if len(decoding) == len(rows):
        return Work(0, 0.0, len(rows), sum(decoding))
    chunks = [(row.start, len(row.tokens)) for row in rows if not row.samples or len(row.tokens) > 1]
    return Work(
        prefill_tokens=sum(count for _, count in chunks),
        attended=sum(count * (start + count / 2) for start, count in chunks),
        decode_rows=len(decoding),
        decode_context=sum(decoding),
    )


@dataclass(slots=True)
class Fetching:
    """The copies from one tier to the device, from the first one told until none is left."""

    since: float
    copying: float = 0.0  # seconds spent on copies that have ended
    whole: bool = True  # nothing was lost


class Offer:
    """A running sequence as a victim, priced when somebody asks. Implements policies.preemption.Offer."""

    def __init__(self, sequence: Sequence, valuation: "Valuation", situation: Situation) -> None:
        self._sequence = sequence
        self._valuation = valuation
        self._situation = situation

    @cached_property
    def frees(self) -> int:
        return len(self._sequence.table) - self._valuation.shared_blocks(self._sequence)

    @cached_property
    def price(self) -> float:
        return self._valuation.price(self._sequence, self.frees, self._situation)


class Valuation:
    """`block_bytes`: of one block, all layers."""

    def __init__(
        self,
        costs: CostModel,
        residency: Residency,
        *,
        block_size: int,
        block_bytes: int,
        max_batch_tokens: int,
    ) -> None:
        self.costs = costs
        self._loaded_at: dict[str, float] = {}
        self._fetching: dict[str, Fetching] = {}  # by tier
        self.enabled: tuple[str, ...] = ()  # the ways back that the resume policy allows
        self.ahead_seconds = 0.0  # of steps under way, before the one that is being made
        self._residency = residency
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._max_batch_tokens = max_batch_tokens

    # --- what happened --------------------------------------------------------------------------------------------

    def step_done(self, work: Work, seconds: float) -> None:
        self.costs.steps.observe(work.sample(seconds))

    def loaded_at(self, tier: str) -> float:
        """When the last copy from there to the device began or ended that says how long such take."""
        return self._loaded_at.get(tier, float("-inf"))

    def probed(self, tier: str, now: float) -> None:
        self._loaded_at[tier] = now

    def fetching(self, tier: str, now: float) -> None:
        """Copies from there to the device are told."""
        self._fetching.setdefault(tier, Fetching(now))

    def copied(self, flight: InFlight, done: CopyDone, now: float) -> None:
        """Only whole copies say how long copying takes."""
        copy = flight.copy
        if copy.target == DEVICE:
            self._fetched(copy.source, done, now)
        if not done.lost:
            if copy.target == DEVICE:
                self._loaded_at[copy.source] = now
            size = len(copy.sources) * self._block_bytes
            self.costs.copies.observe(
                CopySample(copy.source, copy.target, size, done.seconds, done.queued_seconds)
            )

    def _fetched(self, tier: str, done: CopyDone, now: float) -> None:
        """A tier that has brought all it was asked for says what a load waits beside the copying."""
        fetching = self._fetching[tier]
        fetching.copying += done.seconds
        fetching.whole = fetching.whole and not done.lost
        if tier not in self._residency.flights.bytes_up(self._block_bytes):
            del self._fetching[tier]
            if fetching.whole:
                self.costs.copies.observe_load(tier, fetching.copying, now - fetching.since)

    # --- what is, and would be ------------------------------------------------------------------------------------

    def situation(self, beside: Iterable[Sequence]) -> Situation:
        """For a sequence that comes to, or leaves, those that run `beside` it."""
        rows = context = tokens = 0
        weight = prompts = 0.0
        for sequence in beside:
            rows += 1
            context += sequence.computed
            weight += sequence.weight
            if sequence.scheduled + 1 < len(sequence.tokens) and sequence.remaining > 1:  # hardly anybody
                prompts += self.costs.steps.added_seconds(sequence.scheduled, sequence.remaining)
                tokens += sequence.remaining
        chunk = max(1, self._max_batch_tokens - rows)
        step = self.costs.steps.step_seconds(0, 0.0, rows, context)
        return Situation(
            steps=self.costs.steps,
            copies=self.costs.copies,
            block_tokens=self._block_size,
            block_bytes=self._block_bytes,
            copy_bytes=self._residency.config.copy_blocks * self._block_bytes,
            chunk=chunk,
            decode_rows=rows,
            decode_context=context,
            step_seconds=step,
            prompts_seconds=prompts,
            running_weight=weight,
            ahead_bytes=self._ahead_bytes(),
            ahead_seconds=self.ahead_seconds if rows else 0.0,
            next_seconds=step + prompts * min(1.0, chunk / max(1, tokens)) if rows else 0.0,
        )

    def _ahead_bytes(self) -> dict[str, int]:
        """By tier, what comes up before what is asked for now: from the disk, what all replicas have asked for."""
        own = self._residency.flights.bytes_up(self._block_bytes)
        everybodys = self._residency.below.bytes_up(self._block_bytes)
        return {**own, DISK: everybodys.get(DISK, 0)}

    def decode_seconds(self, running: Sequence_[Sequence]) -> float:
        """Of a step in which each of these computes one token."""
        context = sum(sequence.computed for sequence in running)
        return self.costs.steps.step_seconds(0, 0.0, len(running), context)

    def seconds(self, work: Work) -> float:
        """Of a step that computes all this, with its copies beside it."""
        steps = self.costs.steps
        computing = steps.step_seconds(
            work.prefill_tokens, work.attended, work.decode_rows, work.decode_context
        )
        return computing + steps.beside_seconds(work.copies, work.copied_bytes)

    def computing_seconds(self, work: Work, cached: int, rest: int) -> float:
        """From now on, until a step that computes all this, and then `rest` positions of one sequence, are over."""
        rows, context = work.decode_rows, work.decode_context
        chunk = max(1, self._max_batch_tokens - rows)
        later = self.costs.steps.recompute_seconds(cached, rest, chunk, rows, context)
        return self.ahead_seconds + self.seconds(work) + later

    def standing(self, sequence: Sequence, match: Match) -> Standing:
        """Of a waiter, as its tiers have been found."""
        runs: list[tuple[str, int]] = []
        below_tokens = 0
        for found in match.blocks:
            if not isinstance(found, Entry):
                continue
            below_tokens += found.tokens
            if runs and runs[-1][0] == found.tier:
                runs[-1] = (found.tier, runs[-1][1] + 1)
            else:
                runs.append((found.tier, 1))
        total = sequence.snapshot.computed if sequence.snapshot else len(sequence.tokens)
        device_tokens = match.tokens - below_tokens
        return Standing(device_tokens, tuple(runs), below_tokens, max(total, match.tokens))

    def shared_blocks(self, sequence: Sequence) -> int:
        """Blocks of its table that others hold too: its first ones, as equal chains are equal from the start."""
        low, high = 0, sequence.published
        while low < high:
            middle = (low + high) // 2
            if self._residency.flights.holders(sequence.table[middle]) > 1:
                low = middle + 1
            else:
                high = middle
        return low

    def price(self, sequence: Sequence, frees: int, situation: Situation) -> float:
        """Of preempting it, per block that this frees."""
        stake = self._stake(sequence, frees)
        return price(stake, sequence.weight, self._without(situation, sequence), self.enabled)

    def resume_seconds(self, stake: Stake) -> float:
        """Of a running sequence, what coming back would take alone, by the quickest way there would be."""
        return min(way.seconds for way in ways(stake.standing, 1.0, self.situation(()), self.enabled))

    def comes_back_whole(self, sequence: Sequence, situation: Situation) -> bool:
        """Whether all that a running one has computed could be loaded, and would be, should it give way now."""
        stake = self.stake(sequence)
        if RELOAD not in self.enabled or stake.unsaved_blocks > self._residency.spilling_room:
            return False
        if not stake.frees:
            return True
        if stake.survival < 1.0:
            return False
        return self._way_back(sequence, stake, situation) == RELOAD

    def worth_saving(self, sequence: Sequence, stake: Stake, situation: Situation) -> bool:
        """Whether one that gives way now would rather be loaded than computed again, what saving it takes included.

        What is on its way down holds its device blocks: to a slow tier, for long.
        """
        return not stake.standing.below or self._way_back(sequence, stake, situation) != RECOMPUTE

    def _way_back(self, sequence: Sequence, stake: Stake, situation: Situation) -> str:
        """The name of the cheapest."""
        return way_back(stake, sequence.weight, self._without(situation, sequence), self.enabled).name

    def saving_seconds(self, blocks: int = 0) -> float:
        """Until so many blocks more than are on their way down now would be below the device."""
        size = (self._residency.flights.spilling + blocks) * self._block_bytes
        tier = self._save_tier()
        return self.costs.copies.seconds(DEVICE, tier, size) if tier and size else 0.0

    def _save_tier(self) -> str:
        return next((shelf.name for shelf in self._residency.shelves if shelf.up), "")

    def stake(self, sequence: Sequence) -> Stake:
        """Of a running one, should it give way now."""
        return self._stake(sequence, len(sequence.table) - self.shared_blocks(sequence))

    def _stake(self, sequence: Sequence, frees: int) -> Stake:
        blocks = len(sequence.table)
        kept = min((blocks - frees) * self._block_size, sequence.computed)
        tier = self._save_tier()
        below = ((tier, frees),) if tier and frees else ()
        standing = Standing(
            device_tokens=kept,
            below=below,
            below_tokens=sequence.computed - kept if below else 0,
            total=sequence.computed,
        )
        unsaved = max(0, blocks - max(sequence.saved, blocks - frees)) if tier else 0
        return Stake(
            standing=standing,
            frees=frees,
            unsaved_blocks=unsaved,
            saving_seconds=self.saving_seconds(unsaved) if unsaved else 0.0,
            survival=self._residency.survival(frees) if tier else 0.0,
            preemptions=sequence.preemptions,
        )

    def _without(self, situation: Situation, sequence: Sequence) -> Situation:
        """What goes on beside one of those that run."""
        rows = max(0, situation.decode_rows - 1)
        context = max(0, situation.decode_context - sequence.computed)
        step = self.costs.steps.step_seconds(0, 0.0, rows, context)
        return situation._replace(
            decode_rows=rows,
            decode_context=context,
            step_seconds=step,
            next_seconds=situation.next_seconds - situation.step_seconds + step if rows else 0.0,
            running_weight=max(0.0, situation.running_weight - sequence.weight),
        )
