"""One live migration: a running sequence goes on at another replica, with a pause of hardly more than its tail's copy.

    COPYING    it runs; its full blocks go below the device, as far as they are not there
    FETCHING   it runs; the target has reserved a place, and fetches them. Then what has been computed meanwhile is
               copied in the same way, until it is little
    STOPPING   it is paused; the steps that it is in end
    LEAVING    its last blocks and its tail go below the device: its snapshot
    LANDING    the target fetches them, and runs it with its next step: from then on it is the target's
    COMING     they are here; the target's step under way ends

Until the target runs it, it is the source's, and whatever fails, it goes on there as if nothing had been. Where there
is no tier below the device, nothing can be copied: see moves.py. Pure. Who migrates, and why: policies/rebalancing.py.
Staged copies under a running sequence are Clark et al., "Live Migration of Virtual Machines", NSDI'05; of KV, Sun et
al., "Llumnix", OSDI'24.
"""

from collections.abc import Iterable
from enum import StrEnum

from engine.core import Core
from engine.events import Pause
from engine.landings import Landings
from engine.resumption import Match
from engine.sequence import Sequence, State
from engine.snapshot import Snapshot
from kvstore.block import Key
from kvstore.shelf import Entry

LITTLE_BLOCKS = 1
"""Full blocks not copied yet at which it is paused."""

MOST_ROUNDS = 4
"""Of copying while it runs; then it is paused whatever is left."""

MOST_SECONDS, MOST_PAUSED_SECONDS = 60.0, 5.0
"""In all, and of these while it is paused: then the migration fails, and the sequence goes on at its source."""


class Stage(StrEnum):
    COPYING = "copying"
    FETCHING = "fetching"
    STOPPING = "stopping"
    LEAVING = "leaving"
    LANDING = "landing"
    COMING = "coming"
    OVER = "over"


class Migration:
    """`advance` is called after each event of the source or the target, until `stage` is OVER.

    `failure` says then why it goes on at the source; "" if it has moved.
    """

    def __init__(self, sequence: Sequence, source: Core, target: Core, now: float) -> None:
        assert sequence.state is State.RUNNING
        self.sequence = sequence
        self.source = source
        self.target = target
        self.began = now
        self.paused_at: float | None = None
        self.pause = Pause()
        self.stage = Stage.COPYING
        self.failure = ""
        self.rounds = 0
        self._twin: Sequence | None = None
        self._snapshot: Snapshot | None = None
        self._epoch = sequence.epoch
        self._stopped = self._arrived = (0.0, 0)  # when, and the source's steps: it was in none, all was here
        self._fetched_blocks = 0  # full ones that the target has or fetches
        self._match: Match | None = None  # of the snapshot, at the target
        self._pins: list[Entry] = []
        self._awaited: Key | None = None  # before this one is below the device, there is nothing to look at
        self._lacks = False  # blocks of which none is on its way down

    @property
    def twin(self) -> Sequence:
        assert self._twin is not None
        return self._twin

    @property
    def snapshot(self) -> Snapshot:
        assert self._snapshot is not None
        return self._snapshot

    def advance(self, now: float) -> None:
        """Goes as far as it can."""
        if self.stage is Stage.OVER:
            return
        if failure := self._impossible(now):
            self.abort(failure)
            return
        while self._go_on(now):
            pass

    def _go_on(self, now: float) -> bool:
        """Whether another stage has been reached, so that there may be more to do."""
        before = self.stage
        match before:
            case Stage.COPYING:
                self._copy(now)
            case Stage.FETCHING:
                self._look_after_fetch(now)
            case Stage.STOPPING:
                self._take_snapshot(now)
            case Stage.LEAVING:
                self._leave(now)
            case Stage.LANDING:
                self._look_after_landing(now)
        return self.stage is not before

    def _impossible(self, now: float) -> str:
        sequence = self.sequence
        if sequence.state is not State.RUNNING or sequence.epoch != self._epoch:
            return "it ended, or gave up its place"
        if self.target.dead:
            return "the target died"
        if self.paused_at is not None and now - self.paused_at > MOST_PAUSED_SECONDS:
            return "its last blocks took too long"
        if now - self.began > MOST_SECONDS:
            return "its blocks took too long"
        return ""

    # --- while it runs --------------------------------------------------------------------------------------------

    def _copy(self, now: float) -> None:
        sequence = self.sequence
        if sequence.head_end or self._waits_for_copies:
            return  # a part of it is still on its way, up or down
        checkpoints = self.source.scheduler.life.checkpoints
        checkpoints.save_all(sequence, now)
        keys = sequence.keys[: sequence.published]
        self._pin(keys)
        if not self._all_below(keys):
            return
        if self._twin is None:
            snapshot = sequence.take_snapshot(self._block_size)
            self._twin = self.target.twin(sequence, snapshot)
            match = self._landings.match(self.twin)
            if not self._landings.reserve(self.twin, match):
                self._twin = None
                self.abort("the target has no room")
                return
        else:
            self.twin.restore(sequence.take_snapshot(self._block_size))
            match = self._landings.match(self.twin)
            if not self._landings.extend(self.twin, match):
                self.abort("the target has no room")
                return
        self._fetched_blocks = sequence.published
        self._landings.fetch(self.twin, _full_blocks(match), self.target.outstanding_step, now)
        self.stage, self.rounds = Stage.FETCHING, self.rounds + 1

    def _look_after_fetch(self, now: float) -> None:
        outcome = self._landings.outcome(self.twin)
        if outcome is None:
            return
        if not outcome:
            self.abort("blocks were lost on the way")
        elif self.sequence.published - self._fetched_blocks <= LITTLE_BLOCKS or self.rounds >= MOST_ROUNDS:
            self.sequence.paused, self.paused_at = True, now
            self.stage = Stage.STOPPING
        else:
            self.stage = Stage.COPYING

    # --- while it is paused ---------------------------------------------------------------------------------------

    def _take_snapshot(self, now: float) -> None:
        sequence = self.sequence
        if sequence.pending or sequence.scheduled != sequence.computed:
            return  # rows under way
        self._snapshot = sequence.take_snapshot(self._block_size)
        self._stopped = now, self.source.steps_told
        self.stage = Stage.LEAVING

    def _leave(self, now: float) -> None:
        if self._waits_for_copies:
            return
        snapshot = self.snapshot
        self.source.scheduler.life.checkpoints.save_snapshot(self.sequence, snapshot, now)
        self._pin(snapshot.all_keys)
        if not self._all_below(snapshot.all_keys):
            return
        self.twin.restore(snapshot)
        match = self._landings.match(self.twin)
        if match.waits_for is not None:
            return
        if match.tokens < snapshot.computed:
            self.abort("blocks were lost below the device")
        elif not self._landings.extend(self.twin, match):
            self.abort("the target has no room")
        else:
            self._landings.fetch(self.twin, match, self.target.outstanding_step, now)
            self._match = match
            self.stage = Stage.LANDING

    def _look_after_landing(self, now: float) -> None:
        outcome = self._landings.outcome(self.twin)
        if outcome is None:
            return
        if not outcome:
            self.abort("blocks were lost on the way")
            return
        twin, sequence = self.twin, self.sequence
        twin.expected_remaining_tokens = sequence.expected_remaining_tokens
        twin.waiting_since = self.began if self.paused_at is None else self.paused_at
        assert self._match is not None
        self._landings.land(twin, self._match)
        self._arrived = now, self.source.steps_told
        self.stage = Stage.COMING

    # --- its end --------------------------------------------------------------------------------------------------

    def landed(self, now: float) -> None:
        """The target runs it, as urgent as it is by now: it is the source's no more."""
        assert self.stage is Stage.COMING
        self.twin.reprioritise(self.sequence.priority, self.sequence.request.service)
        self.pause = self._paused(now)
        self._unpin()
        residency = self.source.scheduler.residency
        self.source.depart(self.sequence, now)
        residency.unpin(self.sequence.pins)
        self.sequence.pins = []
        if self.snapshot.tail is not None:
            residency.discard(self.snapshot.tail.key)
        self.target.settle(self.twin)
        self.stage = Stage.OVER

    def _paused(self, now: float) -> Pause:
        assert self.paused_at is not None
        (stopped, steps_then), (arrived, steps_before) = self._stopped, self._arrived
        return Pause(
            seconds=now - self.paused_at,
            steps=self.source.steps_told - steps_then,
            transfer_seconds=arrived - stopped,
            transfer_steps=steps_before - steps_then,
        )

    def abort(self, failure: str) -> None:
        """It goes on at its source, if it still runs there."""
        self.failure, self.stage = failure, Stage.OVER
        self.sequence.paused = False
        self._unpin()
        if self._twin is not None:
            self._landings.give_up(self._twin)
        tail = self._snapshot.tail if self._snapshot else None
        if tail is not None:
            self.source.scheduler.residency.discard(tail.key)

    # --- blocks ---------------------------------------------------------------------------------------------------

    @property
    def _landings(self) -> Landings:
        return self.target.scheduler.life.landings

    @property
    def _block_size(self) -> int:
        return self.source.config.scheduler.block_size

    def _all_below(self, keys: Iterable[Key]) -> bool:
        """Whether the target can have each of them. Aborts where one is not, and nothing under way might help."""
        residency, pool = self.source.scheduler.residency, self.target.scheduler.pool
        missing = [key for key in keys if pool.block_of(key) is None and not residency.readable(key)]
        self._awaited = next(filter(residency.writing, reversed(missing)), None)
        self._lacks = bool(missing) and self._awaited is None
        if self._lacks and residency.below.quiet:
            self.abort("there is no room below the device")
        return not missing

    @property
    def _waits_for_copies(self) -> bool:
        """Whether the last one that was seen on its way down still is: those before it were told before. Or others'
        are, as many as may be."""
        residency = self.source.scheduler.residency
        if self._awaited is not None:
            return residency.writing(self._awaited)
        return self._lacks and residency.spilling_room <= 0

    def _pin(self, keys: Iterable[Key]) -> None:
        """Keeps what is below the device of these from eviction: what was pinned before stays so meanwhile."""
        before = self._pins
        self._pins = self.source.scheduler.residency.pin(keys)
        self.source.scheduler.residency.unpin(before)

    def _unpin(self) -> None:
        self.source.scheduler.residency.unpin(self._pins)
        self._pins = []


def _full_blocks(match: Match) -> Match:
    """Without the tail, which is another one at the next token."""
    return Match(match.blocks[: match.full], match.full, match.tokens, match.waits_for)
