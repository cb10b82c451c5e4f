"""Charts of simulated runs, as PNG; app/load/charts.py draws live ones with the same.

matplotlib is optional (the extra `charts`) and imported in these two alone.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.simulate.figures import METRICS, WANTED_ATTAINMENT, Spread, capacity
from app.simulate.report import Result, attainments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("ttft", "tpot", "normalised")
PERCENTILES = ("p50", "p90", "p99")
MOST_TIMELINES = 12
MOST_NAMED = 8
"""Replicas in a legend."""

NAMES_LENGTH, NAMES_INCHES = 45, 0.08
"""Longer names of runs than that make a figure wider, by so much a letter: panels need their room."""

MAGNITUDES = 30
"""Largest ÷ smallest value, from which on an axis is logarithmic."""

MANY_MAGNITUDES = 1000
"""From which on such an axis has powers of ten alone; below, three times these as well."""

MOST_TICKS = 4
"""On an axis of a panel: labels of small seconds are long."""


class NoCharts(Exception):
    """matplotlib is not installed."""


def draw(results: Sequence[Result], directory: Path) -> list[Path]:
    """Draws what the results allow, and returns the files; those of earlier results are deleted. Raises NoCharts."""
    for name in ("latency.png", "capacity.png", "timeline-[0-9][0-9].png"):
        for path in directory.glob(name):
            path.unlink()
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoCharts("charts need matplotlib: pip install 'sluice[charts]'") from error
    spreads = [(result.scenario.name, result.figures.spreads) for result in results]
    drawn = [save(percentiles(Figure, spreads, SHOWN), directory / "latency.png")]
    if len({result.scenario.rate for result in results}) > 1:
        drawn.append(save(attainment(Figure, attainments(results)), directory / "capacity.png"))
    for index, result in enumerate(results[:MOST_TIMELINES]):
        drawn.append(save(_timeline(Figure, result), directory / f"timeline-{index + 1:02}.png"))
    return drawn


def save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def percentiles(
    kind: "type[Figure]", rows: Sequence[tuple[str, Mapping[str, Spread]]], metrics: Sequence[str]
) -> "Figure":
    """A panel a metric, a row of dots a run: P50, P90 and P99 on one line."""
    names = [name for name, _ in rows]
    width = 12 + NAMES_INCHES * max(0, max(map(len, names)) - NAMES_LENGTH)
    figure = kind(figsize=(width, 1.4 + 0.34 * len(rows)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(metrics), sharey=True)
    for panel, metric in zip(panels, metrics, strict=True):
        spreads = [found.get(metric) for _, found in rows]
        for row, spread in enumerate(spreads):
            if spread is not None:
                panel.plot([spread.p50, spread.p99], [row, row], color="0.8", linewidth=3, zorder=1)
        for name, color in zip(PERCENTILES, ("tab:green", "tab:orange", "tab:red"), strict=True):
            points = [(getattr(each, name), row) for row, each in enumerate(spreads) if each is not None]
            if points:  # a run in which nothing was answered has none
                panel.scatter(*zip(*points, strict=True), color=color, label=name.upper(), zorder=2)
        panel.set_xlabel(METRICS[metric])
        panel.grid(axis="x", which="both", alpha=0.3)
        _scale(panel, [value for each in spreads if each for value in (each.p50, each.p99)])
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(
        *panels[-1].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize="small"
    )
    return figure


def _scale(panel: "Axes", values: Sequence[float]) -> None:
    """Logarithmic where values are of different magnitudes, else from 0 on."""
    from matplotlib.ticker import LogLocator

    if values and max(values) > MAGNITUDES * min(values) > 0:
        panel.set_xscale("log")
        few = max(values) < MANY_MAGNITUDES * min(values)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3) if few else (1,)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")  # labels between these lie over each other
    else:
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", nbins=MOST_TICKS)


def attainment(kind: "type[Figure]", lines: Mapping[str, Sequence[tuple[float, float]]]) -> "Figure":
    """Attainment over the rate, a line for each key; a dotted line down where its capacity ends."""
    figure = kind(figsize=(8, 5), layout="constrained")
    axes: Axes = figure.subplots()
    for marker, (name, pairs) in zip(cycle("os^Dvx"), lines.items(), strict=False):
        line, rate = sorted(pairs), capacity(pairs)
        label = f"{name} (capacity {_named(rate, line[-1][0])})"
        (drawn,) = axes.plot(*zip(*line, strict=True), marker=marker, alpha=0.7, label=label)
        if rate is not None:
            axes.vlines(rate, 0, WANTED_ATTAINMENT, color=drawn.get_color(), linestyle=":")
    axes.axhline(WANTED_ATTAINMENT, color="0.5", linewidth=1)
    axes.set(xlabel="requests per second", ylabel="share that met its objectives", ylim=(0, 1.03))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def _named(rate: float | None, highest: float) -> str:
    """Where even the highest rate is met, capacity is that or more."""
    if rate is None:
        return "below all rates"
    return f"{'≥ ' if rate == highest else ''}{rate:g}/s"


def _timeline(kind: "type[Figure]", result: Result) -> "Figure":
    """Running and waiting over time, how full the KV pools are, and what each of several replicas has to do."""
    ticks = result.outcome.ticks
    fleet = result.replicas > 1
    figure = kind(figsize=(10, 7 if fleet else 5), layout="constrained")
    ratios = (2, 1, 2) if fleet else (2, 1)
    panels: Sequence[Axes] = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    counts, share = panels[:2]
    times = [tick.time for tick in ticks]
    counts.plot(times, [tick.running for tick in ticks], label="running", color="tab:blue")
    counts.plot(times, [tick.waiting for tick in ticks], label="waiting", color="tab:orange")
    counts.set(ylabel="requests", title=result.scenario.name)
    counts.set_ylim(bottom=0)
    counts.legend(loc="upper right", fontsize="small")
    blocks = sum(result.kv_blocks)
    full: list[Any] = [100 * tick.kv_used_blocks / blocks for tick in ticks]
    share.fill_between(times, full, color="tab:green", alpha=0.4)
    share.set(ylabel="KV held, %", ylim=(0, 101))
    if fleet:
        for replica in range(result.replicas):
            panels[2].plot(times, [tick.loads[replica] for tick in ticks], linewidth=1, label=f"{replica}")
        panels[2].set(ylabel="load by replica, s")
        panels[2].set_ylim(bottom=0)
        if result.replicas <= MOST_NAMED:
            panels[2].legend(loc="upper right", fontsize="x-small", ncols=4)
    panels[-1].set_xlabel("virtual seconds")
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure
