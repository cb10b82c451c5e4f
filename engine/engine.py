"""The shell around the core: feeds it events, carries its instructions out. Lives on the event-loop thread.

It decides nothing: what to compute is scheduler.py's, how is the runner's, on which thread is worker.py's, and how
bytes are moved is the store's (kvstore/store.py).
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
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
from engine.policy_set import FAMILIES
from engine.records import CopyRecord
from engine.request import EngineDead, Finished, QueueFull, Refused, Request, ServiceClass
from engine.sequence import Sequence, State
from engine.stream import Stream
from engine.timeline import Timelines
from engine.worker import Worker
from kvstore.copies import DEVICE, Copy, CopyDone, Drop, TierDown, TierUp

RECORDS_AT_ONCE = 1000
"""Of a tier that comes up, in one event: a few milliseconds (`python -m bench.tier_up`)."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A finished step and the state it left, for observers. Counts are since the previous record."""

    step: int
    rows: int
    prefill_tokens: int
    decode_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    sampled_tokens: int
    prompt_tokens: int  # of requests first admitted
    preemptions: int
    preemptions_by: Mapping[str, int]  # by the victim policy, or "displaced", "operator"
    promotions: Mapping[str, int]  # by reason
    resumptions: Mapping[tuple[str, str], int]  # by way, and the lowest tier that they took from
    prefix_queries: int  # tokens looked up in all tiers
    prefix_hits: int  # tokens found there
    hit_tokens: Mapping[str, int]  # by tier, at every admission
    dropped_blocks: int  # not saved below the device: no room, or too much on its way
    running: int
    waiting: int
    kv_used_blocks: int
    kv_blocks: int
    seconds: float
    gil_seconds: float


class Recorder(Protocol):
    def record(self, now: float, event: Event, instructions: list[Instruction]) -> None: ...


class Store(Protocol):
    """What the engine needs of the tiers (kvstore/store.py has the real one).

    `report` may be called on any thread. `submit` and `drop` never block.
    """

    def start(self, report: Callable[[CopyDone | TierDown | TierUp], None]) -> None: ...

    def submit(self, copy: Copy) -> None: ...

    def drop(self, drop: Drop) -> None: ...

    def block_bytes(self, tier: str) -> int: ...


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
        self._store = store
        self._copies: dict[int, Copy] = {}  # told, and not done
        self._held_copies: list[Copy] = []  # these wait for a step to end
        self._loading: dict[str, Iterator[TierUp]] = {}  # what tiers hold, as far as not fed yet
        self._clock = clock
        self._now = clock()  # of the event being handled
        self._recorder = recorder
        self._streams: dict[str, Stream] = {}
        self._loop = asyncio.get_running_loop()
        self.dead: asyncio.Future[BaseException] = self._loop.create_future()
        self._idle = asyncio.Event()
        self._idle.set()
        self._quiet = asyncio.Event()  # idle, and nothing is on its way between tiers
        self._quiet.set()
        self._kv_peak_blocks = 0
        self._counted = core.scheduler.counts.copy()  # as told to observers so far
        self._counted_drops = 0
        self._last_step_done = 0
        worker.start(self._report)
        if store is not None:
            store.start(self._report_copy)

    # --- for clients ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Takes a request. Raises QueueFull, Refused (it can never run here, or the server drains) or EngineDead."""
        if self.failure is not None:
            raise EngineDead("the engine has died; the server is shutting down") from self.failure
        if self.draining:
            raise Refused("The server is shutting down.", code="shutting_down")
        stream = self._streams[request.id] = Stream(request, self.cancel)
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
        scheduler = self.core.scheduler
        return {
            "exact": self.exact,
            "alive": self.failure is None,
            "draining": self.draining,
            "context": self.core.config.context,
            "block_size": scheduler.config.block_size,
            "kv_blocks": scheduler.pool.blocks,
            "kv_used_blocks": scheduler.pool.held,
            "kv_peak_blocks": self._kv_peak_blocks,  # held after any step so far: demand, where there was no pressure
            "kv_cached_blocks": scheduler.pool.cached,
            "running": len(scheduler.running),
            "waiting": scheduler.waiting,
            "preemptions": scheduler.counts.preemptions,
            "tiers": self._tiers(),
            "copies": len(scheduler.residency.flights),
            "policies": self.policies(),
        }

    def policies(self) -> dict[str, str]:
        """The names in force, by family."""
        scheduler = self.core.scheduler
        return {family: getattr(scheduler.policy_config, family) for family in FAMILIES}

    def _tiers(self) -> dict[str, object]:
        residency = self.core.scheduler.residency
        return {
            shelf.name: {
                "up": shelf.up,
                "blocks": len(shelf),
                "capacity_blocks": shelf.capacity,
                "pinned_blocks": shelf.pinned,
                "block_bytes": self._store.block_bytes(DEVICE) if self._store else 0,
            }
            for shelf in (residency.host, residency.disk)
        }

    def tier_bytes(self) -> dict[str, tuple[bool, int, int]]:
        """By tier: whether it is in use, the bytes it may hold, and those it holds."""
        if self._store is None:
            return {}
        pool, residency = self.core.scheduler.pool, self.core.scheduler.residency
        size = self._store.block_bytes(DEVICE)
        below = {
            shelf.name: (shelf.up, shelf.capacity * size, len(shelf) * size)
            for shelf in (residency.host, residency.disk)
        }
        return {DEVICE: (True, pool.blocks * size, (pool.held + pool.idle) * size), **below}

    def requests(self) -> list[dict[str, object]]:
        """One entry a request; a request's state is that of its choice that is furthest on."""
        return [_summary(sequences) for sequences in self.core.sequences.values()]

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
                self._start_copy(instruction)
            case Drop():
                self._tiers_below.drop(instruction)

    @property
    def _tiers_below(self) -> Store:
        assert self._store is not None, "the core has tiers that the engine has not"
        return self._store

    def _start_copy(self, copy: Copy) -> None:
        self._copies[copy.id] = copy
        if copy.after > self._last_step_done:
            self._held_copies.append(copy)
        else:
            self._tiers_below.submit(copy)

    def _step_ended(self, step: int) -> None:
        """Copies that waited for the step may begin."""
        self._last_step_done = step
        ready = [copy for copy in self._held_copies if copy.after <= step]
        self._held_copies = [copy for copy in self._held_copies if copy.after > step]
        for copy in ready:
            self._tiers_below.submit(copy)

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
            record = self._record(account)
            for observe in self.on_step:
                observe(record)

    def _record(self, account: Account) -> StepRecord:
        scheduler, before = self.core.scheduler, self._counted
        now, dropped = scheduler.counts, scheduler.residency.dropped_blocks
        self._counted = now.copy()
        dropped_since, self._counted_drops = dropped - self._counted_drops, dropped
        return StepRecord(
            step=account.step,
            rows=account.rows,
            prefill_tokens=account.prefill_tokens,
            decode_tokens=account.decode_tokens,
            computed_tokens=account.prefill_tokens + account.decode_tokens,
            recomputed_tokens=account.recomputed_tokens,
            sampled_tokens=account.sampled_tokens,
            prompt_tokens=now.prompt_tokens - before.prompt_tokens,
            preemptions=now.preemptions - before.preemptions,
            preemptions_by=now.preemptions_by - before.preemptions_by,
            promotions=now.promotions - before.promotions,
            resumptions=now.resumptions - before.resumptions,
            prefix_queries=now.prefix_queries - before.prefix_queries,
            prefix_hits=now.prefix_hits - before.prefix_hits,
            hit_tokens=now.hit_tokens - before.hit_tokens,
            dropped_blocks=dropped_since,
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            kv_used_blocks=scheduler.pool.held,
            kv_blocks=scheduler.pool.blocks,
            seconds=account.seconds,
            gil_seconds=account.gil_seconds,
        )

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
            self._step_ended(result.step)
            self._feed(StepDone(result))

    def _report_copy(self, event: CopyDone | TierDown | TierUp) -> None:
        """Called on the store's threads."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._reported_copy, event)

    def _reported_copy(self, event: CopyDone | TierDown | TierUp) -> None:
        if self.failure is not None:
            return
        if isinstance(event, TierUp):
            self._loading[event.tier] = parts = event.parts(RECORDS_AT_ONCE)
            self._load(parts, len(event.records))
            return
        self._feed(event)
        match event:
            case CopyDone():
                record = CopyRecord.of(
                    self._copies.pop(event.id), event, self._tiers_below.block_bytes(DEVICE)
                )
                for observe_copy in self.on_copy:
                    observe_copy(record)
            case TierDown(tier, reason):
                self._loading.pop(tier, None)
                self._tell_tier(tier, False, reason)

    def _load(self, parts: Iterator[TierUp], records: int) -> None:
        """Feeds one part, and the next in the loop's next turn, so that others come between; none if it went down."""
        part = next(parts)
        if self.failure is not None or self._loading.get(part.tier) is not parts:
            return
        self._feed(part)
        if part.more:
            gc.freeze()  # else the collector looks through all of a million entries again and again, 0.3 s each time
            self._loop.call_soon(self._load, parts, records)
        else:
            self._tell_tier(part.tier, True, f"{records} records")

    def _tell_tier(self, tier: str, up: bool, reason: str) -> None:
        for observe in self.on_tier:
            observe(tier, up, reason)

    def _die(self, failure: BaseException) -> None:
        if self.failure is None:
            self.dead.set_result(failure)
            for stream in self._streams.values():
                stream.fail(failure)


def _summary(sequences: list[Sequence]) -> dict[str, object]:
    first = sequences[0]
    states = {sequence.state.value for sequence in sequences}
    return {
        "id": first.request.id,
        "state": next(state for state in ("running", "loading", "waiting") if state in states),
        "replica": 0,
        "choices": len(sequences),
        "priority": first.request.priority,
        "class": first.class_name,
        "tenant": first.tenant,
        "arrived": first.arrived,
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": first.cached_tokens,
        "output_tokens": sum(sequence.output_tokens for sequence in sequences),
        "preemptions": sum(sequence.preemptions for sequence in sequences),
        "promotions": sum(sequence.promotions for sequence in sequences),
        "recomputed_tokens": sum(sequence.recomputed_tokens for sequence in sequences),
        "reloaded_tokens": sum(sequence.reloaded_tokens for sequence in sequences),
        "kv_blocks": sum(sequence.held_blocks for sequence in sequences),
    }
