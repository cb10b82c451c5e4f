"""Seconds as a sum of counts times coefficients, fitted online: what a step and a copy have in common.

The relative error is minimised (a sample weighs 1 / seconds²), no coefficient is negative, old samples are forgotten.
Each size class of samples has a memory of its own, so that hours of one kind do not push the others out: what a long
prompt costs is still known after a night of decoding. A direction that no memory says anything about keeps the shape of
the prior, at the scale of what was measured.

Coefficients depend on the samples alone, not on who asked when. No clock, no randomness. What is counted: cost.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul

SHORTEST_SECONDS = 1e-6
"""Of a sample: shorter ones count as this long, so that weights stay finite."""

FORGET = 1 / 64
"""Weight of a class's newest sample."""

PRIOR_WEIGHT = 0.003
"""Of the prior's shape, in samples: (noise of a sample, 0.1)² over (how far the shape may be off, 2)²."""

LEAST = 0.001
"""Of what the prior's shape, at the scale of what was measured, has of a coefficient: nothing is free. Where it seemed
so by chance, a session's home or a cached prefix would be worth nothing."""

SURE_AFTER = 8
"""Samples of a class, before another may be called an outlier."""

WIDEST, NARROWEST = 0.25, 0.06
"""Mean absolute error (natural log) of a class: at its beginning, and what is believed at least."""

SPREADS = 5.0
"""An outlier is farther off than so many of its class's mean absolute errors."""

CHANGED_AFTER = 12
"""Outliers on one side that no usual sample of their class has followed: the world has changed, not the weather."""

SOLVE_EVERY = 8
"""Samples between two solutions, at most; the first ones are used at once."""


class Memory:
    """What is remembered of one size class: normal equations of rows that, times the coefficients, ought to be 1."""

    def __init__(self, size: int) -> None:
        self.gram = [0.0] * (size * size)
        self.moment = [0.0] * size
        self.count = 0
        self.taken_at = 0  # number of the sample taken last
        self.spread = WIDEST

    def take(self, row: list[float], error: float, number: int) -> None:
        keep = 1 - FORGET
        products = [x * y for x in row for y in row]
        self.gram = [keep * old + new for old, new in zip(self.gram, products, strict=True)]
        self.moment = [keep * old + new for old, new in zip(self.moment, row, strict=True)]
        self.spread += (min(abs(error), 1.0) - self.spread) / 16
        self.count += 1
        self.taken_at = number

    @property
    def limit(self) -> float:
        """A larger error is an outlier's."""
        return SPREADS * max(self.spread, NARROWEST) if self.count >= SURE_AFTER else math.inf


@dataclass(slots=True)
class Outliers:
    """Samples that may yet turn out to be the truth: all too slow, or all too quick."""

    slow: bool = False
    since: int = 0  # number of the first
    rows: list[tuple[int, list[float]]] = field(default_factory=list)  # with their size classes

    def add(self, size_class: int, row: list[float], slow: bool, number: int) -> None:
        if slow != self.slow or not self.rows:
            self.slow, self.since, self.rows = slow, number, []
        self.rows.append((size_class, row))

    def deny(self, size_class: int) -> None:
        """A usual sample of that class has come: its outliers were just that."""
        self.rows = [(other, row) for other, row in self.rows if other != size_class]


class Fit:
    """`prior`: seconds per unit of each feature before the first sample, positive; later only its shape counts.

    `changed_after`: as CHANGED_AFTER.
    """

    def __init__(self, prior: Sequence[float], changed_after: int = CHANGED_AFTER) -> None:
        assert all(value > 0 for value in prior)
        self.samples = 0
        self._changed_after = changed_after
        self._units = tuple(prior)  # a coefficient is so many of these
        self._shape = [1.0] * len(prior)  # of the coefficients, at any scale, where no sample says otherwise
        self._memories: dict[int, Memory] = {}
        self._outliers = Outliers()
        self._unsolved = 0
        self.coefficients = self._units

    def predict(self, features: Sequence[float]) -> float:
        """Seconds; never less than 0, and no less for more of anything. Features left out are 0."""
        total: float = sum(map(mul, self.coefficients, features))  # those left out are 0
        return total

    def observe(self, size_class: int, features: Sequence[float], seconds: float) -> None:
        """A sample of `features` (not negative, one of them positive) that took `seconds`."""
        assert 0 <= seconds < math.inf
        self.samples += 1
        seconds = max(seconds, SHORTEST_SECONDS)
        error = math.log(seconds / max(self.predict(features), SHORTEST_SECONDS))
        row = [unit * feature / seconds for unit, feature in zip(self._units, features, strict=True)]
        memory = self._memory(size_class)
        if abs(error) > memory.limit:
            self._set_aside(size_class, row, slow=error > 0)
            return
        if self._outliers.rows and abs(error) < memory.limit / 2:
            self._outliers.deny(size_class)
        memory.take(row, error, self.samples)
        self._unsolved += 1
        if self._unsolved >= min(SOLVE_EVERY, self.samples / 8):
            self._solve()

    def _memory(self, size_class: int) -> Memory:
        if size_class not in self._memories:
            self._memories[size_class] = Memory(len(self._units))
        return self._memories[size_class]

    def _set_aside(self, size_class: int, row: list[float], *, slow: bool) -> None:
        self._outliers.add(size_class, row, slow, self.samples)
        if len(self._outliers.rows) == self._changed_after:
            self._begin_anew(self._outliers)
            self._outliers = Outliers()

    def _begin_anew(self, outliers: Outliers) -> None:
        """Forgets the classes that have changed, and those not seen since. What was learned of the shape is kept."""
        self._shape = self._floored_shape()
        changed = {size_class for size_class, _ in outliers.rows}
        self._memories = {
            size_class: memory
            for size_class, memory in self._memories.items()
            if memory.taken_at > outliers.since and size_class not in changed
        }
        for size_class, row in outliers.rows:
            self._memory(size_class).take(row, WIDEST, self.samples)
        self._solve()

    def _floored_shape(self) -> list[float]:
        """The coefficients in units, none so small that it could never grow again."""
        found = [c / unit for c, unit in zip(self.coefficients, self._units, strict=True)]
        return [max(value, 0.01 * sum(found) / len(found), 1e-12) for value in found]

    def _solve(self) -> None:
        size = len(self._units)
        memories = list(self._memories.values())
        gram = [sum(column) for column in zip(*(memory.gram for memory in memories), strict=True)]
        moment = [sum(column) for column in zip(*(memory.moment for memory in memories), strict=True)]
        rows = [gram[i * size : (i + 1) * size] for i in range(size)]
        expected = _scaled(self._shape, rows, moment)
        for i, value in enumerate(expected):
            rows[i][i] += PRIOR_WEIGHT / value**2
            moment[i] += PRIOR_WEIGHT / value
        solution = solve_non_negative(rows, moment)
        self.coefficients = tuple(
            unit * max(found, LEAST * usual)
            for unit, found, usual in zip(self._units, solution, expected, strict=True)
        )
        self._unsolved = 0


def _scaled(shape: list[float], gram: list[list[float]], moment: list[float]) -> list[float]:
    """The multiple of `shape` that fits best."""
    along = sum(map(mul, shape, moment))
    curve = sum(s * sum(map(mul, row, shape)) for s, row in zip(shape, gram, strict=True))
    return [s * along / curve for s in shape]


def solve_non_negative(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x >= 0 with matrix · x = right in the least-squares sense; `matrix` is symmetric and positive definite.

    Variables that come out negative are held at 0, and the others solved again: not always the very optimum, but as
    quick as it is for a handful of variables.
    """
    free = list(range(len(right)))
    while free:
        found = solve([[matrix[i][j] for j in free] for i in free], [right[i] for i in free])
        if min(found) >= 0:
            break
        free = [i for i, value in zip(free, found, strict=True) if value > 0]
    values = dict(zip(free, found, strict=True)) if free else {}
    return [values.get(i, 0.0) for i in range(len(right))]


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """By elimination; positive definite matrices need no pivots."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(size):
        for lower in rows[i + 1 :]:
            factor = lower[i] / rows[i][i]
            lower[i:] = [x - factor * y for x, y in zip(lower[i:], rows[i][i:], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        known = sum(map(mul, rows[i], found))  # those before i are still 0
        found[i] = (rows[i][size] - known) / rows[i][i]
    return found
