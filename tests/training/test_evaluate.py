"""The measures: 3-gram chances sum to one, windows score each token once, the word overlap is an F1."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluate import Trigram, overlap, windows

SMALL = st.lists(st.integers(0, 7), min_size=1, max_size=60)


@given(st.lists(SMALL, min_size=1, max_size=4), SMALL)
def test_the_chances_of_all_next_tokens_sum_to_one(training: list[list[int]], before: list[int]) -> None:
    model = Trigram([np.array(ids, dtype=np.int16) for ids in training], 8)

    def bits(ids: list[int]) -> float:
        return model.bits(np.array(ids, dtype=np.int16))

    chances = [2 ** (bits(before) - bits([*before, token])) for token in range(8)]
    assert sum(chances) == pytest.approx(1.0)


def test_the_trigram_model_learns_a_pattern() -> None:
    model = Trigram([np.array([1, 2, 3] * 50, dtype=np.int16)], 8)
    known, unknown = (model.bits(np.array(ids * 5, dtype=np.int16)) for ids in ([1, 2, 3], [3, 2, 1]))
    assert known < 0.2 * unknown


@given(st.integers(1, 70), st.sampled_from([8, 16]))
def test_windows_score_every_token_once_with_at_least_half_a_context(length: int, context: int) -> None:
    ids = np.arange(1, length + 1, dtype=np.int16)
    scored: list[int] = []
    for window, fresh in windows(ids, context):
        assert len(window) <= context + 1
        assert len(window) - fresh > min(context // 2 - 1, window[-1] - fresh)
        scored += window[-fresh:].tolist()
    assert scored == ids.tolist()


def test_overlap_is_the_f1_of_shared_words() -> None:
    assert overlap("The cat.", "the cat") == 1.0
    assert overlap("a dog", "the cat") == 0.0
    assert overlap("the cat", "the cat sat down") == pytest.approx(2 / 3)
