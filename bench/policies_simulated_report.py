"""Rows of bench/policies_simulated.py to a table and a chart: medians over the seeds, ratios to ours."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
Place = tuple[str, str, float, float]  # trace, profile, load, share


def grouped(rows: Iterable[Row]) -> dict[Place, dict[str, list[Row]]]:
    """By cell and system, each in the order of the rows."""
    found: dict[Place, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["trace"], row["profile"], row["load"], row["share"]][row["system"]].append(row)
    return found


def middle(rows: Sequence[Row], key: str) -> float:
    found: float = median(row[key] for row in rows)
    return found


def ratio(rows: Sequence[Row], ours: Sequence[Row], key: str) -> float:
    """The median over seeds of theirs ÷ ours: on the same requests, so that what a seed draws is not in it."""
    by_seed = {row["seed"]: row[key] for row in ours}
    found: float = median(row[key] / by_seed[row["seed"]] for row in rows)
    return found


def report(rows: Iterable[Row], to: Console) -> None:
    """A table a trace and profile; figures are medians over seeds, ratios (in brackets) medians of theirs ÷ ours."""
    tables: dict[tuple[str, str], Table] = {}
    for (trace, profile, load, share), systems in grouped(rows).items():
        title = f"{trace}, {profile}: ms per output token, in brackets ÷ ours"
        heads = (
            "load",
            "KV",
            "system",
            "seeds",
            "tax",
            "preempted",
            "mean",
            "P99",
            "TTFT",
            "TTFT P99",
            "attained",
        )
        table = tables.setdefault((trace, profile), Table(*heads, title=title))
        for name, those in systems.items():
            ours = systems.get("ours", those)
            latency = (
                f"{1e3 * middle(those, key):.4g} ({ratio(those, ours, key):.2f})"
                for key in ("mean", "p99", "ttft", "ttft_p99")
            )
            table.add_row(
                f"{load:g}", f"{share:g}", name, str(len(those)), f"{middle(those, 'tax'):.2%}",
                f"{middle(those, 'preemptions'):.0f}", *latency, f"{middle(those, 'attainment'):.0%}",
            )  # fmt: skip
        table.add_section()
    for table in tables.values():
        to.print(table)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Mean and P99 over the KV share, a column a load, a line a system; medians over seeds. Needs matplotlib."""
    from matplotlib.figure import Figure

    cells = grouped(rows)
    pages = sorted({(trace, profile, load) for trace, profile, load, _ in cells})
    figure = Figure(figsize=(3.2 * len(pages), 6), layout="constrained")
    panels = figure.subplots(2, len(pages), squeeze=False, sharex=True)
    for column, page in enumerate(pages):
        shares = sorted({place[3] for place in cells if place[:3] == page})
        for line, key in enumerate(("mean", "p99")):
            for name in cells[(*page, shares[0])]:
                values = [1e3 * middle(cells[(*page, share)][name], key) for share in shares]
                panels[line][column].plot(shares, values, marker="o", label=name)
            panels[line][column].set(yscale="log", ylabel=f"{key}, ms per output token")
            panels[line][column].grid(alpha=0.3, which="both")
        panels[0][column].set_title(f"{page[0].split('.')[0]}\n{page[1]}, load {page[2]:g}", fontsize="small")
        panels[1][column].set_xlabel("KV blocks ÷ demand")
    panels[0][0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
