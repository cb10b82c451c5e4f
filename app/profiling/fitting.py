"""Fits CurveTime to measured steps: least squares of relative errors, every coefficient ≥ 0. numpy only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from engine.profile import Transfer
from engine.step_time import CurveTime, Shape

SWEEPS = 4000
TOKEN_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
HEAD_KNOTS = (0, 1, 8, 32, 128, 512)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured step."""

    kind: str  # what was being measured, for the report
    shape: Shape
    seconds: float


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors of a fit over samples of one kind."""

    kind: str
    samples: int
    median: float
    mean: float
    worst: float


def fit_steps(samples: Sequence[Sample]) -> CurveTime:
    """Curves have knots where samples reach: beyond the largest the last piece goes on."""
    most_tokens = max(sample.shape.tokens for sample in samples)
    most_heads = max(sample.shape.samples for sample in samples)
    tokens, heads = _reached(TOKEN_KNOTS, most_tokens), _reached(HEAD_KNOTS, most_heads)
    rows = np.array([_features(sample.shape, tokens, heads) for sample in samples])
    found = nonnegative(rows, np.array([sample.seconds for sample in samples]))
    base, found = float(found[0]), found[1:]
    dense, found = _curve(tokens, base, found)
    head, found = _curve(heads, 0.0, found)
    decode_row, decode_position, prefill_row, prefill_pair = map(float, found)
    return CurveTime(
        dense=dense,
        head=head,
        decode_row=decode_row,
        decode_position=decode_position,
        prefill_row=prefill_row,
        prefill_pair=prefill_pair,
    )


def _reached(knots: Sequence[int], most: int) -> tuple[int, ...]:
    """The knots up to the first that holds `most`, at least two."""
    return tuple(knots[: max(2, next((i + 1 for i, knot in enumerate(knots) if knot >= most), len(knots)))])


def _features(shape: Shape, tokens: Sequence[int], heads: Sequence[int]) -> list[float]:
    return [
        1.0,
        *_pieces(tokens, shape.tokens),
        *_pieces(heads, shape.samples),
        shape.decode_rows,
        shape.decode_context,
        shape.prefill_rows,
        shape.prefill_pairs,
    ]


def _pieces(knots: Sequence[int], x: float) -> list[float]:
    """How much of each piece of a curve lies before x: 0 … 1, the last one without an end."""
    parts = [max(0.0, (x - low) / (high - low)) for low, high in pairwise(knots)]
    return [*(min(1.0, part) for part in parts[:-1]), parts[-1]]


def _curve(
    knots: Sequence[int], base: float, increments: NDArray[np.float64]
) -> tuple[tuple[tuple[float, float], ...], NDArray[np.float64]]:
    """The points of a curve that begins at `base`, and the coefficients that are left."""
    count = len(knots) - 1
    heights = base + np.concatenate([[0.0], np.cumsum(increments[:count])])
    return tuple((float(x), float(y)) for x, y in zip(knots, heights, strict=True)), increments[count:]


def nonnegative(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """x ≥ 0 with least Σ ((rows·x − wanted) ÷ wanted)², by coordinate descent (convex, so it gets there)."""
    weighted = rows / wanted[:, None]
    scale = np.sqrt((weighted**2).sum(axis=0))
    scale[scale == 0] = 1.0
    weighted = weighted / scale
    gram, target = weighted.T @ weighted, weighted.sum(axis=0)
    found = np.zeros(len(target))
    for _ in range(SWEEPS):
        for index in range(len(found)):
            if gram[index, index]:
                step = (target[index] - gram[index] @ found) / gram[index, index]
                found[index] = max(0.0, found[index] + step)
    return np.asarray(found / scale)


def errors(samples: Sequence[Sample], seconds: Callable[[Shape], float]) -> list[Error]:
    """By kind, in the order of the samples."""
    by_kind: dict[str, list[float]] = {}
    for sample in samples:
        relative = abs(seconds(sample.shape) / sample.seconds - 1)
        by_kind.setdefault(sample.kind, []).append(relative)
    return [
        Error(kind, len(found), median(found), fmean(found), max(found)) for kind, found in by_kind.items()
    ]


def fit_transfer(sizes: Sequence[tuple[int, float]]) -> Transfer:
    """From (bytes, seconds) of copies of different sizes."""
    rows = np.array([[1.0, size] for size, _ in sizes])
    latency, per_byte = nonnegative(rows, np.array([seconds for _, seconds in sizes]))
    return Transfer(float(latency), 1 / max(float(per_byte), 1e-15))


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(at 0, per unit), neither negative."""
    rows = np.array([[1.0, x] for x, _ in points])
    at_zero, slope = nonnegative(rows, np.array([max(y, 1e-9) for _, y in points]))
    return float(at_zero), float(slope)
