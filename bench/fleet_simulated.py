"""Fleets of replicas in virtual time: every routing × rebalancing on recorded workloads, at a share of the capacity.

    python -m bench.fleet_simulated --traces DIR --rows FILE [--workloads …] [--replicas 4 8 16]   # adds rows
    python -m bench.fleet_simulated --rows FILE --report
    python -m bench.fleet_simulated --traces DIR --workloads azure --replicas 4 --pairs hybrid/none --worst 5

A cell is a workload (fleet_workloads.py), a number of replicas and a seed. Its capacity is measured first: all sessions
at once, fcfs, least load; requests per second while the middle 80 % of them end. Then each pair plays the same requests
at `--load` × that. Where lengths are a quarter of the recorded ones, so are the profile's KV pool and the host tier
that replicas share, `--host-gib` GiB for each. Blocks have 64 tokens. Pairs with size classes have limits of equal
load, by the sizes of the cell's own requests (policies/sizes.py); all others have none.

Hits: prompt tokens that some tier had; `device` those that the chosen replica's device had. Load: busy device seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from app.config_sources import load as load_config
from app.core_config import balance_config
from app.simulate.figures import Objectives, figures
from app.simulate.fleet_figures import fleet_figures
from app.simulate.playing import TraceWorkload
from app.simulate.scenario import core_config, for_block_size
from app.workload.trace import TraceRequest
from bench.fleet_report import report
from bench.fleet_workloads import CAP, CONTEXT, SCALES, WORKLOADS, at_once, chosen, timed
from bench.fleet_worst import Decisions, show_worst
from bench.policies_simulated import profile_of
from bench.report import console
from engine.fleet import FleetConfig, ReplicaConfig
from engine.profile import Profile
from engine.simulation import Outcome, Recorder, Simulation
from policies.rebalancing import REBALANCINGS
from policies.routing import ROUTINGS
from policies.sizes import SizeLimits

BLOCK_SIZE = 64
PLAIN = ("policies.order=fcfs", "policies.victim=last_admitted", "policies.resume=reload")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Cell:
    workload: str
    replicas: int
    seed: int
    requests: int
    load: float
    profile: str
    host_gib: float
    settings: tuple[str, ...] = ()  # of the configuration, for all pairs


@dataclass(frozen=True, slots=True)
class Pair:
    routing: str
    rebalancing: str

    @property
    def by_size(self) -> bool:
        return self.routing == "size_classes" or self.rebalancing == "cache_size"

    @property
    def settings(self) -> tuple[str, ...]:
        return f"policies.routing={self.routing}", f"policies.rebalancing={self.rebalancing}"


def machine_of(cell: Cell) -> Profile:
    profile = for_block_size(profile_of(cell.profile), BLOCK_SIZE)
    scale = SCALES[cell.workload]
    return replace(profile, kv_blocks=profile.kv_blocks // scale, context=CONTEXT // scale)


def play(
    cell: Cell,
    trace: Sequence[TraceRequest],
    settings: Sequence[str],
    limits: Sequence[int] = (),
    recorder: Recorder | None = None,
) -> Outcome:
    """One run."""
    profile, scale = machine_of(cell), SCALES[cell.workload]
    host = round(cell.host_gib * cell.replicas / scale * GIB)
    given = [f"engine.block_size={BLOCK_SIZE}", f"kvstore.host.bytes={host}", "engine.max_queue=1000000"]
    config = load_config([*given, *cell.settings, *settings], {}, cwd=Path("/")).config
    core = core_config(config, profile)
    replicas = tuple(ReplicaConfig(core, limit_tokens=limit) for limit in limits or (0,) * cell.replicas)
    workload = TraceWorkload(trace, core.context, cap=CAP // scale)
    return Simulation(
        FleetConfig(replicas, balance_config(config)), profile, workload, recorder=recorder, tick_seconds=1e9
    ).run()


def capacity(cell: Cell, trace: Sequence[TraceRequest]) -> float:
    """Requests per second, while the middle 80 % end."""
    outcome = play(cell, at_once(trace), (*PLAIN, *Pair("least_load", "none").settings))
    ends = sorted(served.finished for served in outcome.served if served.finished is not None)
    assert len(ends) == len(trace)
    first, last = len(ends) // 10, len(ends) * 9 // 10
    return (last - first) / (ends[last] - ends[first])


def limits_of(trace: Sequence[TraceRequest], replicas: int) -> tuple[int, ...]:
    """Of size classes that carry equal loads."""
    sizes = SizeLimits([1.0] * replicas)
    for each in trace:
        sizes.observe(each.prompt_tokens, each.output_tokens)
    return sizes.limits


def situation(cell: Cell, traces: Path) -> tuple[list[TraceRequest], float]:
    """The requests as they come, and how many a second."""
    trace = chosen(traces, cell.workload, cell.requests, cell.seed)
    rate = cell.load * capacity(cell, trace)
    return timed(cell.workload, trace, rate, cell.seed), rate


def row_of(cell: Cell, pair: Pair, rate: float, outcome: Outcome, wall: float) -> dict[str, Any]:
    found = figures(outcome, Objectives())
    assert not found.unfinished
    assert not found.refused
    ttft, tpot = found.spreads["ttft"], found.spreads["tpot"]
    fleet = fleet_figures(outcome)
    counts = outcome.counts
    return {
        "workload": cell.workload, "replicas": cell.replicas, "seed": cell.seed, "load": cell.load,
        "requests": len(outcome.served), "settings": cell.settings, "rate": rate, "routing": pair.routing,
        "rebalancing": pair.rebalancing, "ttft": ttft.mean, "ttft_p99": ttft.p99, "tpot": tpot.mean,
        "tpot_p99": tpot.p99, "normalised": found.spreads["normalised"].mean,
        "normalised_p99": found.spreads["normalised"].p99, "hits": found.hit_rate,
        "device_hits": counts.hit_tokens["device"] / max(1, counts.prefix_queries),
        "imbalance": fleet.imbalance, "busy": found.busy, "preemptions": found.preemptions,
        "tax": found.recompute_tax, "moved_live": fleet.live, "moved_snapshots": fleet.from_snapshots,
        "failed": fleet.failed, "stayed": fleet.stayed, "pause_p99": fleet.pauses.p99 if fleet.pauses else 0.0,
        "forecast_error": max(fleet.forecast_errors), "seconds": outcome.seconds, "wall": wall,
        "digest": outcome.digest[:12],
    }  # fmt: skip


def rows_of(cell: Cell, traces: Path, pairs: Sequence[Pair], worst: int = 0) -> list[dict[str, Any]]:
    """A row a pair. `worst`: so many timelines of the latest first tokens are printed."""
    trace, rate = situation(cell, traces)
    limits = limits_of(trace, cell.replicas)
    rows = []
    for pair in pairs:
        decisions = Decisions()
        begun = time.perf_counter()
        outcome = play(
            cell, trace, pair.settings, limits if pair.by_size else (), decisions if worst else None
        )
        row = row_of(cell, pair, rate, outcome, time.perf_counter() - begun)
        rows.append(row)
        console().print(
            f"{cell.workload}, {cell.replicas} replicas, seed {cell.seed}, {pair.routing}/{pair.rebalancing}: "
            f"TTFT {row['ttft']:.3f} P99 {row['ttft_p99']:.3f} s, TPOT {1e3 * row['tpot']:.2f} "
            f"P99 {1e3 * row['tpot_p99']:.2f} ms, hits {row['hits']:.1%} ({row['device_hits']:.1%} device), "
            f"load {row['imbalance']:.2f}, {row['moved_live']}+{row['moved_snapshots']} moved, "
            f"{row['preemptions']} preempted, {row['wall']:.1f} s for {row['seconds']:.0f}",
            highlight=False,
        )
        if worst:
            show_worst(outcome, decisions, worst, console())
    return rows


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> int:
    options = parsed()
    if options.report:
        report([json.loads(line) for line in options.rows.read_text().splitlines()], console())
        return 0
    for workload, replicas, seed in product(options.workloads, options.replicas, options.seeds):
        cell = Cell(
            workload, replicas, seed, max(options.requests, options.each * replicas), options.load,
            options.profile, options.host_gib, tuple(options.set),
        )  # fmt: skip
        rows = rows_of(cell, options.traces, options.pairs, options.worst)
        if options.rows:
            with options.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


def pair(text: str) -> Pair:
    """`routing/rebalancing`. Raises ArgumentTypeError."""
    routing, _, rebalancing = text.partition("/")
    if routing not in ROUTINGS or rebalancing not in REBALANCINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is no routing/rebalancing")
    return Pair(routing, rebalancing)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fleet_simulated",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--traces", type=Path, help="the directory of the recorded traces")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--requests", type=int, default=1600, help="of a cell, at least")
    parser.add_argument("--each", type=int, default=300, help="requests a replica, at least")
    parser.add_argument("--load", type=float, default=0.85, help="of the capacity")
    parser.add_argument("--profile", default="h200-8b")
    parser.add_argument("--host-gib", type=float, default=16.0, help="of the host tier, for each replica")
    parser.add_argument(
        "--pairs",
        type=pair,
        nargs="+",
        default=[Pair(*names) for names in product(ROUTINGS, REBALANCINGS)],
        help="routing/rebalancing",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all pairs")
    parser.add_argument("--rows", type=Path, help="where rows are added (JSON Lines)")
    parser.add_argument("--worst", type=int, default=0, help="timelines of so many requests a run")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not (options.traces or (options.report and options.rows)):
        parser.error("--traces, or --rows with --report")
    return options


if __name__ == "__main__":
    sys.exit(main())
