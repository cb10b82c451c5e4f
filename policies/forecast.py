"""KV positions in use after a horizon, expected from how long those who run are predicted to; and how wrong that was.

Whether a newcomer still fits at the peak is another question: admission.py.
"""

from collections import deque
from collections.abc import Iterable

from policies.prediction import Predictor
from policies.views import SequenceView


def forecast_tokens(views: Iterable[SequenceView], predictor: Predictor, steps: int) -> float:
    """KV positions expected to be held `steps` steps from now, by those of `views` that run on. O(n).

    Each is there with the probability that more than `steps` tokens are to come, and has then grown by `steps`;
    whoever has ended holds nothing. It is an expectation: with lengths that are independent, the sum of many is near
    it. Assumes one token a step for all, and prompts computed by then; so of those who wait give only such as will
    have run since. Positions that several share count for each. Newcomers are not in it. Source: expected future
    memory, as in LightLLM's past-future scheduler, Gong et al., ASPLOS'25.
    """
    return sum(
        predictor.survival(view, steps) * (view.prompt_tokens + view.output_tokens + steps) for view in views
    )


class ForecastError:
    """Forecasts, each kept until it is due and then compared with what came.

    Both figures are sums over sums, so that an idle hour's error of a few positions weighs little; 0 before the first
    comparison. Bounded: `most_open` forecasts at once, beyond which the oldest is dropped.
    """

    def __init__(self, most_open: int = 1024) -> None:
        self._open: deque[tuple[float, float]] = deque(maxlen=most_open)
        self.compared = 0
        self._errors = self._absolute = self._actual = 0.0

    def predicted(self, due: float, value: float) -> None:
        """So much is expected at `due`, a step or a time, which never falls from one call to the next."""
        self._open.append((due, value))

    def observed(self, now: float, actual: float) -> None:
        """What is there now, told at each step: every forecast that is due by now is compared with it."""
        while self._open and self._open[0][0] <= now:
            error = self._open.popleft()[1] - actual
            self.compared += 1
            self._errors += error
            self._absolute += abs(error)
            self._actual += actual

    @property
    def mean_relative_error(self) -> float:
        """Σ |predicted − actual| ÷ Σ actual."""
        return self._absolute / max(self._actual, 1.0)

    @property
    def bias(self) -> float:
        """Σ (predicted − actual) ÷ Σ actual: above 0, too much was expected."""
        return self._errors / max(self._actual, 1.0)
