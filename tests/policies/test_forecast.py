"""What is expected to be held is held, on the whole; what was wrong is counted."""

from random import Random

import pytest

from policies.forecast import ForecastError, forecast_tokens
from policies.prediction import Hint, Histogram, MaxTokens, Oracle, Predictor
from tests.policies.view import View

LONG = 4000


def answers(count: int, seed: int) -> list[tuple[int, int]]:
    """Hints, and lengths that are half to twice as much."""
    random = Random(seed)
    hints = [1 + int(200 * random.lognormvariate(0.0, 0.6)) for _ in range(count)]
    return [(hint, min(LONG, 1 + int(hint * random.lognormvariate(0.0, 0.4)))) for hint in hints]


def running(seed: int, count: int = 4000) -> list[tuple[View, int]]:
    """Sequences met at a step drawn at random, and how long each will be: the long ones are met more often."""
    random = Random(seed)
    met = answers(count, seed)
    found = []
    for number, (hint, length) in enumerate(random.choices(met, weights=[each for _, each in met], k=count)):
        view = View(
            number,
            prompt_tokens=random.randint(10, 500),
            output_tokens=random.randrange(length),
            max_tokens=LONG,
            expected_output_tokens=hint,
        )
        found.append((view, length))
    return found


def held(there: list[tuple[View, int]], steps: int) -> int:
    """What is in use after so many steps, in truth."""
    return sum(
        view.prompt_tokens + view.output_tokens + steps
        for view, length in there
        if length - view.output_tokens > steps
    )


@pytest.fixture(scope="module", params=[Histogram, Hint])
def learnt(request: pytest.FixtureRequest) -> Predictor:
    """Has seen other sequences of the same kind end."""
    predictor: Predictor = request.param()
    for hint, length in answers(4000, seed=1):
        predictor.observe(View(0, output_tokens=length, max_tokens=LONG, expected_output_tokens=hint))
    return predictor


@pytest.fixture(scope="module")
def populations() -> list[list[tuple[View, int]]]:
    return [running(seed) for seed in range(2, 8)]


@pytest.mark.parametrize("steps", [0, 1, 16, 64, 128, 256])
def test_the_forecast_is_unbiased_within_a_few_percent(
    learnt: Predictor, populations: list[list[tuple[View, int]]], steps: int
) -> None:
    forecasts = [forecast_tokens([view for view, _ in there], learnt, steps) for there in populations]
    assert sum(forecasts) == pytest.approx(sum(held(there, steps) for there in populations), rel=0.02)


def test_by_an_oracle_it_is_exact() -> None:
    there = running(seed=3, count=50)
    oracle = Oracle({view.number: length for view, length in there})
    assert forecast_tokens([view for view, _ in there], oracle, 40) == held(there, 40)


def test_who_has_used_up_its_max_tokens_holds_nothing() -> None:
    views = [
        View(1, prompt_tokens=10, output_tokens=90, max_tokens=100),
        View(2, prompt_tokens=10, output_tokens=5),
    ]
    assert forecast_tokens(views, MaxTokens(), 9) == 10 + 90 + 9 + 10 + 5 + 9
    assert forecast_tokens(views, MaxTokens(), 10) == 10 + 5 + 10
    assert forecast_tokens([], MaxTokens(), 10) == 0


class TestForecastError:
    def test_each_forecast_is_compared_when_it_is_due(self) -> None:
        error = ForecastError()
        error.predicted(due=10, value=120.0)
        error.predicted(due=20, value=60.0)
        error.observed(9, 1.0)
        assert (error.compared, error.bias, error.mean_relative_error) == (0, 0.0, 0.0)
        error.observed(10, 100.0)
        assert (error.compared, error.bias, error.mean_relative_error) == (1, 0.2, 0.2)
        error.observed(20, 100.0)
        assert (error.compared, error.bias, error.mean_relative_error) == (2, -0.1, 0.3)

    def test_what_was_expected_of_an_empty_device_counts(self) -> None:
        error = ForecastError()
        error.predicted(due=1, value=50.0)
        error.observed(1, 0.0)
        assert error.bias == 50.0

    def test_it_remembers_so_many_and_drops_the_oldest(self) -> None:
        error = ForecastError(most_open=3)
        for due in range(10):
            error.predicted(due, 1.0)
        error.observed(99, 1.0)
        assert error.compared == 3
