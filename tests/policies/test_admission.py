"""The predicted peak is the peak of a simulation that goes step by step; admission keeps it within the pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission import Admission, Outlook
from policies.prediction import Histogram, MaxTokens, Oracle
from policies.views import SequenceView
from tests.policies.view import View

sequences = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=12)


def simulated_peak(running: list[tuple[int, int]], block_size: int) -> float:
    """Step by step: all that have tokens to come hold what they held, and what these took."""
    most = 0.0
    for step in range(max((remaining for remaining, _ in running), default=0) + 1):
        most = max(most, sum(held + step / block_size for remaining, held in running if remaining >= step))
    return most


@given(sequences, st.sampled_from([1, 4, 16]))
def test_the_peak_is_that_of_a_step_by_step_simulation(
    running: list[tuple[int, int]], block_size: int
) -> None:
    assert Outlook(running, block_size).peak_with(0, 0) == pytest.approx(simulated_peak(running, block_size))


@given(sequences, st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=4))
def test_one_more_is_answered_without_building_anew(
    running: list[tuple[int, int]], candidates: list[tuple[int, int]]
) -> None:
    outlook = Outlook(running, 4)
    for remaining, held in candidates:
        asked = outlook.peak_with(remaining, held)
        running = [*running, (remaining, held)]
        assert asked == pytest.approx(Outlook(running, 4).peak_with(0, 0))
        outlook.add(remaining, held)
        assert outlook.peak_with(0, 0) == pytest.approx(asked)


def test_one_that_ends_soon_makes_room_for_another_to_grow() -> None:
    """Two of 10 blocks, of which one ends after 4 tokens: together they never hold 24 blocks, but 22."""
    assert Outlook([(4, 10), (8, 10)], 4).peak_with(0, 0) == 22
    assert Outlook([(8, 10), (8, 10)], 4).peak_with(0, 0) == 24


class TestAdmission:
    def test_who_would_fit_at_the_worst_is_admitted_without_a_prediction(self) -> None:
        class Untouched(MaxTokens):
            def quantile(self, view: object, q: float, /) -> float:
                raise AssertionError("asked in vain")

        running = [View(1, held_blocks=5, max_tokens=40, output_tokens=20)]
        room = Admission(risk=0.3).room(running, Untouched(), block_size=4, blocks=25)
        assert room.fits(View(2, max_tokens=40), 5)  # 5 + 20/4 + 5 + 40/4
        room.add(View(2, max_tokens=40), 5)
        with pytest.raises(AssertionError, match="asked in vain"):
            room.fits(View(3, max_tokens=4), 1)

    def test_it_admits_up_to_the_predicted_peak_and_not_beyond(self) -> None:
        running = [View(1, held_blocks=10, max_tokens=1000), View(2, held_blocks=10, max_tokens=1000)]
        oracle = Oracle({1: 4, 2: 40, 3: 8})
        candidate = View(3, max_tokens=1000)
        # when 1 ends: 10+1 + 10+1 + 5+1; when 3 ends: 10+2 + 5+2; when 2 ends: 10+10
        assert Admission(risk=0.3).room(running, oracle, block_size=4, blocks=28).fits(candidate, 5)
        assert not Admission(risk=0.3).room(running, oracle, block_size=4, blocks=27).fits(candidate, 5)

    def test_those_admitted_count_for_the_next(self) -> None:
        room = Admission(risk=0.3).room(
            [View(1, held_blocks=2, max_tokens=80)], MaxTokens(), block_size=4, blocks=45
        )
        assert room.fits(View(2, max_tokens=40), 5)
        room.add(View(2, max_tokens=40), 5)
        assert not room.fits(View(3, max_tokens=80), 5)
        assert room.fits(View(4, max_tokens=10), 5)

    def test_by_default_nothing_is_foreseen(self) -> None:
        room = Admission().room(
            [View(1, held_blocks=9, max_tokens=1000)], MaxTokens(), block_size=4, blocks=10
        )
        assert room.fits(View(2, max_tokens=1000), 1)

    def test_when_nobody_runs_anybody_may(self) -> None:
        room = Admission(risk=0.3).room([], MaxTokens(), block_size=4, blocks=2)
        assert room.fits(View(1, max_tokens=1000), 1)

    def test_an_end_is_predicted_again_after_an_eighth_of_the_way_or_when_it_comes_back(self) -> None:
        admission, lengths = Admission(risk=0.3), {1: 80, 2: 3}
        oracle = Oracle(lengths)
        one, other = View(1, max_tokens=1000), View(2, max_tokens=1000)
        assert admission.left([one, other], oracle) == [80, 3]
        lengths.update({1: 160, 2: 300})
        assert admission.left([View(1, output_tokens=9, max_tokens=1000), other], oracle) == [71, 3]
        assert admission.left([View(1, output_tokens=10, max_tokens=1000)], oracle) == [150]
        assert admission.left([View(2, output_tokens=1, max_tokens=1000)], oracle) == [299]

    def test_ends_of_one_replica_are_remembered_while_another_asks(self) -> None:
        admission, lengths = Admission(risk=0.3), {1: 80, 2: 80}
        oracle = Oracle(lengths)
        here, there = View(1, max_tokens=1000), View(2, max_tokens=1000)
        assert admission.left([here], oracle) == admission.left([there], oracle) == [80]
        lengths.update({1: 160, 2: 160})
        assert admission.left([here], oracle) == admission.left([there], oracle) == [80]
        assert admission.left([View(1, admissions=1, max_tokens=1000)], oracle) == [160]

    def test_a_bounded_number_of_ends_is_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("policies.admission.ENDS_KEPT", 2)
        admission, lengths = Admission(risk=0.3), {1: 80, 2: 80, 3: 80}
        views: list[SequenceView] = [View(each, max_tokens=1000) for each in lengths]
        admission.left(views, Oracle(lengths))
        assert admission.left(views[::-1], Oracle(dict.fromkeys(lengths, 160))) == [80, 80, 160]

    def test_less_risk_admits_less(self) -> None:
        histogram = Histogram()
        running = [View(each, held_blocks=4, max_tokens=4000) for each in range(10)]
        candidate = View(11, max_tokens=4000)

        def smallest_pool(risk: float) -> int:
            pools = range(10, 20_000, 10)
            return next(
                blocks
                for blocks in pools
                if Admission(risk).room(running, histogram, 4, blocks).fits(candidate, 4)
            )

        assert smallest_pool(0.5) < smallest_pool(0.3) < smallest_pool(0.0)
        assert smallest_pool(0.0) == pytest.approx(11 * (4 + 1000), abs=10)

    @pytest.mark.parametrize("risk", [-0.1, 1.1, float("nan")])
    def test_a_risk_that_makes_no_sense_is_refused(self, risk: float) -> None:
        with pytest.raises(ValueError, match="risk must be"):
            Admission(risk)
