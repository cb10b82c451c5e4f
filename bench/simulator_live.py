"""The simulator against the live engine on this machine, in one process without HTTP, at shares of its capacity.

    sluice bench profile --out PROFILE
    python -m bench.simulator_live --profile PROFILE --rows FILE     # again to add a repeat
    python -m bench.simulator_live --rows FILE --report

Each run plays one Poisson workload at 50, 85 and 95 % of the capacity that the simulator finds (requests per second
when all arrive at once), on the engine as the server composes it, and on the simulator. The report gives the errors of
the simulated figures from the median of the live runs, and how far these lie apart.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from rich.table import Table

from app.compose import load
from app.config import Config
from app.core_config import scheduler_config
from app.serving import Parts
from app.simulate.playing import TraceWorkload
from app.workload.drawing import Drawing, poisson
from app.workload.prompts import Prompts
from app.workload.trace import TraceRequest
from bench.machine import Others
from bench.report import DISTURBED_CORES, console
from bench.simulator import GOALS, compare
from engine.core import CoreConfig
from engine.engine import Engine
from engine.fleet import FleetConfig
from engine.plan import Sampling
from engine.profile import Profile, read_profile
from engine.request import Finished, Request, Stopping
from engine.simulation import EOS, Outcome, Served, Simulation
from engine.stream import Stream

SHARES = (0.5, 0.85, 0.95)
SECONDS = 45.0
SATURATING = 300
KV_BLOCKS, MAX_SEQUENCES = 4000, 64
CONFIG: dict[str, Any] = {
    "engine": {"kv_blocks": KV_BLOCKS, "max_sequences": MAX_SEQUENCES, "max_queue": 100_000},
    "kvstore": {"host": {"bytes": 0}},
    "log": {"level": "warning"},
}
FIRST_TOKEN = 10  # special tokens lie below
LATE_SECONDS = 0.01
"""A run in which half of the requests were submitted later than this is void."""


def workload(count: int, rate: float, seed: int) -> list[TraceRequest]:
    """Lengths as of a chat: prompts of 24 to 900 tokens, answers of 8 to 300, both log-normal."""
    random, arrivals = Drawing(seed).random("lengths"), poisson(Drawing(seed).random("arrivals"), rate)
    return [
        TraceRequest(
            number, str(number), next(arrivals), _length(random, 160, 24, 900), _length(random, 60, 8, 300)
        )
        for number in range(count)
    ]


def _length(random: Random, middle: float, least: int, most: int) -> int:
    return max(least, min(most, round(middle * random.lognormvariate(0, 0.8))))


def simulated(trace: Sequence[TraceRequest], profile: Profile) -> Outcome:
    config = Config.model_validate(CONFIG)
    core = CoreConfig(
        scheduler=scheduler_config(config, KV_BLOCKS, profile.block_bytes),
        model_context=profile.context,
        max_queue=config.engine.max_queue,
        max_outstanding=2 if profile.runs_ahead else 1,
        eos_token_ids=(EOS,),
    )
    return Simulation(
        FleetConfig.of(core), profile, TraceWorkload(trace, core.context, lengths_known=True)
    ).run()


def capacity(profile: Profile) -> float:
    """Requests per second when all are there at once."""
    at_once = [replace(each, arrival=0.0) for each in workload(SATURATING, 1.0, seed=0)]
    return SATURATING / simulated(at_once, profile).seconds


@dataclass(frozen=True, slots=True)
class Played:
    """What the live engine made of a trace, and the cores that others kept busy (or the host away) meanwhile."""

    served: list[Served]
    others_cores: float


class Live:
    """The engine on an event loop; every request is submitted when it is due."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._finished: dict[str, Finished] = {}
        self._late: list[float] = []

    async def play(self, traces: Sequence[Sequence[TraceRequest]]) -> list[Played]:
        """One after the other."""
        parts = self._parts
        engine = Engine(
            parts.fleet, parts.workers, exact=parts.exact, store=parts.store, clock=time.perf_counter
        )
        engine.on_finished.append(self._note)
        await self._play(engine, workload(4, 100.0, seed=99), "warm")
        played = []
        for index, trace in enumerate(traces):
            others = Others(os.getpid())
            served = await self._play(engine, trace, str(index))
            played.append(Played(served, others.cores()))
        return played

    async def _play(self, engine: Engine, trace: Sequence[TraceRequest], name: str) -> list[Served]:
        prompts = Prompts(trace, len(self._parts.model.vocabulary) - FIRST_TOKEN, FIRST_TOKEN)
        asked = {
            each.number: Request(
                f"{name} {each.number}",
                tuple(prompts.tokens(each)),
                Sampling(seed=each.number),
                Stopping(each.output_tokens, ignore_eos=True),
                salt=name,
            )
            for each in trace
        }
        begun = time.perf_counter() + 0.1
        await asyncio.gather(*(self._ask(engine, asked[each.number], begun + each.arrival) for each in trace))
        return [self._served(each, asked[each.number].id, begun) for each in trace]

    async def _ask(self, engine: Engine, request: Request, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        self._late.append(time.perf_counter() - due)
        await _read(engine.submit(request))

    def _served(self, each: TraceRequest, name: str, begun: float) -> Served:
        """Latencies count from when it was due."""
        finished = self._finished.pop(name)
        assert finished.first_token is not None
        return Served(
            number=each.number,
            arrived=each.arrival,
            prompt_tokens=finished.prompt_tokens,
            output_tokens=finished.output_tokens,
            first_token=finished.first_token - begun,
            finished=finished.finished - begun,
            preemptions=finished.preemptions,
        )

    def _note(self, finished: Finished) -> None:
        self._finished[finished.request] = finished

    @property
    def late(self) -> float:
        return median(self._late)


async def _read(stream: Stream) -> None:
    async for _ in stream:
        pass


def play(traces: Sequence[Sequence[TraceRequest]]) -> tuple[list[Played], float]:
    """What the live engine made of them, and the median of its submissions' lateness. On the main thread."""
    parts = load(Config.model_validate(CONFIG))
    live = Live(parts)
    found = parts.worker.run_beside(lambda: asyncio.run(live.play(traces)))
    return found, live.late


def run(profile: Profile, rows: Path, seconds: float) -> int:
    """One repeat: a row for each share, metric and statistic. Exit code 1 when it is void."""
    most = capacity(profile)
    traces = [workload(round(seconds * share * most), share * most, seed=1) for share in SHARES]
    lived, late = play(traces)
    sys.stderr.write(f"capacity {most:.2f} requests/s; submitted {late * 1e3:.2f} ms late (median)\n")
    if late > LATE_SECONDS:
        sys.stderr.write("void: the load came too late\n")
        return 1
    with rows.open("a") as file:
        for share, trace, live in zip(SHARES, traces, lived, strict=True):
            facts = {"share": share, "capacity": most, "others_cores": live.others_cores}
            for each in compare(live.served, simulated(trace, profile).served):
                file.write(json.dumps(facts | asdict(each)) + "\n")
    return 0


def report(rows: Path) -> int:
    """Exit code 1 when a goal is missed by more than the live runs differ, or no run was undisturbed."""
    found: dict[tuple[float, str, str], list[dict[str, Any]]] = defaultdict(list)
    told = [json.loads(text) for text in rows.read_text().splitlines()]
    for row in told:
        if row["others_cores"] <= DISTURBED_CORES:
            found[row["share"], row["metric"], row["statistic"]].append(row)
    if left_out := len(told) - sum(map(len, found.values())):
        console().print(
            f"{left_out} of {len(told)} rows left out: others used > {DISTURBED_CORES} cores meanwhile"
        )
    table = Table(
        "share", "metric", "statistic", "live", "spread", "simulated", "error", title="live and simulated (s)"
    )
    failed = False
    for (share, metric, statistic), those in sorted(found.items()):
        lived = [row["recorded"] for row in those]
        middle, simulation = median(lived), those[-1]["simulated"]
        spread, error = (max(lived) - min(lived)) / middle, simulation / middle - 1
        missed = abs(error) > max(GOALS.get(statistic, float("inf")), spread)
        failed = failed or missed
        mark = "!" if missed else ""
        cells = (f"{middle:.4g}", f"{spread:.1%}", f"{simulation:.4g}", f"{error:+.1%}{mark}")
        table.add_row(f"{share:.0%}", metric, statistic, *cells)
    console().print(table)
    return int(failed or not found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulator_live", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument(
        "--rows", type=Path, required=True, metavar="FILE", help="a repeat's rows are added to it"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each share")
    parser.add_argument("--report", action="store_true", help="run nothing: what the rows say")
    options = parser.parse_args()
    if options.report or options.profile is None:
        return report(options.rows)
    return run(read_profile(options.profile), options.rows, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
