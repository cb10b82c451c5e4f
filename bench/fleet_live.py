"""Several replicas of one model, live, in one process: routing and rebalancing compared on a recorded workload.

    python -m bench.fleet_live --trace FILE --rows FILE      # again to add a repeat
    python -m bench.fleet_live --rows FILE --report
    python -m bench.fleet_live --pauses 200                  # how long a migration stops its sequence

Each system runs in a process of its own, one after the other, on the same requests at the same rate: `--load` × what
`least_load` does when all come at once. Answers must be equal to the token in all of them, and to those of one replica.
Replicas of a small model on one CPU share its cores, so what counts is how systems compare, not how fast they are.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import mean, median, quantiles
from typing import Any

from rich.table import Table

from app.compose import load
from app.config_sources import load as load_config
from app.loop import run_to_end
from app.replica_tables import ReplicaTable
from app.serving import Parts
from bench.policies import LATE_SECONDS, Ending, Live, Outcome, Run, read, rotated, run_of, workload
from bench.report import console
from engine.engine import Engine
from engine.events import MigrationOver, Pause
from engine.fleet import Fleet
from engine.plan import Sampling
from engine.records import StepRecord
from engine.request import Finished, Request, Stopping
from engine.worker import QueueWorker, ThreadWorker

SYSTEMS: Mapping[str, tuple[str, str]] = {
    "round_robin": ("round_robin", "none"),
    "least_load": ("least_load", "none"),
    "predicted_load": ("predicted_load", "none"),
    "cache_aware": ("cache_aware", "none"),
    "session": ("session", "none"),
    "hybrid": ("hybrid", "none"),
    "hybrid, load_pairs": ("hybrid", "load_pairs"),
}
"""Routing and rebalancing."""

TICK_SECONDS = 0.25


@dataclass(slots=True)
class FleetOutcome:
    outcome: Outcome = field(default_factory=Outcome)
    busy: list[float] = field(default_factory=list)  # seconds of steps, by replica
    placed: list[int] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    looked_up: int = 0  # tokens, and of these …
    found: int = 0
    moved: int = 0
    pauses: list[float] = field(default_factory=list)  # seconds, of those that ran
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Moves:
    """Migrations that are over."""

    moved: int = 0
    pauses: list[Pause] = field(default_factory=list)  # of the live ones of these
    failures: Counter[str] = field(default_factory=Counter)  # by reason

    @property
    def over(self) -> int:
        return self.moved + self.failures.total()

    def note(self, over: MigrationOver) -> None:
        if over.failure:
            self.failures[over.failure] += 1
            return
        self.moved += 1
        if over.live:
            self.pauses.append(over.pause)


class FleetLive(Live):
    def __init__(self, parts: Parts, ending: Ending, found: FleetOutcome) -> None:
        super().__init__(parts, ending, found.outcome)
        self._found = found
        self._moves = Moves()
        self._ticking: asyncio.Task[None] | None = None

    def watch(self, engine: Engine) -> None:
        self._found.busy = [0.0] * len(engine.replicas)
        engine.on_step.append(self._more)
        engine.on_finished.append(self._ended)
        engine.on_migration.append(self._moves.note)
        self._ticking = asyncio.ensure_future(ticking(engine))

    def _more(self, record: StepRecord) -> None:
        self._found.busy[record.replica] += record.seconds
        self._found.looked_up += record.prefix_queries
        self._found.found += record.prefix_hits

    def _ended(self, finished: Finished) -> None:
        if finished.first_token is not None and finished.output_tokens > 1:
            self._found.tpot.append((finished.finished - finished.first_token) / (finished.output_tokens - 1))

    def close(self, fleet: Fleet) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        self._found.placed = [member.placed for member in fleet.members]
        self._found.moved, self._found.failures = self._moves.moved, dict(self._moves.failures)
        self._found.pauses = [pause.seconds for pause in self._moves.pauses]


async def ticking(engine: Engine) -> None:
    while True:
        await asyncio.sleep(TICK_SECONDS)
        engine.tick()


def compose(model: str, blocks: int, replicas: int, system: str) -> Parts:
    routing, rebalancing = SYSTEMS[system]
    flags = [f"policies.routing={routing}", f"policies.rebalancing={rebalancing}", "log.level=warning"]
    flags += [f"engine.kv_blocks={blocks}", "engine.max_sequences=64", "engine.max_queue=100000"]
    flags += [f"model.path={model}"] if model else []
    config = load_config(flags, {}, cwd=Path("/")).config
    return load(config.model_copy(update={"replicas": [ReplicaTable()] * replicas}))


def play(run: Run, replicas: int) -> FleetOutcome:
    """On the main thread, which the first replica gets."""
    parts = compose(run.model, run.blocks, replicas, run.system)
    end = parts.core.config.eos_token_ids[0]
    lengths: dict[int, tuple[int, int]] = {}  # one book of lengths for all
    endings = [Ending(worker.runner, end) for worker in parts.workers]
    for each in endings:
        each.lengths = lengths
    first, *others = endings
    parts = replace(parts, workers=[QueueWorker(first), *map(ThreadWorker, others)])
    found = FleetOutcome()

    async def live() -> None:
        playing = FleetLive(parts, first, found)
        await playing.play(workload(run), run.cap)
        playing.close(parts.fleet)
        for worker in parts.workers[1:]:
            await asyncio.to_thread(worker.stop)

    parts.worker.run_beside(lambda: run_to_end(live()))
    if parts.store:
        parts.store.stop(10.0)
    return found


# --- pauses -----------------------------------------------------------------------------------------------------------


def pauses(model: str, replicas: int, wanted: int, streams: int) -> int:
    """Streams that decode all the time; one of them at a time is told to go on elsewhere. Then all of them again on
    one replica. Exit code 1 when a token differs.
    """
    migrating = Migrating(replicas, wanted, streams)
    run_on(compose(model, 4096, replicas, "least_load"), migrating.play)
    unmigrated: dict[str, list[int]] = {}

    async def again(engine: Engine) -> None:
        for first in range(0, migrating.asked, streams):
            numbers = range(first, min(first + streams, migrating.asked))
            answers = await asyncio.gather(*(read(engine.submit(stream_of(number))) for number in numbers))
            unmigrated.update({f"r{number}": answer for number, answer in zip(numbers, answers, strict=True)})

    run_on(compose(model, 8192, 1, "least_load"), again)
    wrong = [name for name, answer in migrating.answers.items() if answer != unmigrated[name][: len(answer)]]
    console().print(migrating.table(), migrating.told())
    console().print(
        f"{len(migrating.answers)} streams, of which {len(wrong)} differ from those of one replica"
    )
    return int(bool(wrong))


def stream_of(number: int) -> Request:
    """Half of them greedy; with logprobs, penalties or stop strings now and then."""
    random = Random(number)
    sampling = Sampling(
        temperature=float(number % 2),
        seed=number,
        logprobs=1 if number % 3 == 0 else None,
        presence_penalty=0.2 if number % 4 == 0 else 0.0,
    )
    prompt = tuple(random.randrange(300, 4000) for _ in range(random.randrange(50, 600)))
    return Request(
        f"r{number}", prompt, sampling, Stopping(400, stop=("zq",) * (number % 5 == 0), ignore_eos=True)
    )


def run_on(parts: Parts, work: Callable[[Engine], Awaitable[None]]) -> None:
    """On the main thread, which the first replica gets; at the end nothing is held, pinned or on its way."""

    async def live() -> None:
        engine = Engine(
            parts.fleet, parts.workers, exact=parts.exact, store=parts.store, clock=time.perf_counter
        )
        await work(engine)
        await engine.quiet()
        parts.fleet.check()
        for worker in parts.workers[1:]:
            await asyncio.to_thread(worker.stop)

    parts.worker.run_beside(lambda: run_to_end(live()))
    if parts.store:
        parts.store.stop(10.0)


class Migrating:
    """So many streams at any time, until `wanted` migrations are over."""

    def __init__(self, replicas: int, wanted: int, streams: int) -> None:
        self.answers: dict[str, list[int]] = {}
        self.asked = 0
        self._replicas, self._wanted, self._streams = replicas, wanted, streams
        self._moves = Moves()
        self._steps: list[float] = []

    async def play(self, engine: Engine) -> None:
        engine.on_migration.append(self._moves.note)
        engine.on_step.append(lambda record: self._steps.append(record.seconds))
        random, reading = Random(0), set[asyncio.Task[None]]()
        while self._moves.over < self._wanted:
            while len(reading) < self._streams:
                task = asyncio.ensure_future(self._stream(engine, stream_of(self.asked)))
                self.asked += 1
                reading.add(task)
                task.add_done_callback(reading.discard)
                await asyncio.sleep(0)
            running = [
                each.request.id
                for core in engine.fleet.cores
                for each in core.scheduler.running
                if each.output_tokens > 4
            ]
            if running and not len(engine.fleet.moves):
                engine.migrate(random.choice(running))
            await asyncio.sleep(0.002)
        for request_id in engine.fleet.requests:
            engine.cancel(request_id)
        await asyncio.gather(*reading)

    async def _stream(self, engine: Engine, request: Request) -> None:
        self.answers[request.id] = await read(engine.submit(request))

    def table(self) -> Table:
        step = median(self._steps)
        pauses = self._moves.pauses
        title = f"{len(pauses)} live migrations, {self._streams} streams, {self._replicas} replicas"
        table = Table("", "p50", "p99", title=title)

        def add(name: str, figures: Sequence[float], digits: int) -> None:
            table.add_row(name, f"{median(figures):.{digits}f}", f"{_p99(figures):.{digits}f}")

        seconds = [pause.seconds for pause in pauses]
        add("pause, ms", [1e3 * each for each in seconds], 2)
        add("pause ÷ a step's median", [each / step for each in seconds], 2)
        add("of it the tail's transfer, ms", [1e3 * pause.transfer_seconds for pause in pauses], 2)
        add("pause, steps of the source", [pause.steps for pause in pauses], 0)
        add("beside the transfer", [pause.steps - pause.transfer_steps for pause in pauses], 0)
        return table

    def told(self) -> str:
        failed = ", ".join(f"{count} times: {why}" for why, count in self._moves.failures.items())
        return f"a step: {median(self._steps) * 1e3:.2f} ms (median); failed: {failed or 'none'}"


# --- all systems of one cell ------------------------------------------------------------------------------------------


def in_a_process(run: Run, replicas: int) -> FleetOutcome:
    told = json.dumps(asdict(run) | {"replicas": replicas})
    command = [sys.executable, "-m", "bench.fleet_live", "--play", told]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return FleetOutcome(**found | {"outcome": Outcome(**found["outcome"])})


def cell(base: Run, load_share: float, replicas: int, systems: Sequence[str], rows: Path) -> int:
    """One repeat of all systems. Exit code 1 when an answer differs, or the load came too late."""
    burst = in_a_process(base, replicas).outcome
    at_rate = replace(base, rate=load_share * base.requests / burst.seconds)
    alone = in_a_process(replace(at_rate, blocks=replicas * base.blocks), 1).outcome
    wrong = 0
    with rows.open("a+") as file:
        file.seek(0)
        for system in rotated(systems, sum(1 for _ in file) // len(systems)):
            found = in_a_process(replace(at_rate, system=system), replicas)
            same, void = found.outcome.answers == alone.answers, found.outcome.late > LATE_SECONDS
            wrong += not same or void
            head = {"trace": Path(base.trace).name, "replicas": replicas, "rate": at_rate.rate}
            row = head | {"system": system, "same": same, "void": void, **figures(found)}
            file.write(json.dumps(row) + "\n")
            file.flush()
            console().print(f"{system}: {row}")
    return int(wrong > 0)


def figures(found: FleetOutcome) -> dict[str, Any]:
    return {
        "ttft": mean(found.outcome.ttft),
        "ttft_p99": _p99(found.outcome.ttft),
        "tpot": mean(found.tpot),
        "tpot_p99": _p99(found.tpot),
        "hit_rate": found.found / max(1, found.looked_up),
        "imbalance": max(found.busy) / mean(found.busy),
        "placed": found.placed,
        "preemptions": found.outcome.preemptions,
        "moved": found.moved,
        "pause_p50": median(found.pauses) if found.pauses else None,
        "failures": found.failures,
    }


def report(rows: Path) -> int:
    """Exit code 1 when any answer differed. Medians over repeats; over hybrid with load_pairs in brackets."""
    found: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for text in rows.read_text().splitlines():
        row = json.loads(text)
        if not row["void"]:
            found[row["trace"], row["replicas"]][row["system"]].append(row)
    wrong = False
    for (trace, replicas), systems in found.items():
        ours = systems["hybrid, load_pairs"]
        table = Table(
            "system", "runs", "TTFT ms", "P99", "TPOT ms", "P99", "hits", "max ÷ mean", "moved",
            title=f"{trace}, {replicas} replicas; ÷ ours in brackets",
        )  # fmt: skip
        for system, those in systems.items():
            wrong |= not all(each["same"] for each in those)
            times = (
                f"{_median(those, key) * 1e3:.1f} ({_median(those, key) / _median(ours, key):.2f})"
                for key in ("ttft", "ttft_p99", "tpot", "tpot_p99")
            )
            table.add_row(
                system, str(len(those)), *times, f"{_median(those, 'hit_rate'):.1%}",
                f"{_median(those, 'imbalance'):.2f}", f"{_median(those, 'moved'):.0f}",
            )  # fmt: skip
        console().print(table)
    return int(wrong)


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    found: float = median(row[key] for row in rows)
    return found


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98] if len(values) > 1 else values[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", help="a recorded trace (docs/simulation.md has the formats)")
    parser.add_argument(
        "--model", default="", help="a model directory; the shipped one unless told otherwise"
    )
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument(
        "--answers-over", type=int, default=4, help="recorded output lengths are divided by this"
    )
    parser.add_argument("--cap", type=int, default=512, help="what clients ask for as max_tokens")
    parser.add_argument("--load", type=float, default=0.85, help="of the throughput when all come at once")
    parser.add_argument("--blocks", type=int, default=512, help="KV blocks of each replica")
    parser.add_argument("--systems", default=";".join(SYSTEMS), help="separated by semicolons")
    parser.add_argument("--rows", type=Path, help="where rows are added")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--pauses", type=int, metavar="N", help="measure so many migrations instead")
    parser.add_argument("--streams", type=int, default=12, help="that decode meanwhile")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        told = json.loads(options.play)
        replicas = told.pop("replicas")
        sys.stdout.write(json.dumps(asdict(play(Run(**told), replicas))) + "\n")
        return 0
    if options.pauses:
        return pauses(options.model, options.replicas, options.pauses, options.streams)
    if options.rows is None or not (options.report or options.trace):
        parser.error("--rows, and --trace or --report, are needed; or --pauses")
    if options.report:
        return report(options.rows)
    base = replace(run_of(options, "least_load", 0.0), blocks=options.blocks)
    return cell(base, options.load, options.replicas, options.systems.split(";"), options.rows)


if __name__ == "__main__":
    sys.exit(main())
