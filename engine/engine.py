"""The shell around the fleet: feeds it events, carries its instructions out. Lives on the event-loop thread.

It decides nothing: where a request runs is fleet.py's, what to compute is scheduler.py's, how is the runner's, on which
thread is worker.py's. Each replica's worker and its fate are replica.py's. What goes to the store and comes from it
passes tiers_below.py; what operators see is state.py's.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.core import Core
from engine.events import (
    Account,
    Arrived,
    Cancelled,
    Damaged,
    Decided,
    Drained,
    Emit,
    Event,
    Instruction,
    Migrated,
    MigrationOver,
    PoliciesChanged,
    PolicyFailed,
    Preempted,
    Pruned,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Report,
    Reprioritised,
    Resumed,
    Run,
    StepDone,
    Timer,
)
from engine.fleet import Fleet, Told
from engine.plan import StepResult
from engine.records import CopyRecord, StepRecord
from engine.replica import Replica
from engine.request import EngineDead, Finished, QueueFull, Refused, Request, ServiceClass
from engine.sequence import State
from engine.state import fleet_state, summary
from engine.stream import Bell, Stream
from engine.tiers_below import Store, TiersBelow
from engine.timeline import Timelines
from engine.worker import Worker
from kvstore.copies import DEVICE, Copy, Drop
from kvstore.tier import Tier

NO_STEP = Account(0, 0, 0, 0, 0, 0, 0.0, 0.0)
"""Of a replica that ends none any more."""


class Recorder(Protocol):
    def record(self, now: float, event: Event, told: list[Told]) -> None: ...


@dataclass(frozen=True, slots=True)
class Revived:
    """What a lost replica goes on with."""

    worker: Worker
    device: Tier | None  # None: there is no tier below it


Revive = Callable[[int], Awaitable[Revived]]


class Engine:
    """All replicas of the process. All methods but `stop` belong to the event-loop thread that created it.

    `workers`: one a replica. `revive`: makes a worker for a lost replica; None: it stays lost. A step that takes
    longer than `hung_seconds` means that its replica hangs.
    """

    def __init__(
        self,
        fleet: Fleet,
        workers: Sequence[Worker],
        *,
        exact: bool,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
        revive: Revive | None = None,
        hung_seconds: float = float("inf"),
        restart_seconds: float = 0.0,
    ) -> None:
        self.fleet = fleet
        self.exact = exact
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.on_finished: list[Callable[[Finished], None]] = []
        self.on_copy: list[Callable[[CopyRecord], None]] = []
        self.on_resumed: list[Callable[[Resumed, int], None]] = []  # (what, at which replica)
        self.on_policy_failed: list[Callable[[PolicyFailed], None]] = []
        self.on_migration: list[Callable[[MigrationOver], None]] = []
        self.on_replica: list[Callable[[int, bool, str], None]] = []  # (number, up, reason)
        self.timelines = Timelines()
        self.on_tier: list[Callable[[str, bool, str], None]] = []  # (tier, up, reason)
        self.draining = False
        self._clock = clock
        self._now = clock()  # of the event being handled
        self._recorder = recorder
        self._revive = revive
        self._hung_seconds = hung_seconds
        self._restart_seconds = restart_seconds
        self._restarts: set[asyncio.Task[None]] = set()
        self._streams: dict[str, Stream] = {}
        self._loop = asyncio.get_running_loop()
        self._bell = Bell(self._loop)
        self.dead: asyncio.Future[BaseException] = self._loop.create_future()
        self._idle = asyncio.Event()
        self._idle.set()
        self._quiet = asyncio.Event()  # idle, and nothing is on its way between tiers
        self._quiet.set()
        self.block_bytes = store.block_bytes(DEVICE) if store else 0
        self._tiers: TiersBelow | None = None
        self.replicas = [
            Replica(number, worker, core.scheduler, self._reported)
            for number, (worker, core) in enumerate(zip(workers, fleet.cores, strict=True))
        ]
        if store is not None:
            self._tiers = TiersBelow(store, self._feed_if_alive, self.on_copy, self.on_tier)

    @property
    def core(self) -> Core:
        """The first replica's."""
        return self.fleet.cores[0]

    # --- for clients ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Takes a request. Raises QueueFull, Refused (it can never run here, or the server drains) or EngineDead."""
        if self.failure is not None:
            raise EngineDead("the engine has died; the server is shutting down") from self.failure
        if self.draining:
            raise Refused("The server is shutting down.", code="shutting_down")
        stream = self._streams[request.id] = Stream(request, self.cancel, self._bell)
        told = self._feed(Arrived(request))
        rejection = next((i for each in told for i in each.instructions if isinstance(i, Reject)), None)
        if rejection is not None:
            del self._streams[request.id]
            kind = QueueFull if rejection.code == "queue_full" else Refused
            raise kind(rejection.message, code=rejection.code, param=rejection.param)
        return stream

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its blocks at once. False when there is none of that id."""
        if self.failure is not None or not self.fleet.sequences_of(request_id):
            return False
        self._feed(Cancelled(request_id))
        return True

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for those at hand; after `seconds` cancels what is left.

        Then, for at most as long again, it waits for what is still to be saved. Returns whether all requests ended by
        themselves.
        """
        self.draining = True
        await self._wait(self._idle, seconds)
        left = self.fleet.requests
        for request_id in left:
            self.cancel(request_id)
        await self._wait(self._quiet, seconds)
        return not left and self.failure is None

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        """Until the event, the engine's death, or the time is over."""
        happened: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
        await asyncio.wait([happened, self.dead], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        happened.cancel()

    def stop(self) -> None:
        """Ends the workers once their steps are done. The engine takes nothing after this, and tells nobody:

        `drain` first. A ThreadWorker is waited for: call this on a thread other than the loop's then.
        """
        self.draining = True
        for replica in self.replicas:
            if not replica.lost:
                replica.worker.stop()

    def preempt(self, request_id: str) -> bool:
        """Makes a request give up its place now; it comes back in its turn. False when none of it is running."""
        sequences = self.fleet.sequences_of(request_id) if self.failure is None else ()
        if not any(sequence.state is State.RUNNING for sequence in sequences):
            return False
        self._feed(Preempted(request_id))
        return True

    def reprioritise(self, request_id: str, priority: int, service: ServiceClass) -> bool:
        """Makes a request as urgent as this. False when there is none of that id."""
        if self.failure is not None or not self.fleet.sequences_of(request_id):
            return False
        self._feed(Reprioritised(request_id, priority, service))
        return True

    def migrate(self, request_id: str, replica: int | None = None) -> bool:
        """Makes a request go on at another replica; None: where routing says. False when there is none of that id."""
        if self.failure is not None or not self.fleet.sequences_of(request_id):
            return False
        self._feed(Migrated(request_id, replica))
        return True

    def drain_replica(self, replica: int, *, draining: bool) -> None:
        """A replica takes nothing more, and its requests go on elsewhere; or it takes some again.

        One that is lost is started again at once where it is to take some.
        """
        if self.failure is None:
            self._feed(Drained(replica, draining))
            if not draining and self.replicas[replica].lost and not self.replicas[replica].starting:
                self.replicas[replica].restart_at = self._clock()
                self.tick()

    def tick(self) -> None:
        """To be called every second or so: looks for replicas that hang, or may be started again; compares loads."""
        now = self._clock()
        for replica in self.replicas:
            if self.failure is None and replica.working_seconds(now) > self._hung_seconds:
                self._lose(replica, TimeoutError(f"a step has taken longer than {self._hung_seconds:g} s"))
            if self.failure is None and self._revive is not None and now >= replica.restart_at:
                replica.restart_at, replica.starting = float("inf"), True
                restart = self._loop.create_task(self._restart(replica, self._revive))
                self._restarts.add(restart)
                restart.add_done_callback(self._restarts.discard)
        if self.failure is None:
            self._feed(Timer())

    def use_policies(self, names: Mapping[str, str]) -> None:
        """Other policies decide from now on, by family: names of those loaded at start."""
        if self.failure is None:
            self._feed(PoliciesChanged(tuple(sorted(names.items()))))

    def prune(self, tier: str, blocks: int) -> int:
        """Shrinks a tier to `blocks` by the eviction policy; 0 forgets all that is idle. Returns how many left."""
        before = self._blocks_in(tier)
        if self.failure is None:
            self._feed(Pruned(tier, blocks))
        return before - self._blocks_in(tier)

    def damaged(self, tier: str, keys: Collection[bytes]) -> None:
        """Drops records that cannot be read."""
        if self.failure is None and keys:
            self._feed(Damaged(tier, tuple(keys)))

    async def quiet(self) -> None:
        """Waits until nobody is served, and nothing is on its way between tiers."""
        await self._quiet.wait()

    def _blocks_in(self, tier: str) -> int:
        cores = self.fleet.cores
        if tier == DEVICE:
            return sum(core.scheduler.pool.cached for core in cores)
        return len(cores[0].scheduler.residency.shelves.named(tier))

    # --- for operators --------------------------------------------------------------------------------------------

    @property
    def restarts(self) -> bool:
        """Whether a replica that is lost can be started again."""
        return self._revive is not None

    @property
    def failure(self) -> BaseException | None:
        return self.dead.result() if self.dead.done() else None

    def state(self) -> dict[str, object]:
        return {
            "exact": self.exact,
            "alive": self.failure is None,
            "draining": self.draining,
            **fleet_state(self.fleet, self.replicas, self.block_bytes),
        }

    def requests(self) -> list[dict[str, object]]:
        """One entry a request; a request's state is that of its choice that is furthest on."""
        return [
            summary(self.fleet, request_id, self.timelines.ended_choices(request_id))
            for request_id in self.fleet.requests
        ]

    # --- events in, instructions out ------------------------------------------------------------------------------

    def _feed(self, event: Event) -> list[Told]:
        now = self._now = self._clock()
        try:
            told = self._handle(event, now)
            for replica, instructions in told:
                for instruction in instructions:
                    self._carry_out(instruction, replica)
            self._note_idleness()
        except Exception as error:  # a bug of ours: nothing after it can be trusted, so the engine ends
            self._die(error)
            raise
        return told

    def _feed_if_alive(self, event: Event) -> bool:
        """Of the tiers' news: False when nobody is left to hear them."""
        if self.failure is not None:
            return False
        self._feed(event)
        return True

    def _handle(self, event: Event, now: float) -> list[Told]:
        told: list[Told] = []
        try:
            told = self.fleet.handle(event, now)
        finally:  # the event that a core fails at is the one that a replay must have
            if self._recorder is not None:
                self._recorder.record(now, event, told)
        return told

    def _carry_out(self, instruction: Instruction, replica: int) -> None:
        match instruction:
            case Run(plan):
                self.replicas[replica].submit(plan, self._now)
            case Emit(request_id, delta):
                self._streams[request_id].feed(delta)
            case Report(finished):
                self._settle(finished)
            case Account():
                self._account(instruction, self.replicas[replica])
            case Reject():
                pass  # submit() raises it
            case Decided(request_id, choice, decision):
                self.timelines.note(request_id, choice, decision, self._now)
            case Resumed():
                for observe in self.on_resumed:
                    observe(instruction, replica)
            case PolicyFailed():
                for observe_failure in self.on_policy_failed:
                    observe_failure(instruction)
            case MigrationOver():
                for observe_migration in self.on_migration:
                    observe_migration(instruction)
            case Copy():
                self._tiers_below.submit(instruction)
            case Drop():
                self._tiers_below.drop(instruction)

    @property
    def _tiers_below(self) -> TiersBelow:
        assert self._tiers is not None, "the core has tiers that the engine has not"
        return self._tiers

    def _settle(self, finished: Finished) -> None:
        stream = self._streams[finished.request]
        stream.settle(finished)
        self.timelines.settled(finished, last=stream.ended)
        if stream.ended:  # not: unknown to the core, which is ahead of the instructions it gave
            del self._streams[finished.request]
        for observe in self.on_finished:
            observe(finished)

    def _account(self, account: Account, replica: Replica) -> None:
        held = self.fleet.cores[replica.number].scheduler.pool.held
        replica.kv_peak_blocks = max(replica.kv_peak_blocks, held)
        if self.on_step:
            record = replica.accounts.record(account)
            for observe in self.on_step:
                observe(record)

    def _note_idleness(self) -> None:
        idle = self.fleet.idle
        quiet = idle and self.fleet.quiet
        assert not quiet or not any(core.scheduler.pool.held for core in self.fleet.cores), "blocks leaked"
        for event, happened in ((self._idle, idle), (self._quiet, quiet)):
            if happened:
                event.set()
            else:
                event.clear()

    # --- workers report, die and come back --------------------------------------------------------------------------

    def _reported(self, replica: Replica, epoch: int, result: StepResult | BaseException) -> None:
        if epoch != replica.epoch or self.failure is not None:
            return  # it was given up: what comes late counts no more
        if isinstance(result, BaseException):
            self._lose(replica, result)
            return
        replica.step_ended()
        if self._tiers is not None:
            self._tiers.step_ended(replica.number, result.step)
        self._feed(StepDone(result, replica.number))

    def _lose(self, replica: Replica, failure: BaseException) -> None:
        """A replica's device is given up. Its requests go on elsewhere; with the last one the engine dies."""
        if not any(not other.lost for other in self.replicas if other is not replica):
            self._die(failure)
            return
        reason = f"{type(failure).__name__}: {failure}"
        restarts = self._revive is not None and self._restart_seconds > 0
        replica.lose(reason, self._clock() + self._restart_seconds if restarts else float("inf"))
        self._tell_replica(replica.number, False, reason)
        self._feed(ReplicaDown(replica.number, reason))
        self._account(NO_STEP, replica)  # what it had counted for the steps that nobody waits for any more
        if self._tiers is not None:
            self._tiers.replica_lost(replica.number)

    async def _restart(self, replica: Replica, revive: Revive) -> None:
        try:
            revived = await revive(replica.number)
        except Exception as error:  # noqa: BLE001 (whatever a device raises, the others go on; it is tried again)
            replica.starting = False
            if self._restart_seconds > 0:
                replica.restart_at = self._clock() + self._restart_seconds
            self._tell_replica(replica.number, False, f"not started again: {type(error).__name__}: {error}")
            return
        if self.failure is not None or self.draining:
            replica.starting = False
            revived.worker.abandon()
            return
        if self._tiers is not None and revived.device is not None:
            self._tiers.put_device(replica.number, revived.device)
        replica.start(revived.worker)
        self._feed(ReplicaUp(replica.number))
        replica.count(self.fleet.cores[replica.number].scheduler)
        self._tell_replica(replica.number, True, "started again")

    def _tell_replica(self, number: int, up: bool, reason: str) -> None:
        for observe in self.on_replica:
            observe(number, up, reason)

    def _die(self, failure: BaseException) -> None:
        if self.failure is None:
            self.dead.set_result(failure)
            for stream in self._streams.values():
                stream.fail(failure)
