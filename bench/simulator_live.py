"""The simulator against the live engine on this machine, in one process without HTTP, at shares of its capacity.

    sluice bench profile --set kvstore.host.bytes=0 --out PROFILE
    python -m bench.simulator_live --rows FILE                       # live; again to add a repeat
    python -m bench.simulator_live --rows FILE --profile PROFILE     # the report

A live run plays one Poisson workload at 50, 85 and 95 % of the engine's capacity (requests per second when all arrive
at once: the first run finds it, FILE keeps it), on the engine as the server composes it. The report simulates what was
served, with arrivals as they were (a timer is a millisecond late), and gives the errors of the simulated figures and
how far the live runs lie apart; both as medians of the runs.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from rich.table import Table

from app.compose import load
from app.config import Config
from app.core_config import scheduler_config
from app.loop import run_to_end
from app.serving import Parts
from app.simulate.playing import TraceWorkload
from app.workload.drawing import Drawing, poisson
from app.workload.prompts import Prompts
from app.workload.trace import TraceRequest
from bench.machine import Others
from bench.report import DISTURBED_CORES, console
from bench.simulator import GOALS, Comparison, compare
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
"""A share in which half of the requests were submitted later than this is void."""


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


def capacity(served: Sequence[Served]) -> float:
    """Requests per second that were served when all were there at once."""
    return len(served) / max(each.finished for each in served if each.finished is not None)


class Live:
    """The engine on the loop that is running; every request is submitted when it is due."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._finished: dict[str, Finished] = {}
        self._late: list[float] = []
        self._engine = Engine(
            parts.fleet, parts.workers, exact=parts.exact, store=parts.store, clock=time.perf_counter
        )
        self._engine.on_finished.append(self._note)

    async def share(self, share: float, most: float, seconds: float) -> dict[str, Any]:
        """A row. `most`: the capacity."""
        trace = workload(round(seconds * share * most), share * most, seed=1)
        self._late.clear()
        others = Others(os.getpid())
        served = await self.play(trace, str(share))
        return {
            "share": share,
            "capacity": most,
            "others_cores": others.cores(),
            "late": median(self._late),
            "served": [asdict(each) for each in served],
        }

    async def capacity(self) -> float:
        await self.play(workload(4, 100.0, seed=99), "warm")
        return capacity(
            await self.play([replace(each, arrival=0.0) for each in workload(SATURATING, 1.0, 0)], "all")
        )

    async def play(self, trace: Sequence[TraceRequest], name: str) -> list[Served]:
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
        await asyncio.gather(*(self._ask(asked[each.number], begun + each.arrival) for each in trace))
        return [self._served(each, asked[each.number].id, begun) for each in trace]

    async def _ask(self, request: Request, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        self._late.append(time.perf_counter() - due)
        await _read(self._engine.submit(request))

    def _served(self, each: TraceRequest, name: str, begun: float) -> Served:
        """Latencies count from when it was submitted."""
        finished = self._finished.pop(name)
        assert finished.first_token is not None
        return Served(
            number=each.number,
            arrived=finished.arrived - begun,
            prompt_tokens=finished.prompt_tokens,
            output_tokens=finished.output_tokens,
            first_token=finished.first_token - begun,
            finished=finished.finished - begun,
            preemptions=finished.preemptions,
        )

    def _note(self, finished: Finished) -> None:
        self._finished[finished.request] = finished


async def _read(stream: Stream) -> None:
    async for _ in stream:
        pass


def run(rows: Path, seconds: float) -> None:
    """One repeat: a row for each share. On the main thread."""
    parts = load(Config.model_validate(CONFIG))
    for row in parts.worker.run_beside(lambda: run_to_end(_repeat(parts, read(rows), seconds))):
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stderr.write(
            f"{row['share']:.0%} of {row['capacity']:.2f}/s; {row['late'] * 1e3:.2f} ms late (median)\n"
        )


async def _repeat(parts: Parts, before: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any]]:
    live = Live(parts)
    found = await live.capacity()
    most = before[0]["capacity"] if before else found
    return [await live.share(share, most, seconds) for share in SHARES]


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in rows.read_text().splitlines()] if rows.exists() else []


def again(served: Sequence[Served], profile: Profile) -> list[Served]:
    """The same requests, simulated: they come when they came."""
    trace = [
        TraceRequest(each.number, str(each.number), each.arrived, each.prompt_tokens, each.output_tokens)
        for each in sorted(served, key=lambda each: each.arrived)
    ]
    return simulated(trace, profile).served


def report(rows: Path, profile: Profile) -> int:
    """Exit code 1 when a goal is missed by more than the live runs differ, or no run was undisturbed."""
    found: dict[tuple[float, str, str], list[Comparison]] = defaultdict(list)
    told = read(rows)
    good = [row for row in told if row["others_cores"] <= DISTURBED_CORES and row["late"] <= LATE_SECONDS]
    if len(good) < len(told):
        console().print(
            f"{len(told) - len(good)} of {len(told)} rows left out: disturbed, or the load came late"
        )
    for row in good:
        served = [Served(**each) for each in row["served"]]
        for comparison in compare(served, again(served, profile)):
            found[row["share"], comparison.metric, comparison.statistic].append(comparison)
    table = Table(
        "share", "metric", "statistic", "live", "spread", "simulated", "error", title="live and simulated (s)"
    )
    failed = False
    for (share, metric, statistic), those in sorted(found.items()):
        lived = [each.recorded for each in those]
        middle, simulation = median(lived), median(each.simulated for each in those)
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
    parser.add_argument(
        "--rows", type=Path, required=True, metavar="FILE", help="live runs; a repeat is added to it"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="run nothing live: simulate what FILE holds"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each share")
    options = parser.parse_args()
    if options.profile is not None:
        return report(options.rows, read_profile(options.profile))
    run(options.rows, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
