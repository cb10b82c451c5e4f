"""Charts of live runs, as PNG: what simulated runs have too, and a timeline each. Needs the extra `charts`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.load.report import Result, attainments
from app.simulate.charts import MOST_TIMELINES, NoCharts, attainment, percentiles, save
from app.simulate.figures import Objectives

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("ttft", "tpot", "itl", "e2e")


def draw(results: Sequence[Result], objectives: Objectives, directory: Path) -> list[Path]:
    """Draws what the results allow, and returns the files. Raises NoCharts."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoCharts("charts need matplotlib: pip install 'sluice[charts]'") from error
    rows = [(result.name, result.figures.spreads) for result in results]
    drawn = [save(percentiles(Figure, rows, SHOWN), directory / "latency.png")]
    if len({result.rate for result in results}) > 1 and objectives != Objectives():
        drawn.append(save(attainment(Figure, attainments(results)), directory / "capacity.png"))
    for index, result in enumerate(results[:MOST_TIMELINES]):
        drawn.append(save(_timeline(Figure, result), directory / f"timeline-{index + 1:02}.png"))
    return drawn


def _timeline(kind: "type[Figure]", result: Result) -> "Figure":
    """Requests under way over time, and below them when each first token came, by how long it took."""
    figure = kind(figsize=(10, 5), layout="constrained")
    running, first = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    times, counts = _under_way(result)
    running.step(times, counts, where="post", color="tab:blue")
    running.set(ylabel="requests under way", title=result.name)
    running.set_ylim(bottom=0)
    good = [sample for sample in result.samples if not sample.error]
    points = [(sample.due, sample.times[0] - sample.due) for sample in good]
    lost = [sample.due for sample in result.samples if sample.error]
    first.scatter([due for due, _ in points], [ttft for _, ttft in points], s=12, label="answered")
    if lost:
        first.scatter(lost, [0.0] * len(lost), s=24, marker="x", color="tab:red", label="not answered")
    first.set(ylabel="time to first token, s", xlabel="due, seconds from the beginning")
    first.set_ylim(bottom=0)
    first.legend(loc="upper right", fontsize="small")
    for axes in (running, first):
        axes.grid(alpha=0.3)
    return figure


def _under_way(result: Result) -> tuple[list[float], list[int]]:
    """From when a request was due to its last chunk; of one without chunks nothing is known but its beginning."""
    changes = sorted(
        change
        for sample in result.samples
        if sample.times
        for change in ((sample.due, 1), (sample.times[-1], -1))
    )
    times, counts, now = [0.0], [0], 0
    for at, by in changes:
        now += by
        times.append(at)
        counts.append(now)
    return times, counts
