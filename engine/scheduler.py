"""Who computes what in the next step: grow → preempt → admit → build. Pure; no clock but the `now` it is given.

Asks the policies in force. Who has a place is places.py's; how a waiter's KV is found and comes in is intake.py's;
where blocks are, and what is copied, is the residency's; the line of waiters is waiting.py's; who gives way is
victims.py's; the rows are draft.py's; what becomes of a sequence afterwards is lifecycle.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle

from engine.checkpoint import CheckpointConfig
from engine.common import Common
from engine.counts import Counts
from engine.draft import Draft, Scheduled, build
from engine.events import Decided, PolicyFailed, Resumed
from engine.lifecycle import Lifecycle
from engine.places import Places
from engine.policy_set import PolicyConfig
from engine.resumption import Match
from engine.sequence import Sequence, State
from engine.valuation import Valuation
from engine.victims import Victims
from kvstore.below import ResidencyConfig
from kvstore.device import DevicePool
from kvstore.residency import Residency
from policies.admission import Room
from policies.cost import CopySample, CostModel, StepGroup, StepSample
from policies.decisions import Decision, Kind

PASSED_OVER = 32
"""Waiters that one step passes over, at most, because their next block is being computed: each costs a look-up."""

PREFETCHED = 4
"""Waiters at the head of the line that are looked up anew, one a step, by turns; and whose blocks are brought up from
the disk meanwhile."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    block_size: int  # tokens
    blocks: int  # of the device pool
    max_batch_tokens: int  # the token budget of a step
    max_sequences: int  # running at once
    policies: PolicyConfig = field(default_factory=PolicyConfig)
    block_bytes: int = 0  # of one block, all layers
    calibration: tuple[StepSample | CopySample, ...] = ()  # what the cost model knows before the first step
    residency: ResidencyConfig = field(default_factory=ResidencyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


class Scheduler:
    """`replica`: its number among those that have `common` in common. `steps`: what those like it have learned."""

    def __init__(
        self, config: SchedulerConfig, common: Common, replica: int = 0, steps: StepGroup | None = None
    ) -> None:
        self.config = config
        self.common = common
        self._news: list[Decided] = []
        self._places = Places(config.blocks, config.max_sequences, config.block_size)
        self._policies, self._policy_config = common.policies, common.config
        self.residency = Residency(self.pool, common.below, replica)
        self.valuation = Valuation(
            CostModel.calibrated(config.calibration, steps, replica),
            self.residency,
            block_size=config.block_size,
            block_bytes=config.block_bytes,
            max_batch_tokens=config.max_batch_tokens,
        )
        self.life = Lifecycle(
            self._places,
            self.residency,
            self.valuation,
            config.checkpoint,
            self._policies,
            self._policy_config,
            common.tenants,
            self._decide,
        )
        self.counts: Counts = self.life.counts
        self._intake, self._line = self.life.intake, self.life.line
        self._victims = Victims(self._policies, self._policy_config, self.valuation)
        self._turns = cycle(range(PREFETCHED))  # whose it is, of the first few, to be looked up anew
        self._steps_ahead = 0  # until it is looked who may be preempted
        self.left_waiting = 0  # of those in line at the last look, who found no room

    @property
    def pool(self) -> DevicePool:
        return self._places.pool

    @property
    def running(self) -> list[Sequence]:
        return self._places.running

    @property
    def loading(self) -> list[Sequence]:
        """Their blocks and slots are reserved, and fetches under way or just over."""
        return self._places.loading

    def use(self, names: Mapping[str, str]) -> None:
        """Other policies decide from now on, by family."""
        self.common.use(names)
        self._policies, self._policy_config = self.common.policies, self.common.config
        self._victims = Victims(self._policies, self._policy_config, self.valuation)
        self.life.use(self._policies, self._policy_config)

    # --- one step -------------------------------------------------------------------------------------------------

    def schedule(self, now: float, outstanding_step: int = 0, ahead_seconds: float = 0.0) -> Scheduled | None:
        """The next step, or None when there is nothing to compute. Marks what it hands out as scheduled.

        `outstanding_step`: the last one told and not done, whose rows may still write to blocks given up since; it is
        expected to end in `ahead_seconds`.
        """
        self.valuation.ahead_seconds = ahead_seconds
        draft = Draft(self.config.max_batch_tokens)
        self._victims.new_step()
        for sequence in self._line.promote(now, self.life.tenants.served):
            self.life.promoted(sequence, now)
        self._grow(draft, now)
        self._start_loaded(draft, now)
        self._admit(draft, outstanding_step, now)
        self.left_waiting = len(self._line)
        self._prefetch(now)
        self._save_ahead(now)
        return self._build(draft) if draft.shares else None

    def _save_ahead(self, now: float) -> None:
        """Every few steps: whom the growth of the next few would cost its place has its blocks saved before."""
        steps = self.config.checkpoint.ahead_steps
        self._steps_ahead -= 1
        if not steps or self._steps_ahead > 0 or not (self._intake.saves and self.residency.keeps):
            return
        self._steps_ahead = max(1, steps // 2)
        growth = len(self.running) * steps // self.config.block_size
        missing = growth - self.pool.available
        for sequence in self._victims.likely(missing, self.running) if missing > 0 else ():
            if saved := self.life.checkpoints.ahead(sequence, now):
                self.counts.saved_ahead_blocks += saved
                reason = f"{missing} blocks will be missing in {steps} steps: {saved} of its blocks are saved"
                self._decide(sequence, Decision(Kind.SAVED_AHEAD, self._policy_config.victim, "save", reason))

    def _build(self, draft: Draft) -> Scheduled:
        scheduled = build(draft)
        copies, blocks = self.residency.untold
        if copies:
            size = blocks * self.config.block_bytes
            scheduled.work = replace(scheduled.work, copies=copies, copied_bytes=size)
        self.life.tenants.serve(zip(scheduled.sequences, scheduled.rows, strict=True))
        self._intake.built((*draft.placed, *draft.loading), scheduled.work)
        return scheduled

    # --- grow, and preempt ----------------------------------------------------------------------------------------

    def _grow(self, draft: Draft, now: float) -> None:
        """Gives the running their tokens: all of them where that fits, else in order, preempting for blocks.

        Where blocks alone are short, those who lack none go on whatever the order is.
        """
        wanted: dict[Sequence, int] = {}
        lacking: list[Sequence] = []
        missing, tokens, block_size = 0, 0, self.config.block_size
        for sequence in self.running:
            if (count := sequence.remaining) > 0:
                wanted[sequence] = count
                tokens += count
                if count > 1:
                    self._promote_if_due(sequence, now)
                if sequence.scheduled + count > len(sequence.table) * block_size:
                    lacking.append(sequence)
                    missing += self._places.missing_blocks(sequence, count)
        if tokens > draft.budget:
            self._grow_in_order(draft, wanted, now)
        elif missing > self.pool.available:
            behind = {sequence: wanted.pop(sequence) for sequence in lacking}
            draft.give_all(wanted)
            self._grow_in_order(draft, behind, now)
        else:
            for sequence in lacking:
                self._places.grow(sequence, wanted[sequence])
            draft.give_all(wanted)

    def _promote_if_due(self, prompt: Sequence, now: float) -> None:
        """Nor is a prompt under way passed by for longer than one that waits."""
        if not prompt.promoted and (reason := self._line.due(prompt, now, self.life.tenants.served)):
            prompt.promoted = reason
            self.life.promoted(prompt, now)

    def _grow_in_order(self, draft: Draft, wanted: dict[Sequence, int], now: float) -> None:
        """Those in decode first. After a preemption there is nothing for newcomers, as long as anybody runs."""
        order = self._policies.order
        draft.leaving = self._leaving_soon()
        for sequence in sorted(wanted, key=lambda s: (wanted[s] > 1, not s.promoted, order(s), s.number)):
            count = min(wanted[sequence], draft.budget)
            if count <= 0 or (draft.closed and sequence.state is not State.RUNNING):
                continue
            missing = self._places.missing_blocks(sequence, count)
            if not missing or self._find_blocks(sequence, missing, draft, now):
                self._places.grow(sequence, count)
                draft.give(sequence, count)
        if draft.closed and draft.shares:
            draft.budget = 0

    def _find_blocks(self, sequence: Sequence, missing: int, draft: Draft, now: float) -> bool:
        """Whether so many are available, once others have been preempted if need be; else it sits this step out."""
        while missing > self.pool.available:
            if missing <= self.pool.available + draft.leaving or self._may_wait(sequence, draft):
                return False
            victim, decision = self._victims.for_blocks(sequence, missing, self.running)
            if victim is sequence and missing <= self.pool.available + self.residency.leaving:
                return False  # late is better than from the line
            self._decide(victim, decision)
            self.life.preempt(victim, now, by=self._policy_config.victim)
            draft.take_back(victim)
            draft.closed, draft.leaving = True, self._leaving_soon()
            if victim is sequence:
                return False
        return True

    def _leaving_soon(self) -> int:
        """Device blocks on their way out that are worth waiting for.

        They are when they are free before those who run would have filled a block each. Behind a slow tier all would
        stand still for them: one who gives way instead, and is computed again, costs less.
        """
        leaving = self.residency.leaving
        if not leaving:
            return 0
        block_seconds = self.config.block_size * self.valuation.decode_seconds(self.running)
        return leaving if self.valuation.saving_seconds() <= block_seconds else 0

    def _may_wait(self, sequence: Sequence, draft: Draft) -> bool:
        """Whether it had better sit this step out: one of those who go on is expected to end very soon.

        Only while others go on, and for so many steps: a prediction that does not come true must stop nobody.
        """
        most = self._policies.admission.wait_steps
        if sequence.waits >= most:
            return False
        rounds = min(
            (s.expected_remaining_tokens for s in draft.shares if not s.head_end), default=most + 1.0
        )
        if sequence.waits + rounds > most:
            return False
        sequence.waits += 1
        if sequence.waits == 1:
            reason = f"no block is free, but a sequence is expected to end in {rounds:.0f} steps"
            self._decide(sequence, Decision(Kind.SPARED, "admission", "wait", reason))
        return True

    # --- admit ----------------------------------------------------------------------------------------------------

    def _start_loaded(self, draft: Draft, now: float) -> None:
        """Those whose fetches are over run now, as far as the budget goes."""
        while draft.budget > 0 and (load := self._intake.ready(now)):
            self.life.started(load.sequence, load.match, load.way, now)
            self._place(load.sequence, draft)

    def _admit(self, draft: Draft, outstanding_step: int, now: float) -> None:
        """Takes waiters in while the budget, the slots and the pool have room for all their tokens."""
        set_aside: list[Sequence] = []
        while len(set_aside) < PASSED_OVER and (sequence := self._line.first()):
            later = None
            if draft.budget <= 0 and (later := self._later(sequence, draft)) is None:
                break
            match = self._intake.match(sequence)
            if match.waits_for is not None:
                set_aside.append(self._line.pop())
                continue
            if not (self._places.slots_left and self._places.fits(sequence, match)):
                if self._makes_room(sequence, match, draft, now):
                    continue  # where blocks are, and who is first, may have changed
                break
            if not (sequence.promoted or self._foreseen(sequence, draft)):
                break
            self._line.pop()
            if self._policies.admission.foresees:
                self._room(draft).add(sequence, self._places.known_blocks(sequence))
            way = self._intake.take(sequence, match, outstanding_step, now)
            if sequence.state is State.RUNNING:
                self.life.started(sequence, match, way, now)
                if later is not None:
                    draft.cede(later, sequence.remaining)
                self._place(sequence, draft)
            else:
                draft.loading.append(sequence)
        for sequence in set_aside:
            self._line.put_back(sequence)

    def _later(self, waiter: Sequence, draft: Draft) -> Sequence | None:
        """Who cedes tokens of this step to the first in line, where all are given: nothing is lost by it, while prompts
        under way would keep out whoever goes before them. By the order it is the last prompt; to a promoted one cedes
        whoever came last.
        """
        if draft.closed:
            return None
        if waiter.promoted:
            later = [s for s in draft.shares if s.number > waiter.number and s not in draft.placed]
            return max(later, key=lambda s: s.number, default=None)
        order = self._policies.order
        prompts = [
            (order(s), s.number, s)
            for s, count in draft.shares.items()
            if count > 1 and not s.promoted and s not in draft.placed
        ]
        last = max(prompts, default=None)
        return last[-1] if last and order(waiter) < last[0] else None

    def _makes_room(self, sequence: Sequence, match: Match, draft: Draft, now: float) -> bool:
        """Whether somebody gave way to the first in line, at once: what will soon be out is waited for."""
        if self._places.slots_left and self._places.fits(sequence, match, self._leaving_soon()):
            return False
        found = self._victims.for_waiter(sequence, len(self._line), self.running)
        if found is None:
            return False
        victim, decision = found
        self._decide(victim, decision)
        self.life.preempt(victim, now, by="displaced")
        draft.take_back(victim)
        draft.room = None
        return True

    def _foreseen(self, sequence: Sequence, draft: Draft) -> bool:
        """Whether those who run and this one are expected to find room until they end."""
        if not self._policies.admission.foresees:
            return True
        if self._room(draft).fits(sequence, self._places.known_blocks(sequence)):
            return True
        if not sequence.held_back:
            sequence.held_back = True
            reason = f"{len(self._places.taken)} that run are expected to need the room"
            self._decide(sequence, Decision(Kind.HELD_BACK, "admission", "wait", reason))
        return False

    def _room(self, draft: Draft) -> Room:
        """What is foreseen of the pool. Blocks that several hold count once for each, on both sides."""
        if draft.room is None:
            taken = self._places.taken
            several = max(0, sum(len(sequence.table) for sequence in taken) - self.pool.held)
            blocks = self.pool.blocks + several
            policies = self._policies
            draft.room = policies.admission.room(taken, policies.prediction, self.config.block_size, blocks)
        return draft.room

    def _place(self, sequence: Sequence, draft: Draft) -> None:
        """It is new on the device, and has its first tokens."""
        draft.give(sequence, min(sequence.remaining, draft.budget))
        draft.placed.append(sequence)

    def _prefetch(self, now: float) -> None:
        """Of those who could not be taken in: looks one up anew, and brings up from the disk what they need."""
        few, turn = self._line.next_few(PREFETCHED), next(self._turns)
        if turn < len(few):
            self._match_anew(few[turn])
        for sequence in few if self.residency.disk.up else ():
            if not sequence.prefetched:
                sequence.prefetched = True
                self.residency.prefetch(sequence.block_keys(self.config.block_size), now)

    def _match_anew(self, sequence: Sequence) -> None:
        """A waiter of whom more is cached by now may go before others."""
        before = sequence.matched_tokens
        if self._intake.match(sequence).tokens > before:
            self._line.look_again(sequence)

    @property
    def waiting(self) -> int:
        return len(self._line) + sum(not sequence.arriving for sequence in self.loading)

    # --- what is told ---------------------------------------------------------------------------------------------

    def take_news(self) -> list[Decided | PolicyFailed | Resumed]:
        """What has been decided, and has come back, since the last call."""
        news: list[Decided | PolicyFailed | Resumed]
        news = [*self._news, *self._intake.returned, *self.common.take_failures()]
        self._news, self._intake.returned = [], []
        return news

    def _decide(self, sequence: Sequence, decision: Decision) -> None:
        self._news.append(Decided(sequence.request.id, sequence.choice, decision))

    def check(self) -> None:
        """Asserts that sequences, slots, blocks and positions agree."""
        self._places.check()
        self.residency.check([sequence.table for sequence in self._places.taken])
        assert sum(1 for _ in self._line) == len(self._line)
