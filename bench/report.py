"""Raw rows to tables: medians and ratios. `python -m bench.report ROWS.jsonl …` prints them again."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import ratio

OURS = "sluice"
LIMIT = "limit"
PEERS = (OURS, "vllm", "generate", "cb", LIMIT)
GOALS = {"vllm": 1.5, "generate": 2.0, "cb": 4.0, LIMIT: 0.5}
"""Of decode at 8 and 32 streams, ours ÷ theirs; the limit at any number. Prefill: as fast as vLLM."""
DISTURBED_CORES = 0.15
FILE_WIDTH = 150

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One a model and dtype, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[Path(row["model"]).name, row["dtype"]].append(row)
    return [_table(f"{model}, {dtype}: median tokens/s", group) for (model, dtype), group in groups.items()]


def _table(title: str, rows: Iterable[Row]) -> Table:
    cells: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["kind"], row["streams"], row["context"]].append(row)
    table = Table(
        "kind",
        "streams",
        "context",
        *PEERS,
        title=title,
        caption="the ratios are sluice ÷ peer; ! misses its goal",
    )
    for name in PEERS[1:]:
        table.add_column(f"÷ {name}", justify="right")
    table.add_column("agree", justify="right")
    table.add_column("others", justify="right")
    for key in sorted(cells, key=lambda key: (key[0] != "prefill", *key[1:])):
        table.add_row(*map(str, key), *_figures(key, cells[key]))
    return table


def _figures(key: tuple[str, int, int], rows: Sequence[Row]) -> list[str]:
    rates = {name: [row["tokens_per_second"] for row in rows if row["peer"] == name] for name in PEERS}
    speeds = [f"{median(rate):,.0f}" if rate else "-" for rate in rates.values()]
    ratios = [_ratio(key, name, ratio(rates[OURS], rates[name])) for name in PEERS[1:]]
    agrees = [row["agrees"] for row in rows if row.get("agrees") is not None]
    others = [row["others_cores"] for row in rows if "others_cores" in row]
    shares = (f"{min(agrees):.0%}" if agrees else "-", f"{median(others):.2f}" if others else "-")
    return [*speeds, *ratios, *shares]


def _ratio(key: tuple[str, int, int], peer: str, figure: float | None) -> str:
    if figure is None:
        return "-"
    goal = goal_of(key[0], key[1], peer)
    return f"{figure:.2f}" + ("!" if goal is not None and figure < goal else "")


def goal_of(kind: str, streams: int, peer: str) -> float | None:
    """The least ratio wanted of a cell, if one is."""
    if kind == "prefill":
        return 1.0 if peer == "vllm" else None
    return GOALS[peer] if streams > 1 or peer == LIMIT else None


def disturbed(rows: Iterable[Row]) -> int:
    """Rows in which other processes used more of the machine than they should have."""
    return sum(row.get("others_cores", 0.0) > DISTURBED_CORES for row in rows)


def console() -> Console:
    """Wide enough for the tables where there is no terminal to ask."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def show(rows: Sequence[Row], to: Console) -> None:
    """The tables, and a warning when the machine was not ours."""
    for table in tables(rows):
        to.print(table)
    if count := disturbed(rows):
        timed = sum("others_cores" in row for row in rows)
        to.print(
            f"{count} of {timed} rows shared the machine: others used > {DISTURBED_CORES} cores meanwhile."
        )


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows that are figures; a file's first line describes the machine."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [line for line in lines if "tokens_per_second" in line]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="+", type=Path)
    show(read(parser.parse_args().rows), console())


if __name__ == "__main__":
    main()
