"""Two tenants in virtual time, of whom one sends ten times as much: what becomes of the other, by order.

    python -m bench.tenants_simulated --trace FILE [--profile epyc2-tales] [--rows FILE]

The requests are those of bench/policies_simulated.py; every eleventh is the modest tenant's. Slowdown: a request's
seconds over those it takes when its tenant's requests are all that there are. Jain's index is over the two tenants'
1 ÷ mean slowdown, the part that each has of the speed it would have alone: 1 where both lose as much by the other,
0.5 where one loses all. Medians over seeds.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from app.simulate.figures import Objectives, percentile
from app.workload.trace import TraceRequest
from bench.policies_simulated import Cell, Workload, blocks_of, play, situation
from bench.report import console
from engine.simulation import Served

TIMES = 10
GREEDY, MODEST = "greedy", "modest"
ORDERS = ("hybrid", "fcfs", "fair", "sjf", "mlq", "cache_aware")


def tenants(trace: Iterable[TraceRequest]) -> dict[int, str]:
    """Every eleventh arrival is the modest one's."""
    return {each.number: GREEDY if index % (TIMES + 1) else MODEST for index, each in enumerate(trace)}


def jain(shares: Sequence[float]) -> float:
    """(Σx)² ÷ n Σx². Source: Jain, Chiu and Hawe, 1984."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def seconds(served: Iterable[Served]) -> dict[int, float]:
    """End to end, by number."""
    return {each.number: (each.finished or 0.0) - each.arrived for each in served}


def rows_of(cell: Cell, orders: Iterable[str]) -> list[dict[str, Any]]:
    """A row an order."""
    trace, _, demand = situation(cell)
    blocks = blocks_of(cell, trace, cell.shares[0], demand)
    whose = tenants(trace)
    alone: dict[int, float] = {}
    for tenant in (GREEDY, MODEST):
        outcome, _ = play(cell, [each for each in trace if whose[each.number] == tenant], {}, blocks)
        alone.update(seconds(outcome.served))
    return [
        {"order": order, "seed": cell.seed, "load": cell.load, "share": cell.shares[0]}
        | _row(cell, trace, order, blocks, whose, alone)
        for order in orders
    ]


def _row(
    cell: Cell,
    trace: Sequence[TraceRequest],
    order: str,
    blocks: int,
    whose: Mapping[int, str],
    alone: Mapping[int, float],
) -> dict[str, Any]:
    outcome, _ = play(cell, trace, {"order": order}, blocks, tenants=whose)
    took = seconds(outcome.served)
    slowdowns = {
        tenant: sorted(took[number] / alone[number] for number in took if whose[number] == tenant)
        for tenant in (GREEDY, MODEST)
    }
    means = {tenant: fmean(those) for tenant, those in slowdowns.items()}
    return {
        "slowdown": means[MODEST],
        "slowdown_p99": percentile(slowdowns[MODEST], 0.99),
        "greedy": means[GREEDY],
        "jain": jain([1 / mean for mean in means.values()]),
        "mean": fmean(took[each.number] / each.output_tokens for each in outcome.served),
        "preemptions": outcome.counts.preemptions,
    }


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        "order", "modest: slowdown", "P99", "greedy: slowdown", "Jain's index", "mean, ms/token", "preempted"
    )
    for order in dict.fromkeys(row["order"] for row in rows):
        those = [row for row in rows if row["order"] == order]
        middle = {
            key: median(row[key] for row in those)
            for key in ("slowdown", "slowdown_p99", "greedy", "jain", "mean", "preemptions")
        }
        table.add_row(
            order, f"{middle['slowdown']:.2f}", f"{middle['slowdown_p99']:.2f}",
            f"{middle['greedy']:.2f}", f"{middle['jain']:.3f}", f"{1e3 * middle['mean']:.2f}",
            f"{middle['preemptions']:.0f}",
        )  # fmt: skip
    console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tenants_simulated", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--profile", default="epyc2-tales")
    parser.add_argument("--requests", type=int, default=330)
    parser.add_argument("--load", type=float, default=1.0, help="of the capacity")
    parser.add_argument("--share", type=float, default=0.4, help="of the demand, as KV blocks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--orders", nargs="+", default=list(ORDERS))
    parser.add_argument("--rows", type=Path, help="where rows are written (JSON Lines)")
    options = parser.parse_args()
    workload = Workload(options.trace, options.requests, 16, 4, 512, 2048)
    cell = Cell(workload, options.profile, options.load, (options.share,), 0, {}, 64, Objectives())
    rows = [row for seed in options.seeds for row in rows_of(replace(cell, seed=seed), options.orders)]
    report(rows)
    if options.rows:
        options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
