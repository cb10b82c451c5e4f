"""Sequences on their way from one replica to another: which are wanted, which are under way, how each ended. Pure.

A waiter goes at once: its snapshot waits at the target from then on. A running one goes live (migration.py); without a
tier below the device, where nothing can be copied, it gives up its place and is computed again at the target. Who moves
is decided elsewhere: by operators, drains, or a rebalancing policy (fleet.py).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.core import Core
from engine.events import MigrationOver, Pause
from engine.ledger import ChoiceId, Ledger
from engine.member import Member
from engine.migration import Migration, Stage
from engine.sequence import Sequence, State

REASONS = ("operator", "drain", "failure", "load", "size")
"""Why a sequence moves: somebody wants it to; its replica drains, or is lost; by the rebalancing policy, to even loads
out, or because it has outgrown its replica. Of two that wait, the one whose reason stands first here counts."""

OF_POLICIES = ("load", "size")
"""Of these, those of the rebalancing policy."""

MOST_WANTED = 10_000
"""Moves that wait for their turn; more are not taken."""


@dataclass(frozen=True, slots=True)
class Move:
    """`target` None: to be chosen when its turn comes. `reason`: one of REASONS; `detail`: to it, for people."""

    request: str
    choice: int
    target: int | None
    reason: str
    detail: str = ""

    @property
    def sequence(self) -> ChoiceId:
        return self.request, self.choice


Choose = Callable[[Sequence, Member], Member | None]
"""Where a sequence, which is here, had better be; None: nowhere else."""


class Moves:
    """`at_once`: most that are under way together. `choose`: for moves without a target."""

    def __init__(self, members: list[Member], ledger: Ledger, at_once: int, choose: Choose) -> None:
        self.over: list[MigrationOver] = []  # since somebody looked
        self._members = members
        self._ledger = ledger
        self._at_once = at_once
        self._choose = choose
        self._wanted: OrderedDict[ChoiceId, Move] = OrderedDict()  # in the order of their turns
        self._under_way: list[tuple[Migration, Move]] = []

    def __len__(self) -> int:
        """Under way, or wanted."""
        return len(self._under_way) + len(self._wanted)

    @property
    def moving(self) -> set[ChoiceId]:
        """Sequences that are under way, or wanted."""
        return {*self._wanted, *self._on_their_way}

    @property
    def _on_their_way(self) -> set[ChoiceId]:
        return {move.sequence for _, move in self._under_way}

    def want(self, moves: Iterable[Move]) -> None:
        """They begin in their turn. Of who is under way only an operator's choice and a drain are kept, until that is
        over; of two moves of one, a later one with no lesser reason takes the turn of the other."""
        under_way = self._on_their_way
        for move in moves:
            before = self._wanted.get(move.sequence)
            if before is None:
                welcome = len(self._wanted) < MOST_WANTED
                welcome = welcome and (move.sequence not in under_way or _outlasts_another(move))
            else:
                welcome = REASONS.index(move.reason) <= REASONS.index(before.reason)
            if welcome:
                self._wanted[move.sequence] = move

    # --- going on -------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> tuple[bool, list[Core]]:
        """Begins what has its turn, and goes on with what is under way.

        Returns whether anything has got further, so that there may be more to do, and whose work may have changed.
        """
        touched: list[Core] = []
        progress = self._begin(now, touched)
        for migration, move in list(self._under_way):
            stage = migration.stage
            migration.advance(now)
            progress = progress or migration.stage is not stage
            if migration.stage is not stage or migration.stage in (Stage.COPYING, Stage.LEAVING):
                touched += (migration.source, migration.target)
            if migration.stage is Stage.OVER:
                self._end(migration, move, now)
        return progress, touched

    def landed(self, twin: Sequence, now: float) -> Core:
        """A target runs it. Returns its source, which has room now."""
        for migration, move in self._under_way:
            if migration.stage is Stage.COMING and migration.twin is twin:
                migration.landed(now)
                twin.crossed = twin.crossed or move.reason == "size"
                self._ledger.move((twin.request.id, twin.choice), migration.target.replica)
                self._end(migration, move, now)
                return migration.source
        raise AssertionError(f"{twin.request.id} has landed, and nobody sent it")

    def abort(self, concerns: Callable[[Migration], bool], why: str, now: float) -> list[Core]:
        """Ends migrations, which go on at their sources. Returns whose work may have changed."""
        touched: list[Core] = []
        for migration, move in list(self._under_way):
            if concerns(migration):
                migration.abort(why)
                self._end(migration, move, now)
                touched += (migration.source, migration.target)
        return touched

    def forget(self, request: str) -> None:
        """Its wanted moves are not wanted any more."""
        for sequence in [each for each in self._wanted if each[0] == request]:
            del self._wanted[sequence]

    # --- beginnings and ends --------------------------------------------------------------------------------------

    def _begin(self, now: float, touched: list[Core]) -> bool:
        """Whether there was something to begin."""
        began, later, under_way = False, list[Move](), self._on_their_way
        while self._wanted and len(self._under_way) < self._at_once:
            _, move = self._wanted.popitem(last=False)
            found = self._find(move)
            if found is None:
                continue
            sequence, source = found
            if sequence.state is State.LOADING or move.sequence in under_way:
                later.append(move)  # when all of it is there, and it is on no other way
                continue
            target = self._choose(sequence, source) if move.target is None else self._members[move.target]
            stays = move.reason == "drain" and not source.draining  # any more
            if stays or target is source:
                continue
            began = True
            if target is None or (obstacle := _obstacle(sequence, target)):
                why = obstacle if target else "no other replica takes it"
                to = target.number if target else source.number
                sequence.migrated_at = now
                self._note(move, source.number, to, failure=why)
            elif sequence.state is State.RUNNING and source.core.scheduler.residency.keeps:
                migration = Migration(sequence, source.core, target.core, now)
                self._under_way.append((migration, move))
            else:
                self.send(sequence, source.core, target.core, move, now)
                touched += (source.core, target.core)
        self._wanted.update((move.sequence, move) for move in later)
        return began

    def _find(self, move: Move) -> tuple[Sequence, Member] | None:
        for member in self._members:
            for sequence in member.core.sequences.get(move.request, ()):
                if sequence.choice == move.choice:
                    return sequence, member
        return None

    def send(self, sequence: Sequence, source: Core, target: Core, move: Move, now: float) -> None:
        """It waits at the target from now on, with all that is kept of it below the devices.

        If it waited at the source, that counts there.
        """
        waited_tokens = source.waited_tokens(sequence)
        snapshot = source.depart(sequence, now)
        twin = target.twin(sequence, snapshot)
        twin.pins, sequence.pins = sequence.pins, []
        twin.migrations, twin.migrated_at = twin.migrations + 1, now
        twin.crossed = twin.crossed or move.reason == "size"
        target.adopt(twin, waited_tokens, now)
        self._ledger.move((sequence.request.id, sequence.choice), target.replica)
        self._members[source.replica].changed()
        self._note(move, source.replica, target.replica)

    def _note(self, move: Move, source: int, target: int, failure: str = "") -> None:
        """One that was no live migration is over."""
        key = move.request, move.choice
        self.over.append(
            MigrationOver(*key, source, target, move.reason, failure, False, 0.0, Pause(), move.detail)
        )

    def _end(self, migration: Migration, move: Move, now: float) -> None:
        self._under_way.remove((migration, move))
        source, target = migration.source.replica, migration.target.replica
        seconds, failure = now - migration.began, migration.failure
        if failure:
            migration.sequence.migrated_at = now
        self.over.append(
            MigrationOver(
                *(move.request, move.choice, source, target, move.reason, failure, True, seconds),
                migration.pause,
                move.detail,
            )
        )

    def take_over(self) -> list[MigrationOver]:
        over, self.over = self.over, []
        return over


def _outlasts_another(move: Move) -> bool:
    """Whether it is wanted still when one that is under way is over, unless that has brought it about."""
    return move.reason == "drain" or (move.reason == "operator" and move.target is not None)


def _obstacle(sequence: Sequence, target: Member) -> str:
    """Why it cannot begin to move there now, if so."""
    if not target.up:
        return "the target is down"
    if target.draining:
        return "the target drains"
    too_small = sequence.prompt_tokens + sequence.max_tokens > target.core.config.context
    return "the target is too small for it" if too_small else ""
