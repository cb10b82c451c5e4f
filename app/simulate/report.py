"""What came of the scenarios: tables for people, JSON Lines for programs. Charts are charts.py's."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.simulate.figures import METRICS, Figures, Objectives, Spread, capacity
from app.simulate.fleet_figures import FleetFigures, fleet_figures
from app.simulate.scenario import Scenario
from engine.simulation import Outcome

MOST_WIDTH = 10_000
"""Columns of a console; no table is wider."""

MOST_SHARES = 8
"""Replicas whose busy shares are all shown."""


@dataclass(frozen=True, slots=True)
class Result:
    """`kv_blocks`: by replica. `wall_seconds`: what the simulation itself took."""

    scenario: Scenario
    outcome: Outcome
    figures: Figures
    kv_blocks: tuple[int, ...]
    wall_seconds: float

    @property
    def replicas(self) -> int:
        return len(self.kv_blocks)

    @property
    def fleet(self) -> FleetFigures:
        return fleet_figures(self.outcome)

    @property
    def speed(self) -> float:
        """Virtual seconds per second."""
        return self.outcome.seconds / max(self.wall_seconds, 1e-9)


def show(results: Sequence[Result], objectives: Objectives, console: Console) -> None:
    """To a console without markup: scenarios are named by what users say."""
    console.print(latencies((result.scenario.name, result.figures.spreads) for result in results))
    print_whole(_accounts(results), console)
    if fleets := [result for result in results if result.replicas > 1]:
        print_whole(_fleets(fleets), console)
    for line in (line for result in results for line in _notes(result)):
        console.print(line, soft_wrap=True)
    if objectives != Objectives():
        for policies, rate in capacities(results).items():
            found = "below the lowest rate" if rate is None else f"{rate:g} requests/s"
            console.print(f"capacity (highest rate with ≥ 90 % attainment), {policies}: {found}")


def print_whole(table: Table, console: Console) -> None:
    """Names wrap; where even so there is no room, each row is a paragraph: a number without its end is another one."""
    first, *others = table.columns
    for column in others:
        column.no_wrap = True
    names = [str(first.header), *map(str, first.cells)]
    wide = console.measure(table, options=console.options.update(width=MOST_WIDTH)).maximum
    words = (word for name in names for word in name.split())
    if wide - max(map(len, names)) + max(map(len, words)) <= console.width:
        console.print(table)
        return
    heads = [str(column.header) for column in table.columns]
    for name, *values in zip(*(column.cells for column in table.columns), strict=True):
        told = ", ".join(f"{head} {value}" for head, value in zip(heads[1:], values, strict=True) if value)
        console.print(f"{table.title}, {name}: {told}")


def latencies(rows: Iterable[tuple[str, Mapping[str, Spread]]], first: str = "scenario") -> Table:
    """A section a run, of `first` the column's head."""
    table = Table(first, "metric", "mean", "P50", "P90", "P99", title="latencies")
    for name, spreads in rows:
        for metric, found in spreads.items():
            table.add_row(name, METRICS[metric], *(f"{value:.4g}" for value in asdict(found).values()))
        table.add_section()
    return table


def _accounts(results: Sequence[Result]) -> Table:
    heads = ("scenario", "attempted", "refused", "unfinished", "attained", "goodput/s", "tax", "preempted", "hits",
             "busy", "virtual s", "speed-up", "digest")  # fmt: skip
    table = Table(*heads, title="accounts")
    for result in results:
        found = result.figures
        table.add_row(
            result.scenario.name,
            *(f"{count:,}" for count in (found.attempted, found.refused, found.unfinished)),
            f"{found.attainment:.1%}",
            f"{found.goodput:.3g}",
            f"{found.recompute_tax:.1%}",
            f"{found.preemptions:,}",
            f"{found.hit_rate:.1%}",
            f"{found.busy:.1%}",
            f"{found.seconds:,.1f}",
            f"{result.speed:,.0f}",
            result.outcome.digest[:12],
        )
    return table


def _notes(result: Result) -> Iterable[str]:
    """A line for each reason of refusals, and for each plug-in that failed."""
    for code, times in Counter(each.refused for each in result.outcome.served if each.refused).items():
        yield f"{result.scenario.name}: {times:,} were refused, as a server does it, with {code}"
    for (family, policy), failing in result.outcome.policy_failures.items():
        yield (
            f"{result.scenario.name}: the {family} policy {policy} failed {failing.times:,} times, and the plainest "
            f"one decided instead; at first it {failing.first}"
        )


def _fleets(results: Iterable[Result]) -> Table:
    heads = ("scenario", "replicas", "busy, each", "load max/mean", "hits", "preempted", "moved live", "from snapshots",
             "failed", "stayed", "pause P50, ms", "P99")  # fmt: skip
    table = Table(*heads, title="fleets")
    for result in results:
        found = result.fleet
        pauses = (found.pauses.p50, found.pauses.p99) if found.pauses else ()
        table.add_row(
            result.scenario.name,
            str(result.replicas),
            _shares(found.busy),
            f"{found.imbalance:.3f}",
            f"{result.figures.hit_rate:.1%}",
            f"{result.figures.preemptions:,}",
            *(f"{count:,}" for count in (found.live, found.from_snapshots, found.failed, found.stayed)),
            *(f"{1e3 * seconds:.1f}" for seconds in pauses),
        )
    return table


def _shares(busy: Sequence[float]) -> str:
    """Each, of a few; of many the least and the most."""
    if len(busy) <= MOST_SHARES:
        return " ".join(f"{share:.0%}" for share in busy)
    return f"{min(busy):.0%} … {max(busy):.0%}"


def capacities(results: Iterable[Result]) -> dict[str, float | None]:
    """By policies, where rates were given."""
    return {policies: capacity(pairs) for policies, pairs in attainments(results).items()}


def attainments(results: Iterable[Result]) -> dict[str, list[tuple[float, float]]]:
    """(rate, attainment) by policies, where rates were given."""
    found: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        if result.scenario.rate is not None:
            pairs = found.setdefault(result.scenario.policies, [])
            pairs.append((result.scenario.rate, result.figures.attainment))
    return found


def write_rows(results: Sequence[Result], directory: Path, facts: dict[str, Any]) -> None:
    """`runs.jsonl` (its first line: what was run), `requests.jsonl`, `ticks.jsonl`; each row names its scenario."""
    write_lines(directory / "runs.jsonl", [facts, *(_run(result) for result in results)])
    for name in ("requests", "ticks"):
        write_lines(
            directory / f"{name}.jsonl", (row for result in results for row in _details(result, name))
        )


def _run(result: Result) -> dict[str, Any]:
    outcome = result.outcome
    return {
        "scenario": result.scenario.name,
        "settings": result.scenario.settings,
        "rate": result.scenario.rate,
        "replicas": result.replicas,
        "kv_blocks": sum(result.kv_blocks),
        **result.figures.row(),
        "fleet": result.fleet.row(),
        "steps": outcome.steps,
        "computed_tokens": outcome.computed_tokens,
        "recomputed_tokens": outcome.recomputed_tokens,
        "copied_bytes": outcome.copied_bytes,
        "policy_failures": [
            {"family": family, "policy": policy, **asdict(failing)}
            for (family, policy), failing in outcome.policy_failures.items()
        ],
        "wall_seconds": round(result.wall_seconds, 3),
        "digest": outcome.digest,
    }


def _details(result: Result, name: str) -> Iterable[dict[str, Any]]:
    those = result.outcome.served if name == "requests" else result.outcome.ticks
    return ({"scenario": result.scenario.name, **asdict(each)} for each in those)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
