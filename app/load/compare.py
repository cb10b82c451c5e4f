"""Two servers under the same load: the second's figures over the first's, by rate, medians over repeats."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from rich.table import Table

from app.load.figures import Figures
from app.load.report import Result
from app.simulate.figures import METRICS, Spread

Measure = Callable[[Figures], float | None]
SHARES = ("mean", "p50", "p99")


def _spread(metric: str, share: str) -> Measure:
    def measure(figures: Figures) -> float | None:
        found: Spread | None = figures.spreads.get(metric)
        return None if found is None else float(getattr(found, share))

    return measure


MEASURES: dict[str, Measure] = {
    **{f"{METRICS[metric]}, {share}": _spread(metric, share) for metric in METRICS for share in SHARES},
    "answered ÷ attempted": lambda figures: figures.answered / max(1, figures.attempted),
    "attainment": lambda figures: figures.attainment,
    "goodput, 1/s": lambda figures: figures.goodput,
    "output tokens/s": lambda figures: figures.output_tokens_per_second,
}


def ratios(results: Sequence[Result], a: str, b: str) -> Table:
    """A line a rate and measure; a measure that a side has not is left out."""
    table = Table("rate", "measure", "A", "B", "B ÷ A", title="B over A", caption=f"A: {a}   B: {b}")
    for rate in dict.fromkeys(result.rate for result in results):
        sides = [
            [each.figures for each in results if (each.server, each.rate) == (name, rate)] for name in (a, b)
        ]
        for measure, of in MEASURES.items():
            values = [_median(map(of, side)) for side in sides]
            if values[0] is not None and values[1] is not None:
                table.add_row("-" if rate is None else f"{rate:g}", measure, *_cells(values[0], values[1]))
        table.add_section()
    return table


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return median(found) if found else None


def _cells(a: float, b: float) -> tuple[str, str, str]:
    return f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}" if a else "-"
