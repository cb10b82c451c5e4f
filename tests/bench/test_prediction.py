"""The figures that say what predictions are worth are right where the answer is known."""

from random import Random

import pytest

from bench.batch_queue import Job
from bench.prediction import cells, compared, gain, information, predictable, ranked, table


def jobs(prompts: list[int], lengths: list[int]) -> list[Job]:
    return [
        Job(number, 0.0, prompt, length)
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def test_a_prompt_that_tells_all_tells_as_many_bits_as_there_are() -> None:
    prompts = [2 ** (each % 4) for each in range(4000)]
    assert information(jobs(prompts, [prompt * 100 for prompt in prompts]), seed=1) == pytest.approx(
        2, abs=0.02
    )


def test_a_prompt_that_tells_nothing_tells_no_bits() -> None:
    random = Random(1)
    prompts, lengths = ([random.randint(1, 4000) for _ in range(4000)] for _ in range(2))
    assert information(jobs(prompts, lengths), seed=1) == pytest.approx(0, abs=0.02)


def test_cells_predict_the_mean_of_their_kind() -> None:
    given = jobs([10, 11, 1000], [5, 7, 99])
    assert [cells(given).remaining(job) for job in given] == [6, 6, 99]


def test_pairs_are_ranked_by_what_was_predicted_and_ties_are_chance() -> None:
    given = jobs([1] * 3, [10, 20, 30])
    assert ranked(given, seed=1, pairs=1000) == 0.5
    for job in given:
        job.expected_remaining_tokens = job.length
    assert ranked(given, seed=1, pairs=1000) == 1.0
    for job in given:
        job.expected_remaining_tokens = -job.length
    assert ranked(given, seed=1, pairs=1000) == 0.0


def test_where_lengths_are_predictable_the_histogram_reaches_most_of_what_the_oracle_gains() -> None:
    """The goal, on a short run: it learns meanwhile."""
    rows = [{"trace": "predictable", **row} for row in compared(predictable(2000, seed=1), [0.95], seed=1)]
    assert gain({row["policy"]: row for row in rows}, "sjf, histogram") >= 0.8
    assert table(rows).row_count == 1
