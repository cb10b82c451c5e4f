"""Rows of bench/fleet_simulated.py to tables and the goals of design §9: medians over seeds."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
OURS = ("hybrid", "load_pairs")
BEATEN = ("round_robin", "least_load")
HEADS = (
    "routing", "rebalancing", "TTFT", "P99", "TPOT", "P99", "hits", "device", "load", "preempted", "live", "kept",
    "failed", "pause P99",
)  # fmt: skip


def middle(rows: Sequence[Row], key: str) -> float:
    found: float = median(row[key] for row in rows)
    return found


def report(rows: Iterable[Row], to: Console) -> None:
    cells: dict[tuple[str, int], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["workload"], row["replicas"]][row["routing"], row["rebalancing"]].append(row)
    for (workload, replicas), pairs in cells.items():
        some = next(iter(pairs.values()))
        table = Table(
            *HEADS,
            title=f"{workload}, {replicas} replicas, {middle(some, 'requests'):.0f} requests, "
            f"{middle(some, 'rate'):.1f}/s, {len(some)} seeds: ms; load: most ÷ mean busy seconds",
        )
        for (routing, rebalancing), those in sorted(pairs.items(), key=lambda p: middle(p[1], "ttft_p99")):
            table.add_row(
                routing, rebalancing,
                *(f"{1e3 * middle(those, key):.4g}" for key in ("ttft", "ttft_p99", "tpot", "tpot_p99")),
                f"{middle(those, 'hits'):.1%}", f"{middle(those, 'device_hits'):.1%}",
                f"{middle(those, 'imbalance'):.3f}", f"{middle(those, 'preemptions'):.0f}",
                *(f"{middle(those, key):.0f}" for key in ("moved_live", "moved_snapshots", "failed")),
                f"{1e3 * middle(those, 'pause_p99'):.1f}",
            )  # fmt: skip
        to.print(table)
        if OURS in pairs:
            to.print(*goals(pairs), sep="\n")


def goals(pairs: Mapping[tuple[str, str], Sequence[Row]]) -> list[str]:
    """A line a goal."""
    ours = pairs[OURS]
    lines = []
    for name in BEATEN:
        if theirs := pairs.get((name, "none")):
            times = middle(theirs, "ttft_p99") / middle(ours, "ttft_p99")
            lines.append(f"P99 TTFT of {name} ÷ ours: {times:.2f}{'' if times >= 2 else ' (goal: 2)'}")
    if aware := pairs.get(("cache_aware", "none")):
        hits = middle(ours, "hits"), middle(aware, "hits")
        missed = " (goal: within 5 %)" if hits[0] < 0.95 * hits[1] else ""
        lines.append(f"hits: {hits[0]:.1%}, of cache_aware {hits[1]:.1%}{missed}")
    for key, name in (
        ("ttft", "mean TTFT"),
        ("ttft_p99", "P99 TTFT"),
        ("tpot", "mean TPOT"),
        ("tpot_p99", "P99 TPOT"),
    ):
        others = {pair: middle(rows, key) for pair, rows in pairs.items() if pair[0] != OURS[0]}
        best = min(others, key=others.__getitem__, default=None)
        if best is not None:
            worse = middle(ours, key) / max(others[best], 1e-9)
            missed = " (goal: ≤ 1.05)" if worse > 1.05 else ""
            lines.append(f"{name} ÷ that of the best other, {'/'.join(best)}: {worse:.2f}{missed}")
    return lines
