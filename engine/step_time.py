"""How long a step takes, from the shape of its plan: pure arithmetic over measured curves or tables.

Two models. `CurveTime` adds curves and coefficients, as fitted by `sluice bench profile`, or written down from a card's
public figures. `TableTime` interpolates per-operator latencies (profiles of other engines come so). Neither knows of
interference: copies beside a step, a slow neighbour, clocks that change. Files that hold them: profile.py.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from engine.plan import Plan

Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Of a profile: seconds, or what they depend on."""


def _curve(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Raises ValueError, which pydantic tells with the place."""
    if any(x0 >= x1 for (x0, _), (x1, _) in pairwise(points)):
        raise ValueError("x must rise from point to point")
    if len(points) > 1 and points[-1][1] < points[-2][1]:
        raise ValueError("the last piece falls, so that the curve is below 0 further on")
    return points


Points = Annotated[tuple[tuple[Number, Number], ...], Field(min_length=1), AfterValidator(_curve)]
"""A piecewise linear curve: (x, y), x rising; its last piece does not fall."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a plan decides its time. A row of one token counts as decode, whatever it is for."""

    tokens: int = 0
    samples: int = 0  # rows that draw a token
    decode_rows: int = 0
    decode_context: int = 0  # Σ positions that decode rows attend to
    prefill_rows: int = 0
    prefill_tokens: int = 0
    prefill_before: int = 0  # Σ tokens × positions before their row: mean context, weighted by tokens
    prefill_pairs: float = 0.0  # Σ (token, position it attends to)

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows


Timer = Callable[[Shape], float]
"""Seconds of a step."""


def shape(plan: Plan) -> Shape:
    tokens = samples = decode_rows = decode_context = prefill_rows = prefill_tokens = before = 0
    pairs = 0.0
    for row in plan.rows:
        count, start = len(row.tokens), row.start
        tokens += count
        samples += row.samples
        if count == 1:
            decode_rows += 1
            decode_context += start + 1
        else:
            prefill_rows += 1
            prefill_tokens += count
            before += count * start
            pairs += count * (start + (count + 1) / 2)
    return Shape(tokens, samples, decode_rows, decode_context, prefill_rows, prefill_tokens, before, pairs)


def on_curve(points: Sequence[tuple[float, float]], x: float) -> float:
    """The curve at x: before its first point that point's value, beyond its last as the last piece goes on."""
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    index = min(bisect_right(points, x, key=lambda point: point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class CurveTime:
    """All in seconds. Σ of: dense layers by tokens, head and sampler by rows that sample, attention, rows."""

    dense: Points  # a step with so many tokens, whatever it costs besides (launches, Python)
    head: Points  # (0, 0) first: a step may sample nothing
    kind: Literal["curves"] = "curves"
    decode_row: Number = 0.0
    decode_position: Number = 0.0  # per position that a decode row attends to
    prefill_row: Number = 0.0
    prefill_pair: Number = 0.0  # per (token, position) of prefill rows

    def timer(self) -> Timer:
        return self._seconds

    def _seconds(self, step: Shape) -> float:
        return (
            on_curve(self.dense, step.tokens)
            + on_curve(self.head, step.samples)
            + self.decode_row * step.decode_rows
            + self.decode_position * step.decode_context
            + self.prefill_row * step.prefill_rows
            + self.prefill_pair * step.prefill_pairs
        )


def _grid(
    cells: tuple[tuple[int, int, int, int, float], ...],
) -> tuple[tuple[int, int, int, int, float], ...]:
    """Raises ValueError."""
    if any(len({cell[axis] for cell in cells}) < 2 for axis in range(4)):
        raise ValueError("there must be two values of each axis at least, to interpolate between")
    return cells


@dataclass(frozen=True, slots=True)
class Grid:
    """Attention of one layer, measured on a grid: seconds by (chunk, context before it, decode rows, their context).

    `cells` are [chunk, before, rows, context] in rising order; a cell that was not measured is left out, and its
    lookup takes the nearest smaller one along the axis of rows, scaled by the number of rows.
    """

    cells: Annotated[tuple[tuple[int, int, int, int, Number], ...], AfterValidator(_grid)]


class _Interpolated:
    """A grid's cells by place, ready for lookups."""

    def __init__(self, grid: Grid) -> None:
        self._cells = {(a, b, c, d): seconds for a, b, c, d, seconds in grid.cells}
        self._axes = [sorted({cell[axis] for cell in self._cells}) for axis in range(4)]

    def seconds(self, chunk: float, before: float, rows: float, context: float) -> float:
        """Multilinear between the eight or sixteen cells around; linear beyond the grid's ends."""
        sides = [self._side(axis, value) for axis, value in enumerate((chunk, before, rows, context))]
        total = 0.0
        for a, weight_a in sides[0]:
            for b, weight_b in sides[1] if a else ((0, 1.0),):
                for c, weight_c in sides[2]:
                    for d, weight_d in sides[3] if c else ((0, 1.0),):
                        if a or c:
                            total += weight_a * weight_b * weight_c * weight_d * self._cell(a, b, c, d)
        return max(0.0, total)

    def _side(self, axis: int, value: float) -> tuple[tuple[int, float], ...]:
        """The two places around a value, with their weights; one where the other counts for nothing."""
        places = self._axes[axis]
        index = min(max(bisect_right(places, value), 1), len(places) - 1)
        low, high = places[index - 1], places[index]
        share = (value - low) / (high - low)
        if share == 0.0:
            return ((low, 1.0),)
        return ((low, 1.0 - share), (high, share))

    def _cell(self, chunk: int, before: int, rows: int, context: int) -> float:
        found = self._cells.get((chunk, before, rows, context))
        return found if found is not None else self._missing(chunk, before, rows, context)

    def _missing(self, chunk: int, before: int, rows: int, context: int) -> float:
        """A decode row of no context attends to its own position; more rows than measured cost in proportion."""
        contexts = self._axes[3]
        if rows and context == 0:
            return self._cell(chunk, before, rows, contexts[1])
        fewer = [
            each for each in self._axes[2] if each < rows and (chunk, before, each, context) in self._cells
        ]
        if not fewer:
            raise ValueError(f"the attention table has no cell for {(chunk, before, rows, context)}")
        most = fewer[-1]
        return self._cells[chunk, before, most, context] * (rows / most if most else 1.0)


@dataclass(frozen=True, slots=True)
class TableTime:
    """Per-operator latencies in seconds: `dense` and `attention` of one layer, of which there are `layers`."""

    layers: int
    dense: Points  # of one layer, by tokens
    once: Points  # what a step does once, by tokens: embedding, last norm
    head: Points  # output head and sampler, by rows that sample
    attention: Grid
    kind: Literal["tables"] = "tables"
    fixed: Number = 0.0  # of every step: launches, copies of the result

    def timer(self) -> Timer:
        return partial(self._seconds, _Interpolated(self.attention))

    def _seconds(self, attention: _Interpolated, step: Shape) -> float:
        context = step.decode_context / step.decode_rows if step.decode_rows else 0.0
        before = step.prefill_before / step.prefill_tokens if step.prefill_tokens else 0.0
        attending = attention.seconds(step.prefill_tokens, before, step.decode_rows, context)
        return (
            self.fixed
            + on_curve(self.once, step.tokens)
            + self.layers * (on_curve(self.dense, step.tokens) + attending)
            + (on_curve(self.head, step.samples) if step.samples else 0.0)
        )


StepTime = CurveTime | TableTime
