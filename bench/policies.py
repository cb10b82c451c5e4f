"""Policies compared live: the engine as the server composes it, on one recorded workload, short of KV blocks.

    python -m bench.policies --trace FILE --share 0.4 --rows FILE      # again to add rounds, or other shares
    python -m bench.policies --rows FILE --report

A system is a set of configuration keys: ours, and what others do, on the same engine. Each runs in a process of its
own, one after the other. First ours runs without pressure: all requests at once, for the rate (`--load` × its
throughput), then at that rate, for the demand (the peak of blocks held) and for the answers, which every other run must
repeat to the token. Then the systems get `--share` × that demand and play by turns, `--rounds` times each: a machine
changes its speed within minutes by more than policies differ. `--rate` and `--blocks` name a load instead.

Answers end at the recorded lengths by a token that the bench puts in the place of the one drawn, so that no policy can
know them; clients ask for `--cap` tokens. Latency is normalised: seconds from when a request was due to its end, over
its tokens. Tax: positions computed again over all positions computed.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from rich.table import Table

from app.compose import load
from app.config_sources import load as load_config
from app.loop import run_to_end
from app.serving import Parts
from app.workload import formats, transform
from app.workload.drawing import Drawing
from app.workload.prompts import Prompts
from app.workload.trace import TraceRequest
from bench.report import console
from bench.systems import SYSTEMS, named
from engine.engine import Engine
from engine.events import Resumed
from engine.plan import Launched, Plan, Runner, Sampling, StepResult
from engine.records import StepRecord
from engine.request import Finished, Request, Stopping
from engine.stream import Stream
from engine.worker import QueueWorker

FIRST_TOKEN = 10  # special tokens lie below
UNPRESSURED_BLOCKS = 8192
MAX_SEQUENCES = 64
BEGINS_AFTER = 0.1
"""Seconds from when all requests are made."""

LATE_SECONDS = 0.01
"""A run in which half of the requests were submitted later than this is void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a process of its own is told."""

    system: str
    trace: str
    model: str
    requests: int
    answers_over: int  # recorded output lengths are divided by this
    cap: int
    rate: float  # requests per second; 0: all at once
    blocks: int
    policies: Mapping[str, str] = field(default_factory=dict)  # what differs from the defaults


@dataclass(slots=True)
class Outcome:
    seconds: float = 0.0
    late: float = 0.0  # median
    normalised: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # a hash of each one's tokens
    output_tokens: int = 0
    peak_blocks: int = 0
    computed: int = 0
    recomputed: int = 0
    preemptions: int = 0
    ways: dict[str, int] = field(default_factory=dict)
    resumed: list[tuple[float, str, float, float, float | None]] = field(
        default_factory=list
    )  # when it was chosen, since the beginning; the way and tier; predicted, actual, regret

    @property
    def tax(self) -> float:
        return self.recomputed / max(1, self.computed)


# --- one run, in a process of its own ---------------------------------------------------------------------------------


class Ending:
    """A runner whose sequences end where the trace says: by the end-of-sequence token, which nobody foresees."""

    def __init__(self, runner: Runner, end: int) -> None:
        self.exact = runner.exact
        self.lengths: dict[int, tuple[int, int]] = {}  # by seed: (prompt tokens, output tokens)
        self._runner = runner
        self._end = end
        self._seeds: dict[int, int] = {}  # by slot

    def launch(self, plan: Plan) -> Launched:
        for placement in plan.placements:
            self._seeds[placement.slot] = placement.sampling.seed
        ends = []
        for row in plan.rows:
            if row.samples:
                prompt, output = self.lengths[self._seeds[row.slot]]
                ends.append(row.start + len(row.tokens) - prompt + 1 >= output)
        return Ended(self._runner.launch(plan), ends, self._end)


@dataclass(frozen=True, slots=True)
class Ended:
    launched: Launched
    ends: list[bool]
    end: int

    def collect(self) -> StepResult:
        result = self.launched.collect()
        tokens = (self.end if ends else token for token, ends in zip(result.tokens, self.ends, strict=True))
        return replace(result, tokens=tuple(tokens))


def workload(run: Run) -> list[TraceRequest]:
    """Prompts with blocks of 512 recorded tokens as 16, so that sharing stays; others a quarter as long."""
    recorded = formats.load(Path(run.trace), Drawing(0))
    chosen = transform.first(
        transform.thin(recorded, min(1.0, 4 * run.requests / len(recorded))), run.requests
    )
    outputs = {each.number: max(2, each.output_tokens // run.answers_over) for each in chosen}
    shared = any(each.blocks for each in chosen)
    small = transform.scaled(chosen, 16) if shared else transform.scaled(chosen, 128)
    whole = [replace(each, output_tokens=min(run.cap, outputs[each.number])) for each in small]
    clipped = transform.clipped(whole, 2048 - run.cap)
    if run.rate:
        return transform.retimed(clipped, run.rate, seed=1)
    return [replace(each, arrival=0.0) for each in clipped]


class Live:
    """The engine on an event loop; every request is submitted when it is due."""

    def __init__(self, parts: Parts, ending: Ending, outcome: Outcome) -> None:
        self._parts = parts
        self._ending = ending
        self._outcome = outcome
        self._finished: dict[str, Finished] = {}
        self._late: list[float] = []
        self._ways: Counter[str] = Counter()
        self._begun = 0.0

    async def play(self, trace: Sequence[TraceRequest], cap: int) -> None:
        parts = self._parts
        engine = Engine(
            parts.fleet, parts.workers, exact=parts.exact, store=parts.store, clock=time.perf_counter
        )
        engine.on_finished.append(lambda finished: self._finished.update({finished.request: finished}))
        engine.on_step.append(self._step)
        engine.on_resumed.append(self._resumed)
        self.watch(engine)
        prompts = Prompts(trace, len(parts.model.vocabulary) - FIRST_TOKEN, FIRST_TOKEN)
        asked = []
        for each in trace:
            prompt = tuple(prompts.tokens(each))
            self._ending.lengths[each.number] = (len(prompt), each.output_tokens)
            asked.append(Request(str(each.number), prompt, Sampling(0.0, seed=each.number), Stopping(cap)))
        self._begun = time.perf_counter() + BEGINS_AFTER
        due = [self._begun + each.arrival for each in trace]
        answers = await asyncio.gather(*map(self._ask, [engine] * len(asked), asked, due))
        self._tell(engine, asked, due, answers)

    def watch(self, engine: Engine) -> None:
        """For benches that look at more."""

    def at(self, seconds: float, work: Callable[[], None]) -> None:
        """Has something done so many seconds after the beginning."""
        asyncio.get_running_loop().call_later(BEGINS_AFTER + seconds, work)

    async def _ask(self, engine: Engine, request: Request, due: float) -> list[int]:
        await asyncio.sleep(due - time.perf_counter())
        self._late.append(time.perf_counter() - due)
        return await read(engine.submit(request))

    def _step(self, record: StepRecord) -> None:
        self._outcome.computed += record.computed_tokens
        self._outcome.recomputed += record.recomputed_tokens
        self._outcome.preemptions += record.preemptions
        self._outcome.peak_blocks = max(self._outcome.peak_blocks, record.kv_used_blocks)
        self._ways.update({f"{way} {tier}": count for (way, tier), count in record.resumptions.items()})

    def _resumed(self, back: Resumed, replica: int) -> None:
        told = (
            time.perf_counter() - back.actual_seconds - self._begun,
            f"{back.way} {back.tier}",
            back.predicted_seconds,
            back.actual_seconds,
            back.regret_seconds,
        )
        self._outcome.resumed.append(told)

    def _tell(
        self,
        engine: Engine,
        asked: Sequence[Request],
        due: Sequence[float],
        answers: Sequence[list[int]],
    ) -> None:
        outcome = self._outcome
        engine.fleet.check()
        for request, at, answer in zip(asked, due, answers, strict=True):
            finished = self._finished[request.id]
            assert finished.first_token is not None
            assert len(answer) == finished.output_tokens == self._ending.lengths[request.sampling.seed][1]
            outcome.normalised.append((finished.finished - at) / len(answer))
            outcome.ttft.append(finished.first_token - at)
            outcome.answers.append(hash(tuple(answer)))  # of ints alone: the same in every process
            outcome.output_tokens += len(answer)
        outcome.seconds = max(finished.finished for finished in self._finished.values()) - self._begun
        outcome.late = median(self._late)
        outcome.ways = dict(self._ways)


def play(run: Run, live: Callable[[Parts, Ending, Outcome], Live] = Live) -> Outcome:
    """On the main thread, which torch gets."""
    flags = [f"policies.{key}={value}" for key, value in run.policies.items()]
    flags += [f"engine.kv_blocks={run.blocks}", f"engine.max_sequences={MAX_SEQUENCES}", "log.level=warning"]
    flags += ["engine.max_queue=100000"] + ([f"model.path={run.model}"] if run.model else [])
    parts = load(load_config(flags, {}, cwd=Path("/")).config)
    ending = Ending(parts.worker.runner, parts.core.config.eos_token_ids[0])
    parts = replace(parts, workers=[QueueWorker(ending)])
    outcome = Outcome()
    made = live(parts, ending, outcome)
    parts.worker.run_beside(lambda: run_to_end(made.play(workload(run), run.cap)))
    if parts.store:
        parts.store.stop(10.0)
    return outcome


async def read(stream: Stream) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


# --- all systems of one cell ------------------------------------------------------------------------------------------


def in_a_process(run: Run, module: str = "bench.policies") -> Outcome:
    command = [sys.executable, "-m", module, "--play", json.dumps(asdict(run))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True, slots=True)
class Load:
    """What all systems of a cell are given."""

    at_rate: Run
    free: Outcome  # with all the blocks it wants
    share: float


def found_load(base: Run, load_share: float, share: float, blocks: int) -> Load:
    """`base` says the rate, or 0: then it is found. `blocks`: 0 for `share` × the demand."""
    rate = base.rate or load_share * base.requests / in_a_process(base).seconds
    free = in_a_process(replace(base, rate=rate))
    blocks = blocks or max(round(share * free.peak_blocks), 2048 // 16 + 1)
    return Load(replace(base, rate=rate, blocks=blocks), free, round(blocks / free.peak_blocks, 2))


def cell(load: Load, systems: Mapping[str, Mapping[str, str]], rounds: int, rows: Path) -> int:
    """All systems by turns. Exit code 1 when an answer differs, or the load came too late."""
    wrong = 0
    with rows.open("a", buffering=1) as file:
        for turn in range(rounds):
            for system in rotated(list(systems), turn):
                row = _played(load, system, systems[system])
                wrong += not row["same"] or row["void"]
                file.write(json.dumps(row) + "\n")
                console().print(f"{turn + 1} of {rounds}, {system}: {row}")
    return int(wrong > 0)


def _played(load: Load, system: str, policies: Mapping[str, str]) -> dict[str, Any]:
    run = replace(load.at_rate, system=system, policies=policies)
    outcome = in_a_process(run)
    head = {"trace": Path(run.trace).name, "model": run.model or "shipped", "share": load.share}
    return head | {
        "system": system,
        "rate": run.rate,
        "blocks": run.blocks,
        "demand": load.free.peak_blocks,
        "same": outcome.answers == load.free.answers,
        "void": outcome.late > LATE_SECONDS,
        **figures(outcome),
    }


def rotated(systems: Sequence[str], turn: int) -> list[str]:
    """Each turn begins with another system: what the machine does in time must not fall on the same ones."""
    first = turn % len(systems)
    return [*systems[first:], *systems[:first]]


def figures(outcome: Outcome) -> dict[str, Any]:
    errors: dict[str, list[float]] = defaultdict(list)
    for _, way, predicted, actual, _ in outcome.resumed:
        if actual > 0:
            errors[way].append(abs(predicted / actual - 1))
    regrets = [regret for *_, regret in outcome.resumed if regret is not None]
    return {
        "tax": outcome.tax,
        "preemptions": outcome.preemptions,
        "mean": mean(outcome.normalised),
        "p50": median(outcome.normalised),
        "p99": quantiles(outcome.normalised, n=100)[98],
        "ttft": mean(outcome.ttft),
        "ttft_p99": quantiles(outcome.ttft, n=100)[98],
        "tokens_per_second": outcome.output_tokens / outcome.seconds,
        "ways": outcome.ways,
        "resume_errors": {way: (len(each), median(each)) for way, each in errors.items()},
        "regret_seconds": sum(regrets),
    }


def report(rows: Path) -> int:
    """Exit code 1 when a goal of design §9 is missed at 0.4 × demand, or any answer differed."""
    found: dict[tuple[str, str, float, float, int], dict[str, list[dict[str, Any]]]]
    found = defaultdict(lambda: defaultdict(list))
    for text in rows.read_text().splitlines():
        row = json.loads(text)
        if not row["void"]:
            cell = row["trace"], row["model"], row["share"], row["rate"], row["blocks"]
            found[cell][row["system"]].append(row)
    missed = False
    for (trace, model, share, rate, blocks), systems in found.items():
        title = (
            f"{trace}, {model}, {rate:.3g} requests a second, {blocks} KV blocks, {share:g} of demand: "
            "normalised latency in ms, over ours in brackets"
        )
        table = Table("system", "runs", "tax", "preempted", "mean", "P99", "TTFT ms", "tok/s", title=title)
        ours = {key: _median(systems["ours"], key) for key in ("mean", "p99")}
        for system, those in systems.items():
            table.add_row(
                system, str(len(those)), f"{_median(those, 'tax'):.1%}", f"{_median(those, 'preemptions'):.0f}",
                *(f"{_median(those, key) * 1e3:.1f} ({_median(those, key) / ours[key]:.2f})" for key in ours),
                f"{_median(those, 'ttft') * 1e3:.0f}", f"{_median(those, 'tokens_per_second'):,.0f}",
            )  # fmt: skip
            missed |= not all(each["same"] for each in those)
        console().print(table, _errors(systems))
        missed |= share == 0.4 and _median(systems["ours"], "tax") > 0.01
    return int(missed)


def _errors(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Of predicted resume times: the median over runs of each run's median."""
    table = Table("system", "way", "resumes", "relative error", title="coming back, predicted")
    for system, those in systems.items():
        for way in sorted({way for each in those for way in each["resume_errors"]}):
            told = [each["resume_errors"][way] for each in those if way in each["resume_errors"]]
            table.add_row(
                system, way, str(sum(n for n, _ in told)), f"{median(error for _, error in told):.0%}"
            )
    return table


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    found: float = median(row[key] for row in rows)
    return found


def run_of(options: argparse.Namespace, system: str, rate: float) -> Run:
    """What the command line says of a run; all blocks it wants."""
    return Run(
        system=system,
        trace=options.trace,
        model=options.model,
        requests=options.requests,
        answers_over=options.answers_over,
        cap=options.cap,
        rate=rate,
        blocks=UNPRESSURED_BLOCKS,
    )


def arguments(description: str | None, *, requests: int, answers_over: int) -> argparse.ArgumentParser:
    """What a run of a trace is told; the numbers are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--trace", help="a recorded trace (docs/simulation.md has the formats)")
    add("--model", default="", help="a model directory; the shipped one unless told otherwise")
    add("--requests", type=int, default=requests)
    add("--answers-over", type=int, default=answers_over, help="recorded output lengths are divided by this")
    add("--cap", type=int, default=512, help="what clients ask for as max_tokens")
    add("--load", type=float, default=0.85, help="of the throughput when all come at once")
    add("--share", type=float, default=0.4, help="of the demand, as KV blocks")
    add("--rows", type=Path, help="where rows are added")
    add("--report", action="store_true")
    add("--play", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = arguments(__doc__, requests=200, answers_over=4)
    parser.add_argument(
        "--systems", nargs="+", type=named, default=list(SYSTEMS.items()), help="NAME, or NAME=key:value,…"
    )
    parser.add_argument("--rounds", type=int, default=5, help="each system is played so often, by turns")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, instead of --load")
    parser.add_argument("--blocks", type=int, default=0, help="KV blocks, instead of --share")
    options = parser.parse_args()
    if options.play:
        run = Run(**json.loads(options.play))
        outcome = play(run)
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        return 0
    if options.rows is None or not (options.report or options.trace):
        parser.error("--rows, and --trace or --report, are needed")
    if options.report:
        return report(options.rows)
    load = found_load(run_of(options, "ours", options.rate), options.load, options.share, options.blocks)
    return cell(load, dict(options.systems), options.rounds, options.rows)


if __name__ == "__main__":
    sys.exit(main())
