"""The shell around the core: feeds it events, carries its instructions out. Lives on the event-loop thread.

It decides nothing: what to compute is scheduler.py's, how is the runner's, on which thread is worker.py's. What goes to
the store and comes from it passes tiers_below.py; what operators see of the core is state.py's.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from engine.core import Core
from engine.events import (
    Account,
    Arrived,
    Cancelled,
    Damaged,
    Decided,
    Emit,
    Event,
    Instruction,
    PoliciesChanged,
    PolicyFailed,
    Preempted,
    Pruned,
    Reject,
    Report,
    Reprioritised,
    Resumed,
    Run,
    StepDone,
)
from engine.plan import StepResult
from engine.records import CopyRecord, StepAccounts, StepRecord
from engine.request import EngineDead, Finished, QueueFull, Refused, Request, ServiceClass
from engine.sequence import State
from engine.state import core_state, summary
from engine.stream import Bell, Stream
from engine.tiers_below import Store, TiersBelow
from engine.timeline import Timelines
from engine.worker import Worker
from kvstore.copies import DEVICE, Copy, Drop


class Recorder(Protocol):
    def record(self, now: float, event: Event, instructions: list[Instruction]) -> None: ...


class Engine:
    """One replica. All methods but `stop` belong to the event-loop thread that created it."""

    def __init__(
        self,
        core: Core,
        worker: Worker,
        *,
        exact: bool,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
    ) -> None:
        self.core = core
        self.exact = exact
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.on_finished: list[Callable[[Finished], None]] = []
        self.on_copy: list[Callable[[CopyRecord], None]] = []
        self.on_resumed: list[Callable[[Resumed], None]] = []
        self.on_policy_failed: list[Callable[[PolicyFailed], None]] = []
        self.timelines = Timelines()
        self.on_tier: list[Callable[[str, bool, str], None]] = []  # (tier, up, reason)
        self.draining = False
        self._worker = worker
        self._clock = clock
        self._now = clock()  # of the event being handled
        self._recorder = recorder
        self._streams: dict[str, Stream] = {}
        self._loop = asyncio.get_running_loop()
        self._bell = Bell(self._loop)
        self.dead: asyncio.Future[BaseException] = self._loop.create_future()
        self._idle = asyncio.Event()
        self._idle.set()
        self._quiet = asyncio.Event()  # idle, and nothing is on its way between tiers
        self._quiet.set()
        self._kv_peak_blocks = 0
        self._accounts = StepAccounts(core.scheduler)
        self.block_bytes = store.block_bytes(DEVICE) if store else 0
        self._tiers: TiersBelow | None = None
        worker.start(self._report)
        if store is not None:
            self._tiers = TiersBelow(store, self._feed_if_alive, self.on_copy, self.on_tier)

    # --- for clients ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Takes a request. Raises QueueFull, Refused (it can never run here, or the server drains) or EngineDead."""
        if self.failure is not None:
            raise EngineDead("the engine has died; the server is shutting down") from self.failure
        if self.draining:
            raise Refused("The server is shutting down.", code="shutting_down")
        stream = self._streams[request.id] = Stream(request, self.cancel, self._bell)
        rejection = next((i for i in self._feed(Arrived(request)) if isinstance(i, Reject)), None)
        if rejection is not None:
            del self._streams[request.id]
            kind = QueueFull if rejection.code == "queue_full" else Refused
            raise kind(rejection.message, code=rejection.code, param=rejection.param)
        return stream

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its blocks at once. False when there is none of that id."""
        if request_id not in self.core.sequences or self.failure is not None:
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
        left = list(self.core.sequences)
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
        """Ends the worker once its steps are done. The engine takes nothing after this, and tells nobody:

        `drain` first. A ThreadWorker is waited for: call this on a thread other than the loop's then.
        """
        self.draining = True
        self._worker.stop()

    def preempt(self, request_id: str) -> bool:
        """Makes a request give up its place now; it comes back in its turn. False when none of it is running."""
        sequences = self.core.sequences.get(request_id, ()) if self.failure is None else ()
        if not any(sequence.state is State.RUNNING for sequence in sequences):
            return False
        self._feed(Preempted(request_id))
        return True

    def reprioritise(self, request_id: str, priority: int, service: ServiceClass) -> bool:
        """Makes a request as urgent as this. False when there is none of that id."""
        if request_id not in self.core.sequences or self.failure is not None:
            return False
        self._feed(Reprioritised(request_id, priority, service))
        return True

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
        scheduler = self.core.scheduler
        return scheduler.pool.cached if tier == DEVICE else len(scheduler.residency.shelves.named(tier))

    # --- for operators --------------------------------------------------------------------------------------------

    @property
    def failure(self) -> BaseException | None:
        return self.dead.result() if self.dead.done() else None

    def state(self) -> dict[str, object]:
        return {
            "exact": self.exact,
            "alive": self.failure is None,
            "draining": self.draining,
            **core_state(self.core, self._kv_peak_blocks, self.block_bytes),
        }

    def requests(self) -> list[dict[str, object]]:
        """One entry a request; a request's state is that of its choice that is furthest on."""
        return [summary(sequences) for sequences in self.core.sequences.values()]

    # --- events in, instructions out ------------------------------------------------------------------------------

    def _feed(self, event: Event) -> list[Instruction]:
        now = self._now = self._clock()
        try:
            instructions = self._handle(event, now)
            for instruction in instructions:
                self._carry_out(instruction)
            self._note_idleness()
        except Exception as error:  # a bug of ours: nothing after it can be trusted, so the engine ends
            self._die(error)
            raise
        return instructions

    def _feed_if_alive(self, event: Event) -> bool:
        """Of the tiers' news: False when nobody is left to hear them."""
        if self.failure is not None:
            return False
        self._feed(event)
        return True

    def _handle(self, event: Event, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        try:
            instructions = self.core.handle(event, now)
        finally:  # the event that the core fails at is the one that a replay must have
            if self._recorder is not None:
                self._recorder.record(now, event, instructions)
        return instructions

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Run(plan):
                self._worker.submit(plan)
            case Emit(request_id, delta):
                self._streams[request_id].feed(delta)
            case Report(finished):
                self._settle(finished)
            case Account():
                self._account(instruction)
            case Reject():
                pass  # submit() raises it
            case Decided(request_id, choice, decision):
                self.timelines.note(request_id, choice, decision, self._now)
            case Resumed():
                for observe in self.on_resumed:
                    observe(instruction)
            case PolicyFailed():
                for observe_failure in self.on_policy_failed:
                    observe_failure(instruction)
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

    def _account(self, account: Account) -> None:
        self._kv_peak_blocks = max(self._kv_peak_blocks, self.core.scheduler.pool.held)
        if self.on_step:
            record = self._accounts.record(account)
            for observe in self.on_step:
                observe(record)

    def _note_idleness(self) -> None:
        idle = self.core.idle
        quiet = idle and self.core.scheduler.residency.quiet
        assert not quiet or self.core.scheduler.pool.held == 0, "blocks leaked"
        for event, happened in ((self._idle, idle), (self._quiet, quiet)):
            if happened:
                event.set()
            else:
                event.clear()

    # --- the worker's side ----------------------------------------------------------------------------------------

    def _report(self, result: StepResult | BaseException) -> None:
        """Called on the worker's thread, once a step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: a last step outlived whom it was for
            self._loop.call_soon_threadsafe(self._reported, result)

    def _reported(self, result: StepResult | BaseException) -> None:
        if isinstance(result, BaseException):
            self._die(result)
        elif self.failure is None:
            if self._tiers is not None:
                self._tiers.step_ended(result.step)
            self._feed(StepDone(result))

    def _die(self, failure: BaseException) -> None:
        if self.failure is None:
            self.dead.set_result(failure)
            for stream in self._streams.values():
                stream.fail(failure)
