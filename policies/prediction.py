"""How many tokens a sequence will still generate: predictors, which learn from those that have ended.

The order of policies and the admission ask; the scheduler tells what has ended. Nothing here sees a prompt's
content.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from policies.survival import Cell, Curve, Epochs, log_normal
from policies.views import SequenceView


class Predictor(Protocol):
    def remaining(self, view: SequenceView, /) -> float:
        """Tokens it is expected to generate yet: no more than its max_tokens leave, 0 only when they are used up."""

    def quantile(self, view: SequenceView, q: float, /) -> float:
        """So many or fewer it will still generate, with probability q; between 1 and what its max_tokens leave."""

    def survival(self, view: SequenceView, steps: float, /) -> float:
        """The probability that more than `steps` tokens are to come; 0 when its max_tokens leave no more."""

    def observe(self, view: SequenceView, /) -> None:
        """It has ended by itself: `output_tokens` is its length. Or at its max_tokens: it would have been longer.

        Not to be told: what was cancelled or failed.
        """


class MaxTokens:
    """As many as are allowed.

    Assumes that clients ask for no more than they need; most ask for the most there is. Never too few, so admission
    by it never runs out. Worst case: an upper bound taken for a guess; then `sjf` sorts by what was not meant.
    Source: the reservation of engines before paged KV (FasterTransformer, Orca).
    """

    def remaining(self, view: SequenceView, /) -> float:
        return max(0, view.max_tokens - view.output_tokens)

    def quantile(self, view: SequenceView, q: float, /) -> float:
        return self.remaining(view)

    def survival(self, view: SequenceView, steps: float, /) -> float:
        return float(self.remaining(view) > steps)

    def observe(self, view: SequenceView, /) -> None:
        """Nothing to learn."""


class Histogram:
    """Survival by class and log₂ of the prompt length, learned online, given that a sequence has come so far.

    A cell counts with its own samples and with `backing` samples' worth of the coarser one: class and prompt
    length, class, all, and last a log-normal with median `prior_median` and a σ of 1.25 (so without any sample a
    sequence is expected to generate about 280 tokens, if it may). After `memory` more samples of its cell, one
    counts 1/e. What is predicted lags by up to 32 samples.

    Assumes that sequences that look alike to it end alike, and slowly changing. Worst case: answers whose length
    depends on the prompt's meaning alone: then all look alike, and it is worth as much as the marginal
    distribution, which still tells who has run long. Deterministic: the same observations in the same order, the
    same predictions. Source: survival estimate of Kaplan and Meier (1958); prediction from recent lengths as in
    LightLLM's past-future scheduler (Gong et al., ASPLOS'25); mean residual life as an index is Gittins' (1979).
    """

    def __init__(self, memory: int = 2000, backing: float = 8.0, prior_median: float = 128.0) -> None:
        if memory < 2 or backing <= 0 or prior_median < 1:
            raise ValueError("memory must be at least 2, backing positive, prior_median at least 1")
        prior = log_normal(prior_median, sigma=1.25)
        self._memory, self._backing = memory, backing
        self._all = Cell(lambda epoch: prior, memory, backing)
        self._classes: dict[str, Cell] = {}
        self._cells: dict[tuple[str, int], Cell] = {}
        self._epochs = Epochs()

    def remaining(self, view: SequenceView, /) -> float:
        return self._curve(view).remaining(view.output_tokens, view.max_tokens)

    def quantile(self, view: SequenceView, q: float, /) -> float:
        return self._curve(view).quantile(view.output_tokens, view.max_tokens, q)

    def survival(self, view: SequenceView, steps: float, /) -> float:
        return self._curve(view).beyond(view.output_tokens, view.max_tokens, steps)

    def observe(self, view: SequenceView, /) -> None:
        ended = view.output_tokens < view.max_tokens
        for cell in (self._cell(view), self._class(view.class_name), self._all):
            cell.observe(view.output_tokens, ended=ended)
        self._epochs.seen()

    def _curve(self, view: SequenceView) -> Curve:
        return self._cell(view).curve(self._epochs.now)

    def _cell(self, view: SequenceView) -> Cell:
        key = (view.class_name, view.prompt_tokens.bit_length())
        cell = self._cells.get(key)
        if cell is None:
            above = self._class(view.class_name)
            cell = self._cells[key] = Cell(above.curve, self._memory, self._backing)
        return cell

    def _class(self, name: str) -> Cell:
        if name not in self._classes:
            self._classes[name] = Cell(self._all.curve, self._memory, self._backing)
        return self._classes[name]


class Hint:
    """The client's hint, put right by what hints were worth: survival of length ÷ hint. Without one, `histogram`.

    Before the first sample, hints count as the median, within a factor of 1.65 two times of three. A request whose
    hint is long used up is not expected to end at once, but like others that have gone so far beyond theirs.

    Assumes that a class's clients err alike. Worst case: hints that say nothing; then the curve is as broad as they
    are wrong, and a length is predicted no better than by the hint times a constant. Source: the request field
    `expected_output_tokens`; correction of estimates by their history is Gibbons' (1997), for batch queues.
    """

    UNIT = 1024  # a length of just the hint, in the curve's units

    def __init__(self, memory: int = 2000, backing: float = 8.0, prior_median: float = 128.0) -> None:
        self._histogram = Histogram(memory, backing, prior_median)
        self._memory, self._backing = memory, backing
        self._prior = log_normal(self.UNIT, sigma=0.5)
        self._classes: dict[str, Cell] = {}
        self._epochs = Epochs()

    def remaining(self, view: SequenceView, /) -> float:
        if not view.expected_output_tokens:
            return self._histogram.remaining(view)
        unit = self.UNIT / view.expected_output_tokens
        left = self._curve(view).remaining(view.output_tokens * unit, view.max_tokens * unit) / unit
        return _within(view, left)

    def quantile(self, view: SequenceView, q: float, /) -> float:
        if not view.expected_output_tokens:
            return self._histogram.quantile(view, q)
        unit = self.UNIT / view.expected_output_tokens
        left = self._curve(view).quantile(view.output_tokens * unit, view.max_tokens * unit, q) / unit
        return _within(view, left)

    def survival(self, view: SequenceView, steps: float, /) -> float:
        if not view.expected_output_tokens:
            return self._histogram.survival(view, steps)
        unit = self.UNIT / view.expected_output_tokens
        return self._curve(view).beyond(view.output_tokens * unit, view.max_tokens * unit, steps * unit)

    def observe(self, view: SequenceView, /) -> None:
        self._histogram.observe(view)
        if view.expected_output_tokens:
            units = view.output_tokens * self.UNIT / view.expected_output_tokens
            self._class(view.class_name).observe(units, ended=view.output_tokens < view.max_tokens)
            self._epochs.seen()

    def _curve(self, view: SequenceView) -> Curve:
        return self._class(view.class_name).curve(self._epochs.now)

    def _class(self, name: str) -> Cell:
        if name not in self._classes:
            self._classes[name] = Cell(lambda epoch: self._prior, self._memory, self._backing)
        return self._classes[name]


def _within(view: SequenceView, left: float) -> float:
    return min(max(1.0, left), max(0.0, view.max_tokens - view.output_tokens))


@dataclass(frozen=True)
class Oracle:
    """The true length, as a simulation knows it: by a mapping from `number`, or by a callable.

    Assumes nothing, and is no policy for a server. Worst case: none; a sequence it does not know is a KeyError.
    Source: the usual upper bound of scheduling studies.
    """

    lengths: Mapping[int, int] | Callable[[SequenceView], int]

    def remaining(self, view: SequenceView, /) -> float:
        length = self.lengths(view) if callable(self.lengths) else self.lengths[view.number]
        return max(0, min(length, view.max_tokens) - view.output_tokens)

    def quantile(self, view: SequenceView, q: float, /) -> float:
        return self.remaining(view)

    def survival(self, view: SequenceView, steps: float, /) -> float:
        return float(self.remaining(view) > steps)

    def observe(self, view: SequenceView, /) -> None:
        """Nothing to learn."""


def survival_by(quantile: Callable[[float], float], steps: float) -> float:
    """The same from a sequence's quantiles, to 1/512: for a predictor that has no more to say. Eight questions."""
    ended, step = 0.5, 0.25
    for _ in range(8):
        ended += step if quantile(ended) <= steps else -step
        step /= 2
    return 1.0 - ended


PREDICTIONS: dict[str, Callable[..., Predictor]] = {
    "max_tokens": MaxTokens,
    "histogram": Histogram,
    "hint": Hint,
    "oracle": Oracle,
}
