"""What predictions of length are worth: `python -m bench.prediction [TRACE …] [--loads 0.85 0.95]`.

Orders before a batching server (batch_queue.py), on each trace and on one made up so that class and prompt length
tell the length of the answer. A trace's arrivals are as recorded; the load is set by how fast the server is.
Printed: mean and P99 of latency ÷ output tokens, and the *gain*: (fcfs − sjf by histogram) ÷ (fcfs − sjf by the
true lengths).

What limits the gain is seen beside it. `cells` predicts by the mean of all answers, future ones too, with the same
class and log₂ prompt length: what a histogram could do that had nothing left to learn. `ranked` is the share of
pairs of requests that the histogram, as it was when they came, puts in the right order (0.5 is chance). The mutual
information of prompt and answer length is in bits, less what shuffled answers have.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from random import Random
from statistics import mean, quantiles
from typing import Any

from rich.table import Table

from app.workload.drawing import Drawing, poisson
from app.workload.formats import load
from bench import machine
from bench.batch_queue import Job, Queue, Server
from bench.report import console
from policies.order import ORDERS
from policies.prediction import PREDICTIONS, Predictor
from policies.views import SequenceView

Row = dict[str, Any]
Kind = tuple[str, int]


@dataclass(frozen=True)
class Cells:
    """Predicts the mean of all answers of its kind, future ones too."""

    lengths: dict[Kind, float]

    def remaining(self, view: SequenceView, /) -> float:
        return self.lengths[kind(view)]

    def quantile(self, view: SequenceView, q: float, /) -> float:
        return self.remaining(view)

    def survival(self, view: SequenceView, steps: float, /) -> float:
        return float(self.remaining(view) > steps)

    def observe(self, view: SequenceView, /) -> None:
        """It knows already."""


def kind(view: SequenceView) -> Kind:
    """What the histogram tells apart."""
    return view.class_name, view.prompt_tokens.bit_length()


def cells(jobs: Iterable[Job]) -> Cells:
    found: dict[Kind, list[int]] = defaultdict(list)
    for job in jobs:
        found[kind(job)].append(job.length)
    return Cells({each: mean(lengths) for each, lengths in found.items()})


POLICIES: dict[str, tuple[str, Callable[[Sequence[Job]], Predictor]]] = {
    "fcfs": ("fcfs", lambda jobs: PREDICTIONS["max_tokens"]()),
    "sjf, histogram": ("sjf", lambda jobs: PREDICTIONS["histogram"]()),
    "sjf, cells": ("sjf", cells),
    "sjf, oracle": ("sjf", lambda jobs: PREDICTIONS["oracle"]({job.number: job.length for job in jobs})),
    "hybrid, histogram": ("hybrid", lambda jobs: PREDICTIONS["histogram"]()),
    "mlq": ("mlq", lambda jobs: PREDICTIONS["max_tokens"]()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prediction", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("traces", nargs="*", type=Path, help="files of any format that app/workload knows")
    parser.add_argument("--loads", nargs="+", type=float, default=[0.85, 0.95])
    parser.add_argument("--requests", type=int, default=20_000, help="of each trace, the first ones, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="write raw rows to this file")
    given = parser.parse_args()
    rows = [
        {"trace": name, **row}
        for name, jobs in workloads(given.traces, given.requests, given.seed)
        for row in compared(jobs, given.loads, given.seed)
    ]
    if given.rows:
        given.rows.write_text("".join(json.dumps(row) + "\n" for row in [machine.description(), *rows]))
    console().print(table(rows))


# --- requests -------------------------------------------------------------------------------------------------------


def workloads(traces: Iterable[Path], count: int, seed: int) -> Iterator[tuple[str, list[Job]]]:
    """A trace whose sessions are clients comes twice: also with each client as a class of its own."""
    yield "predictable", predictable(count, seed)
    for path in traces:
        requests = load(path, Drawing(seed))[:count]
        jobs = [Job(each.number, each.arrival, each.prompt_tokens, each.output_tokens) for each in requests]
        yield path.name.partition(".")[0], jobs
        sessions = [each.session for each in requests]
        if len(set(sessions)) < len(sessions) / 10:
            name = f"{path.name.partition('.')[0]}, by client"
            yield name, [replace(job, class_name=name) for job, name in zip(jobs, sessions, strict=True)]


def predictable(count: int, seed: int) -> list[Job]:
    """Labels in a few tokens, chats, and summaries an eighth as long as what they sum up; Poisson arrivals."""
    random = Random(seed)
    arrivals = poisson(random, 5.0)
    return [
        Job(number, next(arrivals), *random.choice((_label, _chat, _summary))(random))
        for number in range(count)
    ]


def _label(random: Random) -> tuple[int, int, str]:
    return random.randint(100, 2000), random.randint(1, 8), "label"


def _chat(random: Random) -> tuple[int, int, str]:
    return random.randint(20, 500), max(1, int(random.lognormvariate(5.0, 0.4))), "chat"


def _summary(random: Random) -> tuple[int, int, str]:
    prompt = int(2 ** random.uniform(9, 13))
    return prompt, max(1, int(prompt / 8 * random.lognormvariate(0.0, 0.3))), "summary"


# --- runs -----------------------------------------------------------------------------------------------------------


def compared(jobs: Sequence[Job], loads: Iterable[float], seed: int) -> Iterator[Row]:
    """One row a load and policy."""
    told = {"information": information(jobs, seed), "entropy": entropy(Counter(map(_size, jobs)))}
    for load_share in loads:
        server = Server().faster(speed(jobs, load_share))
        for name in POLICIES:
            served = run(jobs, name, server)
            yield {"load": load_share, "policy": name, **told, **figures(served, seed)}


def speed(jobs: Sequence[Job], load_share: float) -> float:
    """By how much the server must be faster so that, were all there at the start, it would work for this share."""
    queue = Queue(Server(), ORDERS["fcfs"](), PREDICTIONS["max_tokens"]())
    queue.serve([replace(job, arrived=0.0) for job in jobs])
    return queue.now / (load_share * (jobs[-1].arrived - jobs[0].arrived))


def run(jobs: Sequence[Job], name: str, server: Server) -> list[Job]:
    served = [replace(job) for job in jobs]
    order, predictor = POLICIES[name]
    Queue(server, ORDERS[order](), predictor(served)).serve(served)
    return served


def figures(served: Sequence[Job], seed: int) -> Row:
    latencies = [job.normalised_seconds for job in served]
    return {
        "mean_ms": mean(latencies) * 1e3,
        "p99_ms": quantiles(latencies, n=100)[98] * 1e3,
        "ranked": ranked(served, seed),
    }


# --- what can be known ----------------------------------------------------------------------------------------------


def ranked(served: Sequence[Job], seed: int, pairs: int = 100_000) -> float:
    """The share of pairs of different lengths that predictions put right; those predicted alike count half."""
    random, right, count = Random(seed), 0.0, 0
    for _ in range(pairs):
        one, other = random.choice(served), random.choice(served)
        if one.length != other.length:
            longer, shorter = (one, other) if one.length > other.length else (other, one)
            more = longer.expected_remaining_tokens - shorter.expected_remaining_tokens
            right += 1.0 if more > 0 else 0.5 if more == 0 else 0.0
            count += 1
    return right / count if count else 1.0


def information(jobs: Sequence[Job], seed: int, shuffles: int = 5) -> float:
    """Bits that class and log₂ prompt length tell of the answer's length, in steps of √2."""
    kinds, sizes = [kind(job) for job in jobs], [_size(job) for job in jobs]
    found = _mutual(kinds, sizes)
    random, by_chance = Random(seed), []
    for _ in range(shuffles):
        random.shuffle(sizes)
        by_chance.append(_mutual(kinds, sizes))
    return found - mean(by_chance)


def entropy(counts: Counter[Any]) -> float:
    """Bits."""
    total = counts.total()
    return -sum(count / total * log2(count / total) for count in counts.values())


def _mutual(ones: Sequence[Any], others: Sequence[Any]) -> float:
    return (
        entropy(Counter(ones)) + entropy(Counter(others)) - entropy(Counter(zip(ones, others, strict=True)))
    )


def _size(job: Job) -> int:
    return int(2 * log2(job.length))


# --- the table ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """One line a trace and load."""
    shown = Table("trace", "load", title="latency ÷ output tokens: mean / P99, ms")
    for name in (*POLICIES, "gain", "of cells", "ranked", "bits of"):
        shown.add_column(name, justify="right")
    groups: dict[tuple[str, float], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[row["trace"], row["load"]][row["policy"]] = row
    for (trace, load_share), group in groups.items():
        latencies = [f"{_ms(group[name]['mean_ms'])} / {_ms(group[name]['p99_ms'])}" for name in POLICIES]
        histogram = group["sjf, histogram"]
        shown.add_row(
            trace,
            f"{load_share:.0%}",
            *latencies,
            f"{gain(group, 'sjf, histogram'):.2f}",
            f"{gain(group, 'sjf, cells'):.2f}",
            f"{histogram['ranked']:.2f}",
            f"{histogram['information']:.2f} of {histogram['entropy']:.2f}",
        )
    return shown


def _ms(figure: float) -> str:
    return f"{figure:.1f}" if figure < 100 else f"{figure:,.0f}"


def gain(group: dict[str, Row], name: str) -> float:
    """The share of what the oracle gains over fcfs. Not a number where it gains nothing."""
    fcfs, best = group["fcfs"]["mean_ms"], group["sjf, oracle"]["mean_ms"]
    return (fcfs - group[name]["mean_ms"]) / (fcfs - best) if fcfs > best else float("nan")


if __name__ == "__main__":
    main()
