"""The same fleet on virtual time: a heap of events around engine/fleet.py, with runners and tiers that only take time.

Every decision is the fleet's, of the same code that serves; what takes time takes it by a profile (profile.py,
step_time.py, simulated_lanes.py). No sleeps, no threads, no clock: the same workload gives the same event log, byte
for byte, of which `Outcome.digest` is the SHA-256.

Not simulated: bytes, text, HTTP, copies that fail, clients that leave.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from heapq import heappop, heappush
from itertools import pairwise
from typing import Protocol

from engine.counts import Counts
from engine.events import (
    Account,
    Arrived,
    Decided,
    Emit,
    Event,
    Instruction,
    MigrationOver,
    PolicyFailed,
    Reject,
    Report,
    Resumed,
    Run,
    StepDone,
    Timer,
)
from engine.fleet import Fleet, FleetConfig, Told
from engine.plan import Plan, StepResult
from engine.policy_set import Catalog
from engine.profile import Profile
from engine.records import Failing
from engine.request import Finished, Request
from engine.simulated_device import Device
from engine.simulated_lanes import SimulatedLanes
from engine.step_time import Shape, shape
from kvstore.copies import DISK, Copy, CopyDone, Drop, TierUp

VOCABULARY_SIZE = 2**16
"""Token ids of simulated prompts and answers are below it."""

EOS = VOCABULARY_SIZE
VOCABULARY = (b"",) * (VOCABULARY_SIZE + 1)

Recorder = Callable[[float, Event, list[Told]], None]


class Stuck(Exception):
    """Requests are unfinished, and nothing is left to happen: a bug of the core, or of this loop."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request and what becomes of it. Its `sampling.seed` is its number: by it a runner knows whom it serves.

    It ends at `output_tokens`: by max_tokens where the client knows (`stopping.ignore_eos`), else because the model
    says so, which nobody knows before.
    """

    request: Request
    output_tokens: int
    answer: Sequence[int] = ()  # the tokens it draws, where these matter to those that follow

    @property
    def number(self) -> int:
        return self.request.sampling.seed


class Workload(Protocol):
    """Jobs by number. `job` is called when one arrives, so that a long trace's prompts need not all be in memory."""

    def openings(self) -> Iterable[tuple[float, int]]:
        """(arrival in seconds, number) of those that wait for nobody, by arrival."""

    def job(self, number: int) -> Job: ...

    def followers(self, number: int) -> Iterable[tuple[float, int]]:
        """(seconds after its end, number) of those that wait for this one."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request's accounts. Times are virtual seconds; None: never came."""

    number: int
    arrived: float
    prompt_tokens: int
    output_tokens: int
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    longest_gap: float = 0.0  # between two tokens
    cached_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    queued_seconds: float = 0.0
    refused: str = ""  # the API's code; such a request is attempted, and fails


@dataclass(frozen=True, slots=True)
class Tick:
    """The state just before the first event at or after `time`."""

    time: float
    running: int
    waiting: int
    kv_used_blocks: int
    loads: tuple[float, ...] = ()  # backlog seconds, by replica; where there are several


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step, and the state it left its replica in."""

    end: float
    seconds: float
    shape: Shape
    running: int
    waiting: int
    kv_used_blocks: int


@dataclass(slots=True)
class Outcome:
    served: list[Served] = field(default_factory=list)  # in the order in which they ended
    ticks: list[Tick] = field(default_factory=list)
    steps: int = 0
    busy_seconds: float = 0.0  # of all devices
    busy_by_replica: list[float] = field(default_factory=list)
    migrations: list[MigrationOver] = field(default_factory=list)
    stayed: int = 0  # see Fleet
    forecast_errors: list[float] = field(default_factory=list)  # mean, relative; by replica
    computed_tokens: int = 0  # positions
    recomputed_tokens: int = 0
    sampled_tokens: int = 0
    seconds: float = 0.0  # virtual, from 0 to the last event
    unfinished: int = 0  # when time was up
    counts: Counts = field(default_factory=Counts)
    policy_failures: dict[tuple[str, str], Failing] = field(default_factory=dict)  # by family and policy
    returns: list[Resumed] = field(default_factory=list)  # ways back, predicted and actual
    copied_bytes: dict[str, int] = field(default_factory=dict)  # by route
    digest: str = ""


class SimulatedRunner:
    """Plans to tokens, without a model: who is in a slot is known by the seed it was placed with."""

    def __init__(self, replicas: int, max_sequences: int) -> None:
        self._jobs: dict[int, Job] = {}
        self._outputs: dict[int, list[int]] = {}
        # (prompt's length, output), by replica and slot
        self._slots: list[list[tuple[int, list[int]]]] = [[(0, [])] * max_sequences for _ in range(replicas)]

    def add(self, job: Job) -> None:
        self._jobs[job.number] = job
        self._outputs[job.number] = _output(job)

    def job(self, number: int) -> Job:
        return self._jobs[number]

    def remove(self, number: int) -> None:
        del self._jobs[number], self._outputs[number]

    def draw(self, replica: int, plan: Plan) -> tuple[int, ...]:
        slots = self._slots[replica]
        for placement in plan.placements:
            number = placement.sampling.seed
            slots[placement.slot] = len(self._jobs[number].request.prompt), self._outputs[number]
        tokens = []
        for row in plan.rows:
            if row.samples:
                prompt_tokens, output = slots[row.slot]
                index = row.start + len(row.tokens) - prompt_tokens
                tokens.append(output[index] if index < len(output) else EOS)
        return tuple(tokens)


def _output(job: Job) -> list[int]:
    """All that it draws: its answer as far as that goes, made-up tokens, and the end."""
    known = list(job.answer[: job.output_tokens - 1])
    first = job.number * 40503
    made_up = [(first + index) % VOCABULARY_SIZE for index in range(len(known), job.output_tokens - 1)]
    return [*known, *made_up, EOS]


class Simulation:
    """One run of a workload. `tick_seconds`: how often the state is noted; `until`: when time is up.

    `slowdown`: of the tiers below the device, by the time (simulated_lanes.py).

    `recorder` is told every event with its instructions, as a live engine's is; `on_step` every finished step.
    """

    def __init__(
        self,
        config: FleetConfig,
        profile: Profile,
        workload: Workload,
        *,
        catalog: Catalog | None = None,
        tick_seconds: float = 1.0,
        until: float = float("inf"),
        recorder: Recorder | None = None,
        on_step: Callable[[Step], None] | None = None,
        on_tick: Callable[[Tick, int], None] | None = None,
        slowdown: Callable[[float], float] | None = None,
    ) -> None:
        """`catalog`: of policies; None: ours alone. `on_tick` is told the state and how many requests have ended."""
        first = config.replicas[0].core
        assert EOS in first.eos_token_ids
        self.fleet = Fleet(config, VOCABULARY, catalog)
        self.outcome = Outcome(busy_by_replica=[0.0] * len(config.replicas))
        self._profile = profile
        self._step_seconds = profile.step.timer()
        self._workload = workload
        self._runner = SimulatedRunner(len(config.replicas), first.scheduler.max_sequences)
        self._lanes = SimulatedLanes(profile, len(config.replicas), slowdown)
        self._tick_seconds = tick_seconds
        self._until = until
        self._recorder = recorder
        self._on_step = on_step
        self._on_tick = on_tick
        self._heap: list[tuple[float, int, int | Event]] = []  # a number: that request arrives
        self._serial = 0
        self._now = 0.0
        self._devices = [Device() for _ in config.replicas]
        self._log = sha256()

    def run(self) -> Outcome:
        """Plays the workload to its end, or until time is up. Raises Stuck."""
        if self.fleet.common.below.config.disk_blocks:
            self._push(0.0, TierUp(DISK, ()))
        if not self.fleet.alone:
            self._push(0.0, Timer())
        for at, number in self._workload.openings():
            self._push(at, number)
        next_tick = self._tick_seconds
        while self._heap and self._heap[0][0] <= self._until:
            now, _, event = heappop(self._heap)
            if isinstance(event, Timer) and not self._heap and self.fleet.idle:
                break  # nothing is left to happen: the run ended before
            while next_tick <= now:
                self._tick(next_tick)
                next_tick += self._tick_seconds
            self._now = now
            if isinstance(event, int):
                self._arrive(event)
            else:
                self._happen(event)
        return self._finish()

    def _push(self, at: float, event: int | Event) -> None:
        self._serial += 1
        heappush(self._heap, (at, self._serial, event))

    def _arrive(self, number: int) -> None:
        job = self._workload.job(number)
        assert job.number == number
        assert job.request.stopping.max_tokens >= job.output_tokens
        self._runner.add(job)
        self._feed(Arrived(job.request), f"arrived {number}")

    def _happen(self, event: Event) -> None:
        match event:
            case StepDone(result):
                self._step_ended(event, result)
            case CopyDone(id=copy):
                self._feed(event, f"copied {copy}")
            case Timer():
                self._feed(event, "timer")
                if self._heap:  # else nothing is left to happen
                    self._push(self._now + self.fleet.config.balance.period_seconds, event)
            case _:
                self._feed(event, type(event).__name__)

    def _step_ended(self, event: StepDone, result: StepResult) -> None:
        replica = event.replica
        device = self._devices[replica]
        done = device.under_way.popleft()
        device.last_step_done, device.ended, device.ended_at = result.step, done, self._now
        self.outcome.steps += 1
        self.outcome.busy_seconds += result.seconds
        self.outcome.busy_by_replica[replica] += result.seconds
        ready = [copy for copy in device.held_copies if copy.after <= result.step]
        device.held_copies = [copy for copy in device.held_copies if copy.after > result.step]
        for copy in ready:
            self._copy(copy)
        self._feed(event, f"step {replica}:{result.step} {len(result.tokens)}")
        if self._on_step:
            scheduler = self.fleet.cores[replica].scheduler
            state = (len(scheduler.running), scheduler.waiting, scheduler.pool.held)
            self._on_step(Step(self._now, result.seconds, done, *state))

    # --- events in, instructions out ------------------------------------------------------------------------------

    def _feed(self, event: Event, name: str) -> None:
        told = self.fleet.handle(event, self._now)
        if self._recorder:
            self._recorder(self._now, event, told)
        for replica, _ in told:
            self._devices[replica].begin_count()
        for replica, instructions in told:
            self._devices[replica].count(instructions)
        # News for clients are not looked at: tokens follow from the step that drew them, and texts are empty.
        notes = [
            note
            for replica, instructions in told
            for each in instructions
            if type(each) is not Emit and (note := self._carry_out(each, replica))
        ]
        self._log.update(f"{self._now!r} {name} {' '.join(notes)}\n".encode())

    def _carry_out(self, instruction: Instruction, replica: int) -> str:
        """Does it, and says what it was, for the log."""
        match instruction:
            case Run(plan):
                return self._run(plan, replica)
            case Account():
                self.outcome.computed_tokens += instruction.prefill_tokens + instruction.decode_tokens
                self.outcome.recomputed_tokens += instruction.recomputed_tokens
                self.outcome.sampled_tokens += instruction.sampled_tokens
                return ""
            case Report(finished):
                self._ended(_served(finished))
                return f"finished {finished.request}"
            case Reject():
                self._refused(instruction)
                return f"refused {instruction.request_id} {instruction.code}"
            case Copy():
                device = self._devices[instruction.replica]
                if instruction.after > device.last_step_done:
                    device.held_copies.append(instruction)
                else:
                    self._copy(instruction)
                return f"copy {instruction.id} {instruction.source}>{instruction.target} {len(instruction.sources)}"
            case Drop():
                return f"drop {instruction.tier} {len(instruction.keys)}"
            case Decided(request_id, choice, decision):
                return f"{decision.kind} {request_id}/{choice} {decision.chosen}"
            case Resumed():
                self.outcome.returns.append(instruction)
                return f"resumed {instruction.request_id}"
            case MigrationOver():
                self.outcome.migrations.append(instruction)
                return f"migrated {instruction.request_id} {instruction.source}>{instruction.target}"
            case PolicyFailed():
                plugin = instruction.family, instruction.name
                self.outcome.policy_failures.setdefault(plugin, Failing(instruction.what)).times += 1
                return f"failed {instruction.name} {instruction.what}"
            case _:
                raise AssertionError(f"the simulator does not know {type(instruction).__name__}")

    def _run(self, plan: Plan, replica: int) -> str:
        step, device = shape(plan), self._devices[replica]
        seconds = self._step_seconds(step)
        pause = device.pause(self._now, len(plan.placements), self._profile)
        end = device.free = max(self._now + pause, device.free) + seconds
        device.under_way.append(step)
        tokens = self._runner.draw(replica, plan)
        result = StepResult(plan.step, tokens, (None,) * len(tokens), seconds, 0.0)
        self._push(end, StepDone(result, replica))
        return f"run {replica}:{plan.step} {step.rows} {step.tokens} {seconds!r}"

    def _copy(self, copy: Copy) -> None:
        self._push(*self._lanes.submit(copy, self._now))

    def _refused(self, reject: Reject) -> None:
        job = self._runner.job(int(reject.request_id))
        prompt_tokens = len(job.request.prompt)
        self._ended(Served(job.number, self._now, prompt_tokens, 0, refused=reject.code))

    def _ended(self, served: Served) -> None:
        self.outcome.served.append(served)
        self._runner.remove(served.number)
        for think_seconds, number in self._workload.followers(served.number):
            self._push(self._now + think_seconds, number)

    def _tick(self, at: float) -> None:
        schedulers = [core.scheduler for core in self.fleet.cores]
        running, held = (
            sum(counts)
            for counts in zip(*((len(each.running), each.pool.held) for each in schedulers), strict=True)
        )
        loads = () if self.fleet.alone else tuple(member.backlog_seconds for member in self.fleet.members)
        tick = Tick(at, running, self.fleet.waiting, held, loads)
        self.outcome.ticks.append(tick)
        if self._on_tick:
            self._on_tick(tick, len(self.outcome.served))

    def _finish(self) -> Outcome:
        outcome = self.outcome
        if not self._heap:
            self.fleet.check()
            if not self.fleet.idle:
                unfinished = len(self.fleet.requests)
                raise Stuck(f"{unfinished} requests are unfinished, and nothing is left to happen")
        outcome.unfinished = len(self.fleet.requests)
        outcome.seconds = self._now
        for core in self.fleet.cores:
            outcome.counts.add(core.scheduler.counts)
        outcome.stayed = self.fleet.stayed
        outcome.forecast_errors = [member.errors.mean_relative_error for member in self.fleet.members]
        outcome.copied_bytes = dict(self._lanes.copied_bytes)
        outcome.digest = self._log.hexdigest()
        return outcome


def _served(finished: Finished) -> Served:
    times = finished.token_times
    return Served(
        number=int(finished.request),
        arrived=finished.arrived,
        prompt_tokens=finished.prompt_tokens,
        output_tokens=finished.output_tokens,
        admitted=finished.admitted,
        first_token=finished.first_token,
        finished=finished.finished,
        longest_gap=max((b - a for a, b in pairwise(times)), default=0.0),
        cached_tokens=finished.cached_tokens,
        preemptions=finished.preemptions,
        recomputed_tokens=finished.recomputed_tokens,
        queued_seconds=finished.queued_seconds,
    )
