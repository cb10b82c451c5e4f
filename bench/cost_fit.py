"""How well the cost model foretells: every step and copy of a mixed workload, predicted before it is learned from.

In process, on the engine as the server composes it: closed-loop clients whose number changes every few seconds, prompts
and answers of log-uniform lengths, some conversations that come back, a pool small enough for preemptions, and a host
tier behind it. Copies run beside steps, as they do in a server. Prints the relative errors by kind; rows go to a file.

    python -m bench.cost_fit --seconds 60 [--model DIRECTORY] [--from ROWS]
"""

import argparse
import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from app.calibration import calibrate
from app.compose import load
from app.config import Config, EngineSection, KVStoreSection, LogSection, ModelSection
from app.loop import run_to_end
from app.serving import Parts
from app.tiers import device_tier
from bench import machine, report
from engine.engine import Engine
from engine.plan import Launched, Plan, Row, Sampling, StepResult
from engine.records import CopyRecord
from engine.request import Request, Stopping
from engine.worker import QueueWorker
from kvstore.memory import host_tier
from policies.cost import CopySample, CostModel, StepSample

Sample = StepSample | CopySample
CLIENTS = (1, 4, 12, 32, 8, 2, 48, 16)
"""At once, an eighth of the time each."""

COMES_BACK = 0.3
"""Of the conversations."""


def step_sample(rows: Iterable[Row], seconds: float) -> StepSample:
    """What a plan's rows computed."""
    prefill = decode = context = 0
    attended = 0.0
    for row in rows:
        count = len(row.tokens)
        if count == 1 and row.samples:
            decode, context = decode + 1, context + row.start
        else:
            prefill, attended = prefill + count, attended + count * (row.start + count / 2)
    return StepSample(prefill, attended, decode, context, seconds)


@dataclass(frozen=True, slots=True)
class WatchedLaunch:
    launched: Launched
    plan: Plan
    observe: Callable[[Sample], None]

    def collect(self) -> StepResult:
        result = self.launched.collect()
        self.observe(step_sample(self.plan.rows, result.seconds))
        return result


class WatchedRunner:
    """A runner whose steps are observed."""

    def __init__(self, runner: Any, observe: Callable[[Sample], None]) -> None:
        self.runner, self._observe = runner, observe
        self.exact = runner.exact

    def launch(self, plan: Plan) -> Launched:
        return WatchedLaunch(self.runner.launch(plan), plan, self._observe)


class Workload:
    """Clients that each ask, wait for the answer, and ask again."""

    def __init__(self, engine: Engine, context: int, vocabulary: int, seed: int) -> None:
        self._engine, self._context, self._vocabulary = engine, context, vocabulary
        self._draw = random.Random(seed)
        self._requests = 0
        self._wanted = 0

    async def run(self, seconds: float) -> None:
        async with asyncio.TaskGroup() as clients:
            for number in range(max(CLIENTS)):
                clients.create_task(self._client(number))
            for wanted in CLIENTS:
                self._wanted = wanted
                await asyncio.sleep(seconds / len(CLIENTS))
            self._wanted = -1

    async def _client(self, number: int) -> None:
        tokens: list[int] = []
        while self._wanted >= 0:
            if number >= self._wanted:
                await asyncio.sleep(0.05)
                continue
            if self._draw.random() > COMES_BACK or len(tokens) > self._context // 2:
                tokens = []
            tokens += self._random(min(self._context - len(tokens), self._between(8, 1600)) * 3 // 4)
            tokens += await self._ask(tokens, min(self._context - len(tokens), self._between(4, 256)))

    async def _ask(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        self._requests += 1
        sampling = Sampling(temperature=self._draw.choice((0.0, 0.8)), seed=self._requests)
        stopping = Stopping(max_tokens=new_tokens, ignore_eos=True)
        stream = self._engine.submit(Request(str(self._requests), tuple(prompt), sampling, stopping))
        return [token async for delta in stream for token in delta.token_ids]

    def _between(self, least: int, most: int) -> int:
        """Log-uniform."""
        return int(math.exp(self._draw.uniform(math.log(least), math.log(most))))

    def _random(self, count: int) -> list[int]:
        return [self._draw.randrange(5, self._vocabulary) for _ in range(max(1, count))]


def measured(options: argparse.Namespace) -> tuple[list[Sample], list[Sample], Counter[str]]:
    """Samples of the calibration, then of serving in the order of their ends, and what happened besides."""
    parts = load(configuration(options))
    runner: Any = parts.worker.runner  # the composition root keeps it to itself
    device = device_tier(runner)
    host = host_tier(256, device.block_bytes, pinned=False)
    begun = time.perf_counter()
    before = list(calibrate(runner, parts.core.config.scheduler, device, host))
    counts = Counter({"calibration_ms": round((time.perf_counter() - begun) * 1e3)})
    samples: list[Sample] = []
    worker = QueueWorker(WatchedRunner(runner, samples.append))
    counts.update(worker.run_beside(lambda: run_to_end(_serve(parts, worker, options, samples))))
    return before, samples, counts


async def _serve(
    parts: Parts, worker: QueueWorker, options: argparse.Namespace, samples: list[Sample]
) -> Counter[str]:
    engine = Engine(parts.fleet, [worker], exact=parts.exact, store=parts.store, clock=time.perf_counter)

    def observe(copy: CopyRecord) -> None:
        samples.append(CopySample(copy.source, copy.target, copy.bytes, copy.seconds, copy.queued_seconds))

    engine.on_copy.append(observe)
    context = min(parts.core.config.context, 4096)
    await Workload(engine, context, len(parts.model.vocabulary), options.seed).run(options.seconds)
    await engine.quiet()
    engine.stop()
    if parts.store:
        await asyncio.to_thread(parts.store.stop, 10.0)
    counts = parts.core.scheduler.counts
    return Counter({"preemptions": counts.preemptions, "prefix_hit_tokens": counts.prefix_hits})


def configuration(options: argparse.Namespace) -> Config:
    disk = {"path": options.disk, "bytes": options.host_bytes} if options.disk else {}
    return Config(
        model=ModelSection(path=options.model),
        engine=EngineSection(kv_blocks=options.kv_blocks, max_sequences=64),
        kvstore=KVStoreSection.model_validate({"host": {"bytes": options.host_bytes}, "disk": disk}),
        log=LogSection(level="warning"),
    )


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Foretold:
    kind: str
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.seconds - 1


def foretold(before: Sequence[Sample], samples: Sequence[Sample]) -> Iterator[Foretold]:
    """Each sample's seconds as predicted from those before it."""
    model = CostModel.calibrated(before)
    for sample in samples:
        if isinstance(sample, StepSample):
            work = sample.prefill_tokens, sample.attended, sample.decode_rows, sample.decode_context
            yield Foretold(kind(sample), sample.seconds, model.steps.step_seconds(*work))
        elif sample.bytes:
            predicted = model.copies.seconds(sample.source, sample.target, sample.bytes)
            yield Foretold(f"copy {sample.source} → {sample.target}", sample.seconds, predicted)
        model.observe(sample)


def kind(sample: StepSample) -> str:
    for most in (16, 64, 256, 1024):
        if 0 < sample.prefill_tokens <= most:
            return f"prefill ≤ {most:4}"
    if sample.prefill_tokens:
        return "prefill > 1024"
    rows = next(least for least in (32, 8, 2, 1) if sample.decode_rows >= least)
    return f"decode  ≥ {rows:4} rows"


def table(results: Sequence[Foretold]) -> Table:
    shown = Table(
        "kind", *("n", "median s", "median error", "median |error|", "P90 |error|", "error of the sum")
    )
    steps = [each for each in results if not each.kind.startswith("copy")]
    groups = {"all steps": steps, "first 100 steps": steps[:100]}
    for name in sorted({each.kind for each in results}):
        groups[name] = [each for each in results if each.kind == name]
    for name, group in groups.items():
        if len(group) > 1:
            errors = [abs(each.error) for each in group]
            shown.add_row(
                name,
                str(len(group)),
                f"{median(each.seconds for each in group) * 1e3:.3f} ms",
                f"{median(each.error for each in group):+.1%}",
                f"{median(errors):.1%}",
                f"{quantiles(errors, n=10)[-1]:.1%}",
                f"{sum(each.predicted for each in group) / sum(each.seconds for each in group) - 1:+.1%}",
            )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost_fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="", help="a model's directory; the shipped one without it")
    add("--seconds", type=float, default=60.0)
    add("--seed", type=int, default=1)
    add("--kv-blocks", type=int, default=600)
    add("--host-bytes", type=int, default=2**29, help="of the disk tier too")
    add("--disk", default="", help="a directory for a disk tier; without it there is none")
    add("--out", type=Path, default=Path(".bench"), help="a directory for the rows")
    add(
        "--from",
        dest="rows",
        type=Path,
        help="rows of an earlier run: nothing is measured, only foretold again",
    )
    return parser.parse_args()


def write(path: Path, head: dict[str, Any], before: Sequence[Sample], samples: Sequence[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [head, *({"calibration": asdict(s)} for s in before), *({"serving": asdict(s)} for s in samples)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path) -> tuple[list[Sample], list[Sample]]:
    found: dict[str, list[Sample]] = {"calibration": [], "serving": []}
    for line in path.read_text().splitlines()[1:]:
        for part, values in json.loads(line).items():
            found[part].append(CopySample(**values) if "source" in values else StepSample(**values))
    return found["calibration"], found["serving"]


def main() -> None:
    options = arguments()
    console = report.console()
    if options.rows:
        before, samples = read(options.rows)
    else:
        before, samples, counts = measured(options)
        path = options.out / time.strftime("cost_fit-%Y%m%d-%H%M%S.jsonl")
        head = {"machine": machine.description(), "options": {k: str(v) for k, v in vars(options).items()}}
        write(path, head | {"counts": counts}, before, samples)
        console.print(f"{dict(counts)}; rows: {path}")
    console.print(table(list(foretold(before, samples))))


if __name__ == "__main__":
    main()
