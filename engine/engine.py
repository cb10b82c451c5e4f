"""The shell around the core: feeds it events, carries its instructions out. Lives on the event-loop thread.

It decides nothing: what to compute is scheduler.py's, how is the runner's, on which thread is worker.py's.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from engine.core import Core
from engine.events import Account, Arrived, Cancelled, Emit, Event, Instruction, Reject, Report, Run, StepDone
from engine.plan import StepResult
from engine.request import EngineDead, Finished, QueueFull, Refused, Request
from engine.sequence import Sequence
from engine.stream import Stream
from engine.worker import Worker


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
    resumptions: int
    prefix_queries: int  # tokens looked up in the prefix cache
    prefix_hits: int  # tokens found there
    running: int
    waiting: int
    kv_used_blocks: int
    kv_blocks: int
    seconds: float
    gil_seconds: float


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
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
    ) -> None:
        self.core = core
        self.exact = exact
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.on_finished: list[Callable[[Finished], None]] = []
        self.draining = False
        self._worker = worker
        self._clock = clock
        self._recorder = recorder
        self._streams: dict[str, Stream] = {}
        self._loop = asyncio.get_running_loop()
        self.dead: asyncio.Future[BaseException] = self._loop.create_future()
        self._idle = asyncio.Event()
        self._idle.set()
        self._counted = (0,) * 5  # the scheduler's counters, as told to observers so far
        worker.start(self._report)

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

        Returns whether all of them ended by themselves.
        """
        self.draining = True
        idle: asyncio.Future[Any] = asyncio.ensure_future(self._idle.wait())
        await asyncio.wait([idle, self.dead], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        left = list(self.core.sequences)
        for request_id in left:
            self.cancel(request_id)
        return not left and self.failure is None

    def stop(self) -> None:
        """Ends the worker once its steps are done. The engine takes nothing after this, and tells nobody:

        `drain` first. A ThreadWorker is waited for: call this on a thread other than the loop's then.
        """
        self.draining = True
        self._worker.stop()

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
            "kv_cached_blocks": scheduler.pool.cached,
            "running": len(scheduler.running),
            "waiting": scheduler.waiting,
            "preemptions": scheduler.preemptions,
            "policies": {
                "order": scheduler.config.order,
                "victim": scheduler.config.victim,
                "resume": "recompute",
            },
        }

    def requests(self) -> list[dict[str, object]]:
        """One entry a request; a request's state is that of its choice that is furthest on."""
        return [_summary(sequences) for sequences in self.core.sequences.values()]

    # --- events in, instructions out ------------------------------------------------------------------------------

    def _feed(self, event: Event) -> list[Instruction]:
        now = self._clock()
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

    def _settle(self, finished: Finished) -> None:
        stream = self._streams[finished.request]
        stream.settle(finished)
        if stream.ended:  # not: unknown to the core, which is ahead of the instructions it gave
            del self._streams[finished.request]
        for observe in self.on_finished:
            observe(finished)

    def _account(self, account: Account) -> None:
        if self.on_step:
            record = self._record(account)
            for observe in self.on_step:
                observe(record)

    def _record(self, account: Account) -> StepRecord:
        scheduler = self.core.scheduler
        counters = (
            scheduler.prompt_tokens,
            scheduler.preemptions,
            scheduler.resumptions,
            scheduler.prefix_queries,
            scheduler.prefix_hits,
        )
        prompt_tokens, preemptions, resumptions, queries, hits = (
            now - before for now, before in zip(counters, self._counted, strict=True)
        )
        self._counted = counters
        return StepRecord(
            step=account.step,
            rows=account.rows,
            prefill_tokens=account.prefill_tokens,
            decode_tokens=account.decode_tokens,
            computed_tokens=account.prefill_tokens + account.decode_tokens,
            recomputed_tokens=account.recomputed_tokens,
            sampled_tokens=account.sampled_tokens,
            prompt_tokens=prompt_tokens,
            preemptions=preemptions,
            resumptions=resumptions,
            prefix_queries=queries,
            prefix_hits=hits,
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            kv_used_blocks=scheduler.pool.held,
            kv_blocks=scheduler.pool.blocks,
            seconds=account.seconds,
            gil_seconds=account.gil_seconds,
        )

    def _note_idleness(self) -> None:
        if self.core.idle:
            assert self.core.scheduler.pool.held == 0, "blocks leaked"
            self._idle.set()
        else:
            self._idle.clear()

    # --- the worker's side ----------------------------------------------------------------------------------------

    def _report(self, result: StepResult | BaseException) -> None:
        """Called on the worker's thread, once a step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: a last step outlived whom it was for
            self._loop.call_soon_threadsafe(self._reported, result)

    def _reported(self, result: StepResult | BaseException) -> None:
        if isinstance(result, BaseException):
            self._die(result)
        elif self.failure is None:
            self._feed(StepDone(result))

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
        "state": "running" if "running" in states else "waiting",
        "replica": 0,
        "choices": len(sequences),
        "priority": first.request.priority,
        "arrived": first.arrived,
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": first.cached_tokens,
        "output_tokens": sum(sequence.output_tokens for sequence in sequences),
        "preemptions": sum(sequence.preemptions for sequence in sequences),
        "kv_blocks": sum(sequence.held_blocks for sequence in sequences),
    }
