"""What becomes of a sequence between two decisions: it waits, runs, computes, gives its place up, ends. Pure.

The books of each such turn are kept here: what it holds, what is saved of it, what is counted and told. Who runs, and
who gives way, is decided in scheduler.py; how what is kept of a sequence comes back is intake.py's.
"""

from dataclasses import replace

from engine.checkpoint import CheckpointConfig, Checkpoints
from engine.counts import Counts
from engine.intake import Decide, Intake
from engine.landings import Landings
from engine.places import Places
from engine.policy_set import Policies, PolicyConfig
from engine.request import ServiceClass
from engine.resumption import Match, lowest_tier
from engine.sequence import Sequence, State
from engine.snapshot import Snapshot
from engine.tenants import Counters, Tenants
from engine.valuation import Valuation
from engine.waiting import WaitingLine
from kvstore.copies import CopyDone
from kvstore.residency import Residency
from policies.decisions import Decision, Kind
from policies.pricing import Way

PREDICTED_ANEW = 16
"""Tokens after which a running sequence's remaining length is predicted again; between, each token is one less."""


class Lifecycle:
    def __init__(
        self,
        places: Places,
        residency: Residency,
        valuation: Valuation,
        checkpoint: CheckpointConfig,
        policies: Policies,
        config: PolicyConfig,
        tenants: Counters,
        decide: Decide,
    ) -> None:
        self.counts = Counts()
        self.tenants = Tenants(tenants)
        self.line = WaitingLine(policies.order, policies.promotion)
        self.intake = Intake(places, residency, valuation, decide)
        self.intake.use(policies.resume, config.resume)
        self.checkpoints = Checkpoints(residency, places.block_size, checkpoint, valuation.saving_seconds)
        self.landings = Landings(places, residency, valuation, self.intake)
        self.landed: list[Sequence] = []  # from another replica, since somebody looked
        self._prediction = policies.prediction
        self._places = places
        self._residency = residency
        self._valuation = valuation
        self._decide = decide
        self._block_size = places.block_size
        self._admissions = 0

    def use(self, policies: Policies, config: PolicyConfig) -> None:
        """Others decide from now on."""
        self._prediction = policies.prediction
        self.intake.use(policies.resume, config.resume)
        self.line.use(policies.order, policies.promotion)

    # --- it waits -------------------------------------------------------------------------------------------------

    def arrive(self, sequence: Sequence, now: float) -> None:
        """It is new here, from a client or from another replica, and begins to wait."""
        self.tenants.arrive(sequence.tenant)
        self._enqueue(sequence, now)

    def waited_tokens(self, sequence: Sequence) -> int | None:
        """Served to anybody since it began to wait; None: it runs."""
        return None if sequence.state is State.RUNNING else self.tenants.served - sequence.served_before

    def wait_on(self, sequence: Sequence, waited_tokens: int) -> None:
        """It is new here, from another replica: a spell of waiting, in which so many were served, goes on."""
        self.tenants.arrive(sequence.tenant)
        self._look_up(sequence)
        sequence.served_before = self.tenants.served - waited_tokens
        self.line.go_on(sequence)

    def _enqueue(self, sequence: Sequence, now: float) -> None:
        """It begins to wait, for the first time or after a preemption."""
        self._look_up(sequence)
        if self.line.enter(sequence, now, self.tenants.served):
            self.promoted(sequence, now)

    def _look_up(self, sequence: Sequence) -> None:
        """It waits; what its rank depends on is as it is now."""
        sequence.state, sequence.prefetched, sequence.service = State.WAITING, False, self.tenants.service
        sequence.expected_remaining_tokens = self._prediction.remaining(sequence)
        self.intake.match(sequence)

    def promoted(self, sequence: Sequence, now: float) -> None:
        """It goes before all others from now on."""
        self.counts.promotions[sequence.promoted] += 1
        sequence.promotions += 1
        waited = now - sequence.waiting_since
        reason = f"{waited:.3f} s and {self.tenants.served - sequence.served_before} tokens of service waited"
        self._decide(sequence, Decision(Kind.PROMOTED, "promotion", sequence.promoted, reason, waited))

    def reprioritise(self, sequence: Sequence, priority: int, service: ServiceClass) -> None:
        """A sequence is as urgent as this from now on; one that waits has its new place in the line at once."""
        before = sequence.priority
        sequence.reprioritise(priority, service)
        self.line.look_again(sequence)
        reason = f"an operator changed the priority from {before} to {priority}"
        self._decide(sequence, Decision(Kind.REPRIORITISED, "", service.name, reason))

    # --- it runs --------------------------------------------------------------------------------------------------

    def started(self, sequence: Sequence, match: Match, way: Way, now: float) -> None:
        """It runs, with what was found of it, by a way back or as a newcomer."""
        if sequence.arriving:
            self._arrived(sequence, now)
            return
        tiers = match.tokens_by_tier(way.first_fetched, self._block_size)
        if sequence.admissions == 0:
            found = sum(tiers.values())
            sequence.admitted, sequence.cached_tokens = now, found
            self.counts.prefix_queries += len(sequence.tokens)
            self.counts.prefix_hits += found
            self.counts.prompt_tokens += sequence.prompt_tokens if sequence.choice == 0 else 0
        elif sequence.snapshot is not None:
            self.counts.resumptions[way.name, lowest_tier(tiers)] += 1
        self.counts.hit_tokens.update(tiers)
        self._residency.hit(sequence.keys[: match.full], now)
        self._admitted(sequence, now)

    def _arrived(self, sequence: Sequence, now: float) -> None:
        """It has come from another replica with all it had: what it found here was found before."""
        self.tenants.arrive(sequence.tenant)
        sequence.service, sequence.arriving = self.tenants.service, False
        sequence.migrations += 1
        sequence.migrated_at = now
        self.landed.append(sequence)
        self._admitted(sequence, now)

    def _admitted(self, sequence: Sequence, now: float) -> None:
        self._settle_snapshot(sequence)
        sequence.admissions += 1
        sequence.queued_seconds += now - sequence.waiting_since
        sequence.admitted_as = self._admissions
        self._admissions += 1
        sequence.saved, sequence.saved_at, sequence.held_back = 0, now, False

    def computed(self, sequence: Sequence, positions: int, now: float) -> None:
        """KV of the first `positions` tokens is on the device: caches the blocks that are full and known."""
        sequence.computed = positions
        if positions > sequence.computed_before:
            sequence.computed_before = positions
        full = positions // self._block_size
        if full != sequence.published:
            sequence.block_keys(self._block_size)
            for index in range(sequence.published, full):
                self._places.cache(sequence, index)
            sequence.published = full
            self.checkpoints.grown(sequence, now)
        if sequence.way_back or sequence.head_end:
            self.intake.computed(sequence, now)

    def drawn(self, sequence: Sequence, output_tokens: int) -> None:
        """It has one more token, the `output_tokens`th: one less is expected."""
        if output_tokens % PREDICTED_ANEW:
            left = sequence.expected_remaining_tokens - 1.0
            sequence.expected_remaining_tokens = left if left > 1.0 else 1.0
        else:
            sequence.expected_remaining_tokens = self._prediction.remaining(sequence)

    # --- it gives its place up, or ends ---------------------------------------------------------------------------

    def preempt(self, sequence: Sequence, now: float, by: str) -> None:
        """A running sequence gives up its place: nothing of it stays but its snapshot, and it waits again.

        `by`: the victim policy, or what else wanted it.
        """
        sequence.preemptions += 1
        self.counts.preemptions += 1
        self.counts.preemptions_by[by] += 1
        self._give_up(sequence, now)

    def preempt_as_asked(self, sequence: Sequence, now: float) -> None:
        """An operator wants its place."""
        chosen, reason = sequence.request.id, "an operator asked for it"
        self._decide(sequence, Decision(Kind.PREEMPTED, "", chosen, reason))
        self.preempt(sequence, now, by="operator")

    def _give_up(self, sequence: Sequence, now: float) -> None:
        snapshot, valuation = sequence.take_snapshot(self._block_size), self._valuation
        stake = valuation.stake(sequence)
        sequence.resume_seconds = valuation.resume_seconds(stake)
        if self.intake.saves:
            if valuation.worth_saving(sequence, stake, valuation.situation(self._places.running)):
                self.checkpoints.save_snapshot(sequence, snapshot, now)
            sequence.pins = self._residency.pin(snapshot.all_keys)
        self._places.leave(sequence)
        sequence.restore(snapshot)
        self._enqueue(sequence, now)

    def retire(self, sequence: Sequence, now: float, *, by_itself: bool) -> None:
        """A sequence has ended, wherever it stands: nothing of it stays but its cached blocks.

        `by_itself`: not from outside, so that its length is one to learn from.
        """
        if by_itself:
            self._prediction.observe(sequence)
        if sequence.state is State.RUNNING:
            self.checkpoints.save(sequence, now)
        self._leave(sequence, now)
        self._settle_snapshot(sequence)

    def depart(self, sequence: Sequence, now: float) -> Snapshot:
        """It is to go on elsewhere from what is returned: nothing of it stays here but its cached blocks.

        What is kept of it below the device stays pinned: `sequence.pins` are whoever's that goes on with it. Its wait,
        if it waits, goes on there too.
        """
        snapshot = sequence.snapshot or sequence.take_snapshot(self._block_size)
        if not sequence.pins:
            sequence.pins = self._residency.pin(snapshot.all_keys)
        table = sequence.table
        self._leave(sequence, now)
        self._places.pool.demote(table)
        return replace(snapshot, promotions=sequence.promotions, migrations=sequence.migrations)

    def _leave(self, sequence: Sequence, now: float) -> None:
        if sequence.state is not State.RUNNING:
            sequence.queued_seconds += now - sequence.waiting_since
        self.tenants.leave(sequence.tenant)
        before, sequence.state = sequence.state, State.FINISHED
        if before is State.WAITING:
            self.line.left()
        else:
            self._places.leave(sequence)

    def _settle_snapshot(self, sequence: Sequence) -> None:
        """Its snapshot is used up, or nobody will come back to it: the tail is no use to anybody else."""
        self._residency.unpin(sequence.pins)
        sequence.pins = []
        if sequence.snapshot and sequence.snapshot.tail:
            self._residency.discard(sequence.snapshot.tail.key)
        sequence.snapshot = None

    # --- copies end, tiers come and go ----------------------------------------------------------------------------

    def copied(self, done: CopyDone, now: float) -> None:
        """A copy has ended: perhaps a sequence has all its blocks, or must look again for what it lacks."""
        lacking = self.intake.copied(done, now)
        self.landings.copied(done)
        self._valuation.copied(self._residency.copied(done, now), done, now)
        if lacking is not None:
            self._look_again(lacking, now)

    def tier_down(self, tier: str, now: float) -> None:
        """A tier is out of use: whoever waits for it looks again, without it."""
        for sequence in self.intake.touching(self._residency.tier_down(tier)):
            self._look_again(sequence, now)

    def _look_again(self, sequence: Sequence, now: float) -> None:
        """What a tier promised has not come: back into the line, where the next match knows better."""
        self.counts.reload_failures += 1
        reason = "what a tier below the device had promised did not come"
        self._decide(sequence, Decision(Kind.LOAD_FAILED, "", "wait", reason))
        if sequence.state is State.RUNNING:  # a split, with copies that may still write to its blocks
            self._give_up(sequence, now)
            return
        self._places.leave(sequence)
        sequence.state = State.WAITING
        self.line.go_on(sequence)
