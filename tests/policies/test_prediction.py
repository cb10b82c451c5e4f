"""Predictors learn what their docstrings say, and stay within max_tokens."""

from random import Random

import pytest

from policies.prediction import PREDICTIONS, Hint, Histogram, MaxTokens, Oracle, Predictor, survival_by
from tests.policies.view import View

LONG = 10**6


def ended(length: int, *, prompt_tokens: int = 10, class_name: str = "", hint: int | None = None) -> View:
    return View(
        0,
        prompt_tokens=prompt_tokens,
        class_name=class_name,
        output_tokens=length,
        max_tokens=LONG,
        expected_output_tokens=hint,
    )


def learnt(predictor: Predictor, *views: View) -> Predictor:
    for view in views:
        predictor.observe(view)
    return predictor


def test_max_tokens_expects_all_that_is_allowed() -> None:
    assert MaxTokens().remaining(View(1, max_tokens=100, output_tokens=30)) == 70
    assert MaxTokens().quantile(View(1, max_tokens=100, output_tokens=100), 0.9) == 0


def test_the_oracle_knows_by_number_or_by_a_callable() -> None:
    view = View(7, output_tokens=3)
    assert Oracle({7: 12}).remaining(view) == 9
    assert Oracle(lambda each: 20).quantile(view, 0.5) == 17
    assert Oracle({7: 1000}).remaining(view) == 97, "no longer than max_tokens"
    with pytest.raises(KeyError):
        Oracle({}).remaining(view)


class TestHistogram:
    def test_before_the_first_sample_it_is_sane(self) -> None:
        histogram = Histogram()
        assert 200 < histogram.remaining(View(1, max_tokens=LONG)) < 400
        assert 100 < histogram.quantile(View(1, max_tokens=LONG), 0.5) < 160
        assert histogram.remaining(View(1, max_tokens=5)) < 5

    def test_it_tells_prompts_of_different_lengths_apart(self) -> None:
        samples = [ended(20, prompt_tokens=50), ended(500, prompt_tokens=5000)] * 200
        histogram = learnt(Histogram(backing=1.0), *samples)
        assert histogram.remaining(View(1, prompt_tokens=40, max_tokens=LONG)) == pytest.approx(20, rel=0.3)
        assert histogram.remaining(View(1, prompt_tokens=6000, max_tokens=LONG)) == pytest.approx(
            500, rel=0.3
        )

    def test_it_tells_classes_apart(self) -> None:
        samples = [ended(20, class_name="chat"), ended(500, class_name="batch")] * 200
        histogram = learnt(Histogram(backing=1.0), *samples)
        assert histogram.remaining(View(1, class_name="chat", max_tokens=LONG)) == pytest.approx(20, rel=0.3)

    def test_an_unseen_length_of_prompt_takes_after_its_class_and_an_unseen_class_after_all(self) -> None:
        histogram = learnt(Histogram(backing=1.0), *[ended(20, class_name="chat"), ended(500)] * 300)
        unseen = View(1, class_name="chat", prompt_tokens=9000, max_tokens=LONG)
        assert histogram.remaining(unseen) == pytest.approx(20, rel=0.4)
        strange = View(1, class_name="never seen", max_tokens=LONG)
        assert histogram.remaining(strange) == pytest.approx((20 + 500) / 2, rel=0.2)

    def test_it_expects_more_of_what_has_outlived_the_short_ones(self) -> None:
        histogram = learnt(Histogram(), *[ended(10), ended(10), ended(10), ended(400)] * 100)
        at_start = histogram.remaining(View(1, max_tokens=LONG))
        after_twenty = histogram.remaining(View(1, max_tokens=LONG, output_tokens=20))
        assert at_start == pytest.approx(107.5, rel=0.15)
        assert after_twenty == pytest.approx(380, rel=0.15)

    def test_those_that_max_tokens_ended_would_have_gone_on(self) -> None:
        cut = View(0, output_tokens=100, max_tokens=100)
        histogram = learnt(Histogram(), *[cut, ended(800)] * 100)
        assert histogram.remaining(View(1, max_tokens=LONG)) > 600

    def test_the_same_observations_give_the_same_predictions(self) -> None:
        random = Random(1)
        samples = [
            ended(
                random.randint(1, 900), prompt_tokens=random.randint(1, 9000), class_name=random.choice("abc")
            )
            for _ in range(500)
        ]
        views = [View(1, prompt_tokens=2**bits, class_name="b", max_tokens=LONG) for bits in range(14)]
        first, second = ([learnt(Histogram(), *samples).remaining(view) for view in views] for _ in range(2))
        assert first == second

    @pytest.mark.parametrize("wrong", [{"memory": 1}, {"backing": 0.0}, {"prior_median": 0.0}])
    def test_parameters_that_make_no_sense_are_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="must be"):
            PREDICTIONS["histogram"](**wrong)


class TestHint:
    def test_a_hint_is_believed_at_first(self) -> None:
        hinted = View(1, expected_output_tokens=300, max_tokens=LONG)
        assert Hint().remaining(hinted) == pytest.approx(300, rel=0.2)
        assert Hint().quantile(hinted, 0.5) == pytest.approx(300, rel=0.1)

    def test_it_learns_what_hints_are_worth(self) -> None:
        samples = [ended(length * 2, hint=length) for length in range(50, 450)]
        hint = learnt(Hint(), *samples)
        view = View(1, expected_output_tokens=1000, max_tokens=LONG, output_tokens=500)
        assert hint.remaining(view) == pytest.approx(1500, rel=0.1)

    def test_each_class_is_corrected_by_its_own(self) -> None:
        samples = [
            ended(100, hint=50, class_name="modest"),
            ended(100, hint=400, class_name="boastful"),
        ] * 100
        hint = learnt(Hint(), *samples)
        expected = {"modest": 400, "boastful": 50}
        for name, length in expected.items():
            view = View(1, class_name=name, expected_output_tokens=200, max_tokens=LONG)
            assert hint.remaining(view) == pytest.approx(length, rel=0.35)

    def test_without_a_hint_it_is_the_histogram(self) -> None:
        samples = [ended(70, hint=35)] * 50
        view = View(1, max_tokens=LONG)
        assert learnt(Hint(), *samples).remaining(view) == learnt(Histogram(), *samples).remaining(view)
        assert learnt(Hint(), *samples).quantile(view, 0.9) == learnt(Histogram(), *samples).quantile(
            view, 0.9
        )

    def test_a_hint_long_used_up_leaves_at_least_a_token(self) -> None:
        view = View(1, expected_output_tokens=5, output_tokens=5000, max_tokens=6000)
        assert 1 <= Hint().remaining(view) <= 1000
        assert 1 <= Hint().quantile(view, 0.01) <= 1000


@pytest.mark.parametrize("make", [MaxTokens, Histogram, Hint, lambda: Oracle(lambda view: 60)])
@pytest.mark.parametrize("hint", [None, 3, 5000])
class TestAllPredictors:
    def test_nothing_is_left_at_max_tokens_and_something_before(self, make: type, hint: int | None) -> None:
        predictor = make()
        for generated in (0, 1, 50, 99, 100):
            view = View(1, output_tokens=generated, max_tokens=100, expected_output_tokens=hint)
            room = 100 - generated
            for left in (predictor.remaining(view), predictor.quantile(view, 0.9)):
                assert left <= room
                assert isinstance(predictor, Oracle) or left >= min(1, room)

    def test_survival_falls_from_one_to_nothing_at_max_tokens_and_is_what_the_quantiles_say(
        self, make: type, hint: int | None
    ) -> None:
        predictor = make()
        view = View(1, output_tokens=50, max_tokens=100, expected_output_tokens=hint)
        shares = [predictor.survival(view, steps) for steps in range(51)]
        assert shares == sorted(shares, reverse=True)
        assert (shares[0], shares[50]) == (1.0, 0.0)
        for steps, share in enumerate(shares[1:49], 1):
            from_quantiles = survival_by(lambda q: predictor.quantile(view, q), steps)
            assert from_quantiles == pytest.approx(share, abs=0.01)


def test_every_predictor_says_what_it_is_for() -> None:
    for predictor in PREDICTIONS.values():
        for word in ("Assumes", "Worst case:", "Source:"):
            assert word in (predictor.__doc__ or ""), predictor
