"""Steps as they are in a live engine: what they take there, and what passes between an end and the next launch.

So many clients at once ask for answers of all lengths to prompts of all lengths, again and again. A step takes longer
there than alone: readers are told what the last one drew while it computes, and it finds other data in the caches.
"""

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from app.loop import run_to_end
from app.profiling.fitting import Gap, Sample
from app.serving import Parts
from app.workload.drawing import Drawing
from engine.engine import Engine
from engine.events import Arrived, Event, Report, Run, StepDone
from engine.fleet import Told
from engine.plan import Launched, Plan, Runner, Sampling, StepResult
from engine.request import Request, Stopping
from engine.step_time import shape
from kvstore.copies import DEVICE, Copy

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
SECONDS = 4.0
"""In which each number of clients go on asking."""

THINK_SECONDS = 0.005
"""Between an answer and the next question, on average: so that requests come at any moment of a step."""

MOST_PROMPT, MOST_ANSWER = 1024, 256
PAUSE_SECONDS = 0.02
"""What passes between two steps and takes longer is no part of serving: the garbage collector, or the machine."""

STORE_STOP_SECONDS = 10.0

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Seen:
    steps: list[Sample] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)  # seconds from an arrival to the launch that it led to

    @property
    def idle_seconds(self) -> float:
        return fmean(self.idle) if self.idle else 0.0


@dataclass(frozen=True, slots=True)
class Ran:
    plan: Plan
    begun: float
    ended: float


class WatchedRunner:
    """A runner whose launches are noted."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.ran: list[Ran] = []

    @property
    def exact(self) -> bool:
        return self._runner.exact

    def launch(self, plan: Plan) -> Launched:
        begun = time.perf_counter()
        return _Watched(self._runner.launch(plan), plan, begun, self.ran)


@dataclass(frozen=True, slots=True)
class _Watched:
    launched: Launched
    plan: Plan
    begun: float
    ran: list[Ran]

    def collect(self) -> StepResult:
        result = self.launched.collect()
        self.ran.append(Ran(self.plan, self.begun, time.perf_counter()))
        return result


class Watch:
    """Of the first replica: its launches, and a recorder of what the core said in between."""

    def __init__(self, runner: WatchedRunner) -> None:
        self._runner = runner
        # by step: choices it ended, the step told then, copies and blocks of copies begun then
        self._after: dict[int, tuple[int, int | None, int, int]] = {}
        self._from_idle: dict[int, float] = {}  # when the request came that led to this step

    def record(self, now: float, event: Event, told: list[Told]) -> None:
        for replica, instructions in told:
            if replica != 0:
                continue
            run = next((each.plan.step for each in instructions if isinstance(each, Run)), None)
            if isinstance(event, StepDone) and event.replica == 0:
                finished = sum(isinstance(each, Report) for each in instructions)
                copies = [i for i in instructions if isinstance(i, Copy) and DEVICE in (i.source, i.target)]
                blocks = sum(len(copy.sources) for copy in copies)
                self._after[event.result.step] = finished, run, len(copies), blocks
            elif isinstance(event, Arrived) and run is not None:
                self._from_idle[run] = now

    def take(self, seen: Seen, block_bytes: int) -> None:
        """Adds what was noted since. Call it while the engine is idle."""
        launches = {each.plan.step: each for each in self._runner.ran}
        shapes = {step: shape(each.plan) for step, each in launches.items()}
        for step, each in launches.items():
            kind = "live prefill" if shapes[step].prefill_rows else "live decode"
            seen.steps.append(Sample(kind, shapes[step], each.ended - each.begun))
            if step in self._from_idle:
                seen.idle.append(each.begun - self._from_idle[step])
        for step, (finished, following, copies, blocks) in self._after.items():
            if following is not None:
                after = launches[following]
                gap = after.begun - launches[step].ended
                if gap < PAUSE_SECONDS:
                    placed, size = len(after.plan.placements), blocks * block_bytes
                    seen.gaps.append(Gap(shapes[step], finished, placed, gap, copies, size))
        for noted in (self._runner.ran, self._after, self._from_idle):
            noted.clear()


def watched(parts: Parts, note: Note) -> Seen:
    """A live engine serves such clients. On the main thread. The parts are used up: their store is closed."""
    runner = parts.worker.runner = WatchedRunner(parts.worker.runner)
    seen = parts.worker.run_beside(lambda: run_to_end(_serve(parts, Watch(runner), note)))
    if parts.store:
        parts.store.stop(STORE_STOP_SECONDS)
    return seen


async def _serve(parts: Parts, watch: Watch, note: Note) -> Seen:
    engine = Engine(
        parts.fleet,
        parts.workers,
        exact=parts.exact,
        store=parts.store,
        clock=time.perf_counter,
        recorder=watch,
    )
    seen = Seen()
    clients = Clients(engine, parts.model.token_ids)
    await clients.ask(CLIENTS[0], SECONDS / 4)
    watch.take(Seen(), engine.block_bytes)  # the first ones only warm up
    for count in CLIENTS:
        if count > parts.core.config.scheduler.max_sequences:
            break
        gc.collect()
        gc.freeze()  # as a server's: what has been noted so far is not looked through again
        note(f"a live engine: {count} clients")
        await clients.ask(count, SECONDS)
        watch.take(seen, engine.block_bytes)
    gc.unfreeze()
    return seen


class Clients:
    """Prompts and answers are of lengths even on a logarithmic scale; no prompt begins like another."""

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._random = Drawing(0).random("clients")
        self._asked = 0
        context = engine.core.config.context
        self._most_answer = max(1, min(MOST_ANSWER, context // 4))
        self._most_prompt = max(1, min(MOST_PROMPT, context // 2))

    async def ask(self, clients: int, seconds: float) -> None:
        """So many at once; each asks until the time is over, and at least once."""
        until = time.perf_counter() + seconds
        await asyncio.gather(*(self._client(until) for _ in range(clients)))

    async def _client(self, until: float) -> None:
        while True:
            await asyncio.sleep(self._random.expovariate(1 / THINK_SECONDS))
            async for _ in self._engine.submit(self._request()):
                pass
            if time.perf_counter() > until:
                return

    def _request(self) -> Request:
        self._asked += 1
        prompt = tuple(
            self._random.randrange(self._vocabulary) for _ in range(self._length(self._most_prompt))
        )
        stopping = Stopping(self._length(self._most_answer), ignore_eos=True)
        return Request(f"profile {self._asked}", prompt, Sampling(seed=self._asked), stopping)

    def _length(self, most: int) -> int:
        return int(most ** float(self._random.random()))
