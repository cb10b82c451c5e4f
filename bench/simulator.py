"""The simulator against a recorded engine: the same requests, the card's own operator tables. How far is it off?

    python -m bench.simulator --recordings DIR [--rows FILE]
    python -m bench.simulator --crowd      # only how fast it is with 256 requests running

DIR holds one recording as docs/simulation.md describes it (requests, ticks, operator tables, meta). Against the live
engine on this machine: bench/simulator_live.py. The recorded engine is vLLM, the simulated one is ours with vLLM's
settings (fcfs, last_admitted, recompute): part of the difference is that of the two schedulers.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from app.config import Config
from app.profiling.operator_tables import only, read_tables
from app.simulate.command import PROFILES
from app.simulate.figures import latencies, percentile
from app.simulate.playing import TraceWorkload
from app.simulate.scenario import core_config
from app.workload.reading import parsed
from app.workload.reading import rows as rows_of
from app.workload.trace import TraceRequest, in_order
from bench.report import console
from engine.core import CoreConfig
from engine.fleet import FleetConfig
from engine.profile import Profile, read_profile
from engine.simulation import Outcome, Served, Simulation

GOALS = {"mean": 0.05, "p99": 0.10}
SETTINGS: dict[str, Any] = {
    "engine": {"max_queue": 100_000},
    "kvstore": {"host": {"bytes": 0}},
    "policies": {
        "order": "fcfs",
        "victim": "last_admitted",
        "resume": "recompute",
        "admission": {"risk": 1.0},  # nothing is foreseen: who fits now is taken in
    },
}
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request as the recorded engine served it. Seconds from the first arrival."""

    request: TraceRequest
    first_token: float
    last_token: float

    @property
    def served(self) -> Served:
        each = self.request
        return Served(
            number=each.number,
            arrived=each.arrival,
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
            first_token=self.first_token,
            finished=self.last_token,
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """`error`: simulated ÷ recorded − 1."""

    metric: str
    statistic: str
    recorded: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.recorded - 1

    @property
    def missed(self) -> bool:
        return abs(self.error) > GOALS.get(self.statistic, float("inf"))


def read_requests(directory: Path) -> list[Recorded]:
    """Raises ProfileError, TraceError."""
    path = only(directory, "*_requests.csv.gz")
    columns = ("request", "input_tokens", "output_tokens", "arrival_s", "first_token_s", "last_token_s")
    return list(parsed(path, rows_of(path, columns), _recorded))


def _recorded(row: Mapping[str, str]) -> Recorded:
    request = TraceRequest(
        number=int(row["request"]),
        session=row["request"],
        arrival=float(row["arrival_s"]),
        prompt_tokens=int(row["input_tokens"]),
        output_tokens=int(row["output_tokens"]),
    )
    return Recorded(request, float(row["first_token_s"]), float(row["last_token_s"]))


def read_ticks(directory: Path) -> list[dict[str, float]]:
    path = only(directory, "*_ticks.csv.gz")
    names = ("t", "running", "waiting", "kv_cache_pct")
    return list(parsed(path, rows_of(path, names), lambda row: {name: float(row[name]) for name in names}))


def engine_of(directory: Path, profile: Profile) -> CoreConfig:
    """Our core with the recorded engine's limits and policies."""
    told = json.loads(only(directory, "*_meta.json").read_text())["engine_kwargs"]
    engine = SETTINGS["engine"] | {
        "block_size": profile.block_size,
        "kv_blocks": profile.kv_blocks,
        "max_batch_tokens": told["max_num_batched_tokens"],
        "max_sequences": told["max_num_seqs"],
    }
    return core_config(Config.model_validate(SETTINGS | {"engine": engine}), profile)


def compare(recorded: Iterable[Served], simulated: Iterable[Served]) -> list[Comparison]:
    """By metric and statistic."""
    ours, theirs = _values(simulated), _values(recorded)
    return [
        Comparison(
            metric, statistic, _statistic(theirs[metric], statistic), _statistic(ours[metric], statistic)
        )
        for metric in ("ttft", "tpot", "e2e")
        for statistic in ("mean", "p50", "p90", "p99")
    ]


def _values(those: Iterable[Served]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for served in those:
        for name, value in (latencies(served) or {}).items():
            found.setdefault(name, []).append(value)
    return found


def _statistic(values: Sequence[float], name: str) -> float:
    return fmean(values) if name == "mean" else percentile(sorted(values), int(name[1:]) / 100)


def compare_ticks(recorded: Sequence[Mapping[str, float]], outcome: Outcome, blocks: int) -> list[Comparison]:
    """Means over the seconds that both have."""
    pairs = list(zip(recorded, outcome.ticks, strict=False))
    ours = {
        "running": [float(tick.running) for _, tick in pairs],
        "waiting": [float(tick.waiting) for _, tick in pairs],
        "kv_cache_pct": [100 * tick.kv_used_blocks / blocks for _, tick in pairs],
    }
    return [
        Comparison(name, "mean", fmean(tick[name] for tick, _ in pairs), fmean(values))
        for name, values in ours.items()
    ]


def table(title: str, comparisons: Iterable[Comparison]) -> Table:
    found = Table("metric", "statistic", "recorded", "simulated", "error", title=title)
    for each in comparisons:
        mark = "!" if each.missed else ""
        found.add_row(
            each.metric,
            each.statistic,
            f"{each.recorded:.4g}",
            f"{each.simulated:.4g}",
            f"{each.error:+.1%}{mark}",
        )
    return found


def simulate(directory: Path) -> tuple[Outcome, list[float], int]:
    """The outcome, seconds that each repeat took, and the pool's blocks."""
    profile = read_tables(directory)
    core = engine_of(directory, profile)
    trace = in_order(each.request for each in read_requests(directory))
    took, outcome = [], Outcome()
    for _ in range(REPEATS):
        begun = time.perf_counter()
        workload = TraceWorkload(trace, core.context, lengths_known=True)
        outcome = Simulation(FleetConfig.of(core), profile, workload).run()
        took.append(time.perf_counter() - begun)
    return outcome, took, core.scheduler.blocks


def crowd() -> str:
    """256 running on the shipped profile, 1,000 tokens in and 300 out: how many times faster than real time."""
    profile = read_profile(PROFILES / "h200-8b.json")
    config = Config.model_validate(SETTINGS | {"engine": {"max_sequences": 256, "max_queue": 100_000}})
    core = core_config(config, profile)
    trace = [TraceRequest(number, str(number), 0.0, 1000, 300) for number in range(768)]
    begun = time.perf_counter()
    simulation = Simulation(
        FleetConfig.of(core), profile, TraceWorkload(trace, core.context), tick_seconds=0.1
    )
    outcome = simulation.run()
    took = time.perf_counter() - begun
    running = median(tick.running for tick in outcome.ticks)
    return (
        f"{running:.0f} running (median): {outcome.steps} steps, {outcome.seconds:.1f} virtual s in {took:.2f} s: "
        f"{outcome.seconds / took:.1f} x real time"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.simulator", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recordings", type=Path, metavar="DIR")
    what.add_argument("--crowd", action="store_true")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="for the figures (JSON Lines)")
    options = parser.parse_args()
    if options.crowd:
        console().print(crowd())
        return 0
    return recorded(options.recordings, options.rows)


def recorded(directory: Path, file: Path | None) -> int:
    """Exit code 1 when a goal is missed."""
    outcome, took, blocks = simulate(directory)
    requests = compare((each.served for each in read_requests(directory)), outcome.served)
    ticks = compare_ticks(read_ticks(directory), outcome, blocks)
    to = console()
    to.print(table("requests (seconds)", requests))
    to.print(table("ticks", ticks))
    tax = outcome.recomputed_tokens / outcome.computed_tokens
    to.print(
        f"{outcome.counts.preemptions} preemptions, recompute tax {tax:.1%}, {outcome.steps} steps; "
        f"{outcome.seconds:.1f} virtual s in {min(took):.2f} s: {outcome.seconds / min(took):.0f} x real time; "
        f"digest {outcome.digest[:12]}"
    )
    if file:
        rows = (json.dumps(asdict(each) | {"error": each.error}) for each in (*requests, *ticks))
        file.write_text("".join(f"{row}\n" for row in rows))
    return int(any(each.missed for each in (*requests, *ticks)))


if __name__ == "__main__":
    sys.exit(main())
