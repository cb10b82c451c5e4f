"""All replicas of the process as one pure machine: `handle(event, now)` → what each replica is told (design §7).

Each replica is a core (core.py) with a device of its own; what lies below the devices, and what policies learn, is
common to all (common.py). A request is placed by the routing policy (placing.py), and goes on elsewhere when the
rebalancing policy or an operator says so (moves.py), or when its replica is lost. What is charged to whom is
ledger.py's; what policies see of a replica is member.py's and candidates.py's. No clock, no I/O, no torch: replays byte
for byte.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.candidates import Movable
from engine.common import Common
from engine.core import Core, CoreConfig
from engine.events import (
    Arrived,
    Cancelled,
    Damaged,
    Decided,
    Drained,
    Event,
    Instruction,
    Migrated,
    MigrationOver,
    PoliciesChanged,
    Preempted,
    Pruned,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Reprioritised,
    StepDone,
    Timer,
)
from engine.ledger import Ledger
from engine.member import Member
from engine.moves import OF_POLICIES, Move, Moves
from engine.placing import Placing
from engine.policy_set import Catalog
from engine.request import Request
from engine.sequence import Sequence as EngineSequence
from engine.sequence import State
from engine.size_classes import SizeClasses
from kvstore.copies import DEVICE, CopyDone, TierDown, TierUp
from policies.decisions import Decision, Kind
from policies.rebalancing import Limits

MOST_PERIOD_SECONDS = 60.0
"""Between two looks at the loads: a replica that hangs is noticed by then."""


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    core: CoreConfig
    role: str = "any"
    limit_tokens: int = 0  # of its size class; 0: none


@dataclass(frozen=True, slots=True)
class BalanceConfig:
    """How loads are evened out: the parameters of the table [policies.balance].

    Every `period_seconds`, loads are compared, and replicas looked at that hang or may be started again.
    """

    period_seconds: float = 1.0
    cooldown_seconds: float = 10.0
    max_moves: int = 3
    moves_per_round: int = 4
    min_gain: float = 8.0
    least_gap: float = 0.5  # of two loads, as a share of the higher, for one to move
    disturbance: float = 0.1  # what a second that a move delays others counts
    at_once: int = 4  # migrations under way
    horizon_steps: int = 128  # of the forecast
    limits: str = "fixed"  # of size classes: as configured, or "auto": learned (size_classes.py)

    def __post_init__(self) -> None:
        if not 0.0 < self.period_seconds <= MOST_PERIOD_SECONDS:
            raise ValueError(f"period_seconds must be above 0, and at most {MOST_PERIOD_SECONDS:g}")
        if min(self.at_once, self.horizon_steps) < 1:
            raise ValueError("at_once and horizon_steps must be at least 1")
        if self.limits not in ("fixed", "auto"):
            raise ValueError(f'limits must be "fixed" or "auto", not {self.limits!r}')
        assert self.move_limits  # raises ValueError

    @property
    def move_limits(self) -> Limits:
        return Limits(
            cooldown_seconds=self.cooldown_seconds,
            max_moves=self.max_moves,
            moves_per_round=self.moves_per_round,
            min_gain=self.min_gain,
            least_gap=self.least_gap,
            disturbance=self.disturbance,
        )


@dataclass(frozen=True, slots=True)
class FleetConfig:
    replicas: tuple[ReplicaConfig, ...]
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    @classmethod
    def of(
        cls, core: CoreConfig, replicas: int = 1, *, balance: BalanceConfig | None = None
    ) -> "FleetConfig":
        """So many alike."""
        return cls((ReplicaConfig(core),) * replicas, balance or BalanceConfig())


class Told(NamedTuple):
    """What a replica is told, in order."""

    replica: int
    instructions: list[Instruction]


class Fleet:
    """`vocabulary`, `catalog`: see Core and Common. The replicas' cores differ in nothing but their devices' sizes."""

    def __init__(
        self, config: FleetConfig, vocabulary: tuple[bytes, ...], catalog: Catalog | None = None
    ) -> None:
        self.config = config
        first = config.replicas[0].core.scheduler
        self.common = Common(first.policies, first.residency, catalog)
        self.ledger = Ledger(len(config.replicas))
        self.members = [self._member(number, vocabulary) for number in range(len(config.replicas))]
        balance = config.balance
        self._placing = Placing(self.members, self.common)
        self.moves = Moves(self.members, self.ledger, balance.at_once, self._placing.better)
        self.sizes = SizeClasses(self.members, auto=balance.limits == "auto")
        self.stayed = 0  # sequences that crossed their limit, and found no room elsewhere
        self._vocabulary = vocabulary
        self._gone: list[Core] = []  # of lost devices, whose copies have not ended
        self._limits = balance.move_limits

    def _member(self, number: int, vocabulary: tuple[bytes, ...]) -> Member:
        config = self.config.replicas[number]
        return Member(
            number,
            Core(config.core, vocabulary, self.common, number),
            self.ledger,
            role=config.role,
            limit_tokens=config.limit_tokens,
            horizon_steps=self.config.balance.horizon_steps,
        )

    # --- what there is --------------------------------------------------------------------------------------------

    @property
    def cores(self) -> list[Core]:
        """By replica."""
        return [member.core for member in self.members]

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together, at the replica that takes most."""
        return max(core.config.context for core in self.cores)

    def sequences_of(self, request_id: str) -> list[EngineSequence]:
        """Of a request that has not ended, wherever they are."""
        return [sequence for core in self.cores for sequence in core.sequences.get(request_id, ())]

    @property
    def requests(self) -> list[str]:
        """That have not ended."""
        return list(dict.fromkeys(request for core in self.cores for request in core.sequences))

    @property
    def waiting(self) -> int:
        return sum(core.scheduler.waiting for core in self.cores)

    @property
    def idle(self) -> bool:
        return all(core.idle for core in self.cores)

    @property
    def quiet(self) -> bool:
        """Nobody is served, and nothing is on its way between tiers."""
        return self.idle and all(core.scheduler.residency.quiet for core in (*self.cores, *self._gone))

    @property
    def alone(self) -> bool:
        return len(self.members) == 1

    # --- events ---------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Told]:
        """Changes the state by one event at time `now` (seconds, never falling)."""
        told: list[Told] = []
        match event:
            case StepDone(_, replica):
                self._tell(told, self.cores[replica], event, now)
            case Arrived(request):
                self._arrived(told, request, now)
            case CopyDone():
                owner = self._owner(event)
                self._tell(told, owner, event, now)
                self._go_on(
                    told, (core for core in self.cores if core is not owner and core.stands_still), now
                )
            case TierDown():
                touched = self.moves.abort(lambda migration: True, "a tier is out of use", now)
                for core in (*self.cores, *self._gone):
                    self._tell(told, core, event, now)
                self._go_on(told, touched, now)
            case TierUp() | Damaged():
                self._tell(told, self.cores[0], event, now)
            case PoliciesChanged():
                for core in self.cores:
                    self._tell(told, core, event, now)
            case Pruned(tier, _):
                for core in self.cores if tier == DEVICE else self.cores[:1]:
                    self._tell(told, core, event, now)
            case Cancelled(request_id):
                self._cancelled(told, event, now, request_id)
            case Preempted(request_id) | Reprioritised(request_id):
                for core in self.cores:
                    if request_id in core.sequences:
                        self._tell(told, core, event, now)
            case Migrated(request_id, target):
                self._want(((s, target) for s in self.sequences_of(request_id)), "operator")
            case Drained(replica, draining):
                self._drained(told, self.members[replica], draining, now)
            case ReplicaDown(replica, reason):
                self._down(told, self.members[replica], reason, now)
            case ReplicaUp(replica):
                self._up(self.members[replica], now)
            case Timer():
                self._timer(now)
        self._settle(told, now)
        return told

    def _tell(self, told: list[Told], core: Core, event: Event, now: float) -> None:
        told.append(Told(core.replica, core.handle(event, now)))
        self._changed(core)

    def _go_on(self, told: list[Told], cores: Iterable[Core], now: float) -> None:
        """Cores whose sequences were changed from outside. That they moved is told before what comes of it."""
        self._tell_moves(told)
        for core in dict.fromkeys(cores):
            told.append(Told(core.replica, core.go_on(now)))
            self._changed(core)

    def _changed(self, core: Core) -> None:
        self.members[core.replica].changed()
        for sequence, by_itself in core.ended:
            self.ledger.release((sequence.request.id, sequence.choice))
            if by_itself:
                self.sizes.observe(sequence.prompt_tokens, sequence.output_tokens)
        core.ended.clear()

    def _owner(self, done: CopyDone) -> Core:
        """Whose copy has ended."""
        return next(
            core for core in (*self.cores, *self._gone) if done.id in core.scheduler.residency.flights
        )

    def _settle(self, told: list[Told], now: float) -> None:
        """Moves go as far as they can, and what that allows begins."""
        progress = len(self.moves) > 0
        while progress:
            progress, touched = self.moves.advance(now)
            self._go_on(told, touched, now)
            for twin in [twin for core in self.cores for twin in core.take_landed()]:
                self._go_on(told, [self.moves.landed(twin, now)], now)
                progress = True
        self._tell_moves(told)
        for core in [core for core in self._gone if core.scheduler.residency.quiet]:
            self._gone.remove(core)
            self.common.below.part(core.scheduler.residency.flights)

    def _tell_moves(self, told: list[Told]) -> None:
        """Those that are over."""
        for over in self.moves.take_over():
            policy = self.common.config.rebalancing if over.reason in OF_POLICIES else ""
            told.append(Told(over.source, [over, _explained(over, policy)]))
            if not over.failure:
                for sequence in self.sequences_of(over.request_id):
                    self._placing.remember(sequence.request.session, over.target)

    # --- placing --------------------------------------------------------------------------------------------------

    def _arrived(self, told: list[Told], request: Request, now: float) -> None:
        first = self.cores[0]
        if self.waiting + request.n > first.config.max_queue:
            message = f"The queue is full: {self.waiting} requests are waiting. Try again later."
            told.append(Told(0, [Reject(request.id, "queue_full", message, None)]))
            return
        chain = first.chain(request)
        wanted_tokens = len(request.prompt) + request.stopping.max_tokens
        members = self._placing.taking(wanted_tokens)
        if not members:
            told.append(Told(0, [self._refusal(request, wanted_tokens)]))
            return
        member, seconds, decision = self._placing.newcomer(members, request, chain[1])
        instructions = member.core.arrive(request, chain, now)
        if not any(type(instruction) is Reject for instruction in instructions):
            for choice in range(request.n):
                self.ledger.charge((request.id, choice), member.number, seconds)
            if decision is not None:
                instructions.insert(0, Decided(request.id, 0, decision))
            self._placing.remember(request.session, member.number)
        told.append(Told(member.number, instructions))
        self._changed(member.core)

    def _refusal(self, request: Request, tokens: int) -> Reject:
        largest = max(self.members, key=lambda member: (member.up, member.core.config.context))
        if tokens <= self.context:
            return Reject(
                request.id, "no_replica", "No replica can take a request of this size just now.", None
            )
        return largest.core.too_long(request)

    # --- moving ---------------------------------------------------------------------------------------------------

    def _cancelled(self, told: list[Told], event: Event, now: float, request_id: str) -> None:
        self.moves.forget(request_id)
        touched = self.moves.abort(lambda m: m.sequence.request.id == request_id, "it was cancelled", now)
        for core in self.cores:
            if request_id in core.sequences:
                self._tell(told, core, event, now)
        self._go_on(told, touched, now)

    def _want(self, sequences: Iterable[tuple[EngineSequence, int | None]], reason: str) -> None:
        self.moves.want(Move(s.request.id, s.choice, target, reason) for s, target in sequences)

    def _drained(self, told: list[Told], member: Member, draining: bool, now: float) -> None:
        member.draining = draining
        if draining:
            touched = self.moves.abort(lambda m: m.target is member.core, "the target drains", now)
            self._go_on(told, touched, now)
            everyone = [s for sequences in member.core.sequences.values() for s in sequences]
            self._want(((sequence, None) for sequence in everyone), "drain")
        else:
            self._rebalance(now)

    def _down(self, told: list[Told], member: Member, reason: str, now: float) -> None:
        """Whoever was there goes on elsewhere; who fits nowhere ends with an error."""
        core = member.core
        if not member.up:
            return
        member.up, member.down_reason = False, reason
        touched = self.moves.abort(lambda m: core in (m.source, m.target), f"a replica died: {reason}", now)
        core.give_up()
        everyone = sorted((s for each in core.sequences.values() for s in each), key=lambda s: s.number)
        for sequence in everyone:
            target = self._placing.anew(
                sequence, self._placing.taking(sequence.prompt_tokens + sequence.max_tokens)
            )
            if target is None:
                told.append(Told(core.replica, core.fail(sequence, now)))
                self._changed(core)
                continue
            move = Move(sequence.request.id, sequence.choice, target.number, "failure", reason)
            self.moves.send(sequence, core, target.core, move, now)
            touched.append(target.core)
        told.append(Told(core.replica, core.go_on(now)))  # what it had decided to save
        member.changed()
        self._go_on(told, [each for each in touched if each is not core], now)

    def _up(self, member: Member, now: float) -> None:
        assert not member.up, "a replica that is up is not started again"
        self._gone.append(member.core)
        config = self.config.replicas[member.number].core
        member.restart(Core(config, self._vocabulary, self.common, member.number))
        self._rebalance(now)

    # --- evening out ----------------------------------------------------------------------------------------------

    def _timer(self, now: float) -> None:
        for member in self.members:
            member.compare_forecasts()
        self.sizes.draw()
        self._rebalance(now)

    def _rebalance(self, now: float) -> None:
        """On the period, and as soon as there is another replica to share with."""
        if self.alone:
            return
        moving = self.moves.moving
        movables = [
            Movable(member, sequence)
            for member in self.members
            if member.up
            for sequences in member.core.sequences.values()
            for sequence in sequences
            if sequence.state is not State.LOADING and (sequence.request.id, sequence.choice) not in moving
        ]
        round_ = self.common.policies.rebalancing(self.members, movables, now, self._limits)
        self.stayed += round_.stayed
        self.moves.want(
            Move(m.request, m.choice, m.target, "size" if m.for_size else "load", m.reason)
            for m in round_.moves
        )

    # --- invariants -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Asserts that the books balance; when idle, that nothing is left (design §4.4)."""
        for core in (*self.cores, *self._gone):
            core.check()
        self.ledger.check()
        assert not (self.quiet and self.cores[0].scheduler.residency.pinned), "pins leaked"
        assert len(self.ledger) == sum(len(each) for core in self.cores for each in core.sequences.values())


def _explained(over: MigrationOver, policy: str) -> Decided:
    """For the request's timeline. `policy`: that wanted it; "" where none did."""
    kind, chosen = (Kind.STAYED, over.source) if over.failure else (Kind.MIGRATED, over.target)
    way = f"live, paused for {over.pause.seconds:.4f} s" if over.live else "from its snapshot"
    why = f"{over.reason} ({over.detail})" if over.detail else over.reason
    reason = f"{why}: " + (over.failure or f"from replica {over.source}, {way}")
    return Decided(
        over.request_id, over.choice, Decision(kind, policy, f"replica {chosen}", reason, over.seconds)
    )
