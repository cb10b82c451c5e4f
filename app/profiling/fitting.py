"""Fits CurveTime and Between to measurements: least squares of relative errors, every coefficient ≥ 0. numpy only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from engine.profile import Between, Transfer
from engine.step_time import CurveTime, Shape

SWEEPS = 4000
TOKEN_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
HEAD_KNOTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROW_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PASSES = 3
ALONE_SHARE = 0.02
"""What all steps measured alone weigh, beside those of a live engine: these are what a server runs, but few shapes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured step."""

    kind: str  # what was being measured, for the report
    shape: Shape
    seconds: float


@dataclass(frozen=True, slots=True)
class Gap:
    """What passed in a live engine between the end of a step and the launch of the next."""

    step: Shape  # the one that ended
    finished: int  # choices that ended with it
    admitted: int  # choices of which the next step is the first
    seconds: float
    copies: int = 0  # from and to the device, begun with the next step
    copied_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors of a fit over samples of one kind. `bias`: that of the sum."""

    kind: str
    samples: int
    bias: float
    median: float
    mean: float
    worst: float


def fit_steps(alone: Sequence[Sample], live: Sequence[Sample] = ()) -> CurveTime:
    """Curves have knots where samples reach: beyond the largest the last piece goes on."""
    samples = [*alone, *live]
    most_tokens = max(sample.shape.tokens for sample in samples)
    most_heads = max(sample.shape.samples for sample in samples)
    tokens, heads = _reached(TOKEN_KNOTS, most_tokens), _reached(HEAD_KNOTS, most_heads)
    rows = np.array([_features(sample.shape, tokens, heads) for sample in samples])
    weights = np.ones(len(samples))
    if alone and live:
        weights[: len(alone)] = ALONE_SHARE * len(live) / len(alone)
    found = unbiased(rows, np.array([sample.seconds for sample in samples]), weights)
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


def fit_between(gaps: Sequence[Gap], idle_seconds: float) -> Between:
    knots = _reached(ROW_KNOTS, max(gap.step.rows for gap in gaps))
    rows = np.array(
        [
            [
                1.0,
                *_pieces(knots, gap.step.rows),
                gap.finished,
                gap.admitted,
                float(gap.step.prefill_rows > 0),
                gap.copies,
                gap.copied_bytes,
            ]
            for gap in gaps
        ]
    )
    found = unbiased(rows, np.array([gap.seconds for gap in gaps]), np.ones(len(gaps)))
    curve, found = _curve(knots, float(found[0]), found[1:])
    finished, admitted, prefill, copy, copied_byte = map(float, found)
    return Between(curve, finished, admitted, copy, copied_byte, prefill, idle_seconds)


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


def unbiased(
    rows: NDArray[np.float64], wanted: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """x ≥ 0 with least Σ weight · ((rows·x − wanted) ÷ expected)², expected being the rows·x of the pass before.

    Errors that are relative to the measured values themselves would make those that came out small count most, and the
    sum of many noisy ones too small.
    """
    found, expected = nonnegative(rows, wanted), wanted
    for _ in range(PASSES):
        found = nonnegative(rows, wanted, expected / np.sqrt(weights))
        expected = np.maximum(rows @ found, wanted.min())
    return found


def nonnegative(
    rows: NDArray[np.float64], wanted: NDArray[np.float64], units: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """x ≥ 0 with least Σ ((rows·x − wanted) ÷ unit)², by coordinate descent (convex, so it gets there).

    Without `units` they are the wanted values: errors are relative.
    """
    units = wanted if units is None else units
    weighted, aims = rows / units[:, None], wanted / units
    scale = np.sqrt((weighted**2).sum(axis=0))
    scale[scale == 0] = 1.0
    weighted = weighted / scale
    gram, target = weighted.T @ weighted, weighted.T @ aims
    found = np.zeros(len(target))
    for _ in range(SWEEPS):
        for index in range(len(found)):
            if gram[index, index]:
                step = (target[index] - gram[index] @ found) / gram[index, index]
                found[index] = max(0.0, found[index] + step)
    return np.asarray(found / scale)


def errors(samples: Sequence[Sample], seconds: Callable[[Shape], float]) -> list[Error]:
    """By kind, in the order of the samples."""
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        by_kind.setdefault(sample.kind, []).append((seconds(sample.shape), sample.seconds))
    return [_error(kind, found) for kind, found in by_kind.items()]


def _error(kind: str, pairs: Sequence[tuple[float, float]]) -> Error:
    """Of (fitted, measured)."""
    relative = [abs(fitted / measured - 1) for fitted, measured in pairs]
    bias = sum(fitted for fitted, _ in pairs) / sum(measured for _, measured in pairs) - 1
    return Error(kind, len(pairs), bias, median(relative), fmean(relative), max(relative))


def fit_transfer(sizes: Sequence[tuple[int, float]]) -> Transfer:
    """From (bytes, seconds) of copies of different sizes."""
    rows = np.array([[1.0, size] for size, _ in sizes])
    latency, per_byte = nonnegative(rows, np.array([seconds for _, seconds in sizes]))
    return Transfer(float(latency), 1 / max(float(per_byte), 1e-15))
