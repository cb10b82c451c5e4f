"""Drawing tokens: which are kept, how often each is drawn, and that a draw depends on its request alone."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import sampler_cpu, sampler_torch
from engine.plan import Logprob, Placement, Sampling
from engine.sampler import Arithmetic, BrokenLogits, Drawn, Sampler
from engine.sampler_rows import noise_keys, request_keys

VOCABULARY = 1000
SAMPLINGS = (
    Sampling(temperature=0, logprobs=0),
    Sampling(seed=1),
    Sampling(seed=2, logprobs=3),
    Sampling(temperature=0.7, top_p=0.9, seed=3),
    Sampling(temperature=1.5, top_k=20, seed=4, logprobs=20),
    Sampling(top_k=200, top_p=0.5, seed=5, choice=1),
    Sampling(min_p=0.05, seed=6, choice=2, logprobs=1),
    Sampling(temperature=0.3, top_p=0.99, top_k=700, min_p=0.001, seed=2**64 - 1),
    Sampling(temperature=5, top_p=0.3, seed=8, suppressed=(1, 2, 900), suppressed_until=50),
)


@pytest.fixture(params=[sampler_cpu, sampler_torch], ids=["loops", "torch"])
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    found: Arithmetic = request.param
    return found


def random_logits(rows: int, vocabulary: int = VOCABULARY, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    return torch.randn(rows, vocabulary, generator=generator) * scale


def sampler_of(samplings: list[Sampling], vocabulary: int, arithmetic: Arithmetic = sampler_cpu) -> Sampler:
    sampler = Sampler(len(samplings), vocabulary, "cpu", arithmetic)
    for slot, sampling in enumerate(samplings):
        sampler.place(Placement(slot, sampling))
    return sampler


def draw_many(
    row: Tensor, sampling: Sampling, count: int, arithmetic: Arithmetic = sampler_cpu
) -> NDArray[np.int64]:
    """Tokens at positions 0 … count - 1, all from the same logits [V]."""
    sampler = sampler_of([sampling], len(row), arithmetic)
    drawn = sampler.sample(row.expand(count, -1).contiguous(), np.zeros(count, np.int64), np.arange(count))
    return drawn.tokens.numpy()


def one(row: Tensor, sampling: Sampling, arithmetic: Arithmetic, position: int = 0) -> int:
    sampler = sampler_of([sampling], len(row), arithmetic)
    return int(sampler.sample(row[None], np.array([0]), np.array([position])).tokens[0])


def kept_by_definition(row: Tensor, sampling: Sampling) -> set[int]:
    """The kept set by the definition in engine/sampler.py, in plain Python."""
    scaled = [value / sampling.temperature for value in row.tolist()]
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    if sampling.top_k:
        weights = weights[: sampling.top_k]
    sums = list(itertools.accumulate(weights))
    count = next(n for n, total in enumerate(sums, 1) if total >= sampling.top_p * sums[-1])
    return {token for token, weight in zip(order[:count], weights, strict=False) if weight >= sampling.min_p}


def chi_square(observed: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


# Which token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_takes_the_largest_logit(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    logits = random_logits(40).to(dtype)
    sampler = sampler_of([Sampling(temperature=0)], VOCABULARY, arithmetic)
    drawn = sampler.sample(logits, np.zeros(40, np.int64), np.arange(40))
    assert drawn.tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert drawn.logprobs() == (None,) * 40


def test_among_equal_logits_the_lowest_id_wins(arithmetic: Arithmetic) -> None:
    """Zero and minus zero are equal."""
    row = torch.full((300,), -1.0)
    row[[70, 200]], row[130] = 0.0, -0.0
    assert one(row, Sampling(temperature=0), arithmetic) == 70
    assert one(row.roll(60), Sampling(temperature=0), arithmetic) == 130
    assert one(row.roll(-70), Sampling(temperature=0), arithmetic) == 0
    assert one(row.roll(-71), Sampling(temperature=0), arithmetic) == 59


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=7),
        Sampling(top_p=0.6),
        Sampling(min_p=0.1),
        Sampling(temperature=2, top_p=0.5),
        Sampling(temperature=0.5, top_k=4, top_p=0.9),
        Sampling(top_k=12, top_p=0.8, min_p=0.2),
        Sampling(top_p=1e-9),
        Sampling(top_k=1),
        Sampling(min_p=1),
    ],
)
def test_exactly_the_kept_tokens_are_drawn(arithmetic: Arithmetic, sampling: Sampling) -> None:
    row = random_logits(1, 40, scale=1.5)[0]
    kept = kept_by_definition(row, sampling)
    assert 1 <= len(kept) < 40
    assert set(draw_many(row, sampling, 6000, arithmetic).tolist()) == kept


def test_filters_cut_through_equal_logits_by_id(arithmetic: Arithmetic) -> None:
    row = torch.zeros(200)
    assert set(draw_many(row, Sampling(top_k=3), 500, arithmetic).tolist()) == {0, 1, 2}
    assert set(draw_many(row, Sampling(top_p=0.02), 500, arithmetic).tolist()) == {0, 1, 2, 3}
    assert set(draw_many(row, Sampling(top_k=10, top_p=0.25), 500, arithmetic).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-6),
        Sampling(temperature=1e-320),
        Sampling(temperature=1e-6, top_p=1e-9, top_k=3, min_p=1.0),
        Sampling(temperature=100, top_p=1e-300),
    ],
)
def test_extreme_parameters_leave_the_largest_logit(arithmetic: Arithmetic, sampling: Sampling) -> None:
    row = random_logits(1)[0] * 1e30
    assert set(draw_many(row, sampling, 50, arithmetic).tolist()) == {int(row.argmax())}


def test_a_top_k_beyond_the_vocabulary_is_none(arithmetic: Arithmetic) -> None:
    row = random_logits(1, 50)[0]
    everything = draw_many(row, Sampling(seed=5), 100, arithmetic)
    assert draw_many(row, Sampling(seed=5, top_k=10**9), 100, arithmetic).tolist() == everything.tolist()


def test_a_vocabulary_of_one_token_gives_it(arithmetic: Arithmetic) -> None:
    for sampling in (Sampling(), Sampling(top_k=1, top_p=0.5), Sampling(temperature=0)):
        assert one(torch.tensor([-3.0]), sampling, arithmetic) == 0


def test_loops_and_torch_draw_the_same_tokens() -> None:
    """Over filters, shapes, ties and masked logits; most rows are really drawn, not greedy."""
    generator = np.random.default_rng(0)
    for trial in range(60):
        vocabulary = int(generator.choice([2, 63, 64, 65, 200, 1000, 3000]))
        logits = random_logits(16, vocabulary, float(generator.choice([0.01, 1, 3, 10, 40])))
        if trial % 3 == 1:
            logits = logits.round()
        if trial % 3 == 2:
            logits = logits.bfloat16()
        logits[:, vocabulary // 2 + 1 :: 7] = -torch.inf
        samplings = [some_sampling(generator, slot) for slot in range(16)]
        loops, plain = (
            sampler_of(samplings, vocabulary, by).sample(logits, np.arange(16), np.arange(16) + trial)
            for by in (sampler_cpu, sampler_torch)
        )
        assert loops.tokens.tolist() == plain.tokens.tolist()
        for mine, theirs in zip(loops.logprobs(), plain.logprobs(), strict=True):
            assert_close(mine, theirs)


def some_sampling(generator: np.random.Generator, slot: int) -> Sampling:
    return Sampling(
        temperature=float(generator.choice([1e-6, 0.3, 1, 2, 100])),
        top_p=float(generator.choice([1, 1 - 1e-12, 0.99, 0.9, 0.5, 1e-9])),
        top_k=int(generator.choice([0, 1, 2, 5, 50, 64, 65, 5000])),
        min_p=float(generator.choice([0, 0.01, 0.3, 1])),
        seed=int(generator.integers(2**63)),
        choice=slot % 3,
        logprobs=(None, 0, 3, 20)[slot % 4],
    )


def assert_close(mine: Logprob | None, theirs: Logprob | None) -> None:
    if mine is None or theirs is None:
        assert mine is theirs
        return
    assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-9)
    assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
    assert [value for _, value in mine.top] == pytest.approx([value for _, value in theirs.top], abs=1e-9)


# A draw depends on its request alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    """Token and log-probabilities, in another slot, at another row, among other requests."""
    logits = random_logits(63).to(dtype)
    assert (
        logits.numel() > sampler_cpu.ALONE_ELEMENTS
    )  # so the batch runs on all threads, a single row on one
    samplings = [SAMPLINGS[row % len(SAMPLINGS)] for row in range(63)]
    positions = np.arange(63) * 7
    together = sampler_of(samplings, VOCABULARY, arithmetic).sample(logits, np.arange(63), positions)
    order = np.random.default_rng(1).permutation(63)
    moved = sampler_of([samplings[row] for row in order], VOCABULARY, arithmetic)
    shuffled = moved.sample(logits[order], np.arange(63), positions[order])
    assert shuffled.tokens.tolist() == together.tokens[order].tolist()
    assert shuffled.logprobs() == tuple(together.logprobs()[row] for row in order)
    for row in range(63):
        sampler = sampler_of([Sampling(), samplings[row]], VOCABULARY, arithmetic)
        alone = sampler.sample(logits[row : row + 1], np.array([1]), positions[row : row + 1])
        assert alone.tokens.tolist() == [int(together.tokens[row])]
        assert alone.logprobs() == (together.logprobs()[row],)


def mixed(x: int) -> int:
    """SplitMix64's finaliser, in Python's own integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def gumbel_by_definition(seed: int, choice: int, position: int, token: int) -> float:
    bits = seed
    for part in (0, choice + 1, position + 1, token + 1):
        bits = mixed((bits + (part or 1) * 0x9E3779B97F4A7C15) % 2**64)
    return -math.log(-math.log1p(-((bits >> 12) + 0.5) / 2**52))


@pytest.mark.parametrize(("seed", "choice"), [(0, 0), (1234, 1), (2**64 - 1, 7)])
def test_seeded_answers_are_the_same_in_every_release(arithmetic: Arithmetic, seed: int, choice: int) -> None:
    """Pins the noise. If this fails, every client's seeds give other answers: say so in the changelog."""
    row = random_logits(1, scale=0.5)[0]
    values = row.tolist()
    expected = [
        max(
            range(VOCABULARY),
            key=lambda token: values[token] + gumbel_by_definition(seed, choice, position, token),
        )
        for position in range(5)
    ]
    assert len(set(expected)) > 1
    assert draw_many(row, Sampling(seed=seed, choice=choice), 5, arithmetic).tolist() == expected


def test_noise_differs_by_seed_choice_and_position() -> None:
    """No two of 60,000 combinations share a key."""
    grid = np.array(list(itertools.product(range(20), range(10), range(300))), np.int64)
    keys = noise_keys(request_keys(grid[:, 0].astype(np.uint64), grid[:, 1]), grid[:, 2])
    assert len(np.unique(keys)) == len(grid)


@pytest.mark.parametrize("slots", [[0, 1], [1, 0]])
def test_a_slot_placed_anew_forgets_its_former_request(slots: list[int]) -> None:
    """Suppressed tokens and log-probabilities included."""
    row = random_logits(1)
    best = int(row.argmax())
    sampler = sampler_of([Sampling()] * 2, VOCABULARY)
    for slot in slots:
        former = Sampling(temperature=0, suppressed=(best,), suppressed_until=10**6, logprobs=2)
        sampler.place(Placement(slot, former))
        assert sampler.sample(row, np.array([slot]), np.array([3])).tokens.tolist() != [best]
        sampler.place(Placement(slot, Sampling(temperature=0)))
        drawn = sampler.sample(row, np.array([slot]), np.array([3]))
        assert (drawn.tokens.tolist(), drawn.logprobs()) == ([best], (None,))


def test_warming_up_leaves_the_slots_as_they_are(arithmetic: Arithmetic) -> None:
    row = random_logits(1)[0]
    sampler = sampler_of([Sampling(temperature=0)], VOCABULARY, arithmetic)
    sampler.warm_up()
    drawn = sampler.sample(row[None], np.array([0]), np.array([0]))
    assert (drawn.tokens.tolist(), drawn.logprobs()) == ([int(row.argmax())], (None,))


# How often: chi-square against the 99.9 % point of its distribution, on fixed seeds

POINT_999 = {7: 24.32, 49: 85.35, 63: 103.44}  # by degrees of freedom


@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(seed: int, temperature: float) -> None:
    row = random_logits(1, 50, scale=1.0)[0]
    drawn = draw_many(row, Sampling(temperature=temperature, seed=seed), 40_000)
    expected = torch.softmax(row.double() / temperature, 0).numpy() * len(drawn)
    assert chi_square(np.bincount(drawn, minlength=50), expected) < POINT_999[49]


def test_filtered_tokens_come_as_often_as_their_softmax_says() -> None:
    row = random_logits(1, 300, scale=2.0)[0]
    sampling = Sampling(top_k=50, seed=9)
    kept = sorted(kept_by_definition(row, sampling))
    drawn = draw_many(row, sampling, 40_000)
    expected = torch.softmax(row[kept].double(), 0).numpy() * len(drawn)
    assert chi_square(np.bincount(drawn, minlength=300)[kept], expected) < POINT_999[49]


def pairs_of(firsts: NDArray[np.int64], seconds: NDArray[np.int64]) -> float:
    counts = np.bincount(firsts * 8 + seconds, minlength=64)
    return chi_square(counts, np.full(64, len(firsts) / 64))


def test_successive_positions_are_independent() -> None:
    drawn = draw_many(torch.zeros(8), Sampling(seed=3), 40_000)
    assert pairs_of(drawn[:-1], drawn[1:]) < POINT_999[63]


def test_choices_and_neighbouring_seeds_are_independent() -> None:
    base, choice, seed = (
        draw_many(torch.zeros(8), sampling, 40_000)
        for sampling in (Sampling(seed=3), Sampling(seed=3, choice=1), Sampling(seed=4))
    )
    assert pairs_of(base, choice) < POINT_999[63]
    assert pairs_of(base, seed) < POINT_999[63]
    assert pairs_of(choice, seed) < POINT_999[63]


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    """Whatever temperature, filters and suppression do to the draw."""
    logits = random_logits(8).to(dtype)
    best = int(logits[0].argmax())
    sampling = Sampling(temperature=3, top_k=40, logprobs=5, suppressed=(best,), suppressed_until=100)
    drawn = sampler_of([sampling], VOCABULARY, arithmetic).sample(logits, np.zeros(8, np.int64), np.arange(8))
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, token, logprob in zip(expected, drawn.tokens.tolist(), drawn.logprobs(), strict=True):
        assert logprob is not None
        assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-8)
        values = row.topk(5).values.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values, abs=1e-8)


def test_the_likeliest_of_equal_logits_are_listed_by_id(arithmetic: Arithmetic) -> None:
    """bf16 logits are equal often; one may ask for more than there are."""
    row = torch.tensor([0.0, 1.0, -0.0, 1.0, 2.0, 1.0])
    sampler = sampler_of([Sampling(temperature=0, logprobs=n) for n in (0, 3, 20)], 6, arithmetic)
    logprobs = sampler.sample(row.expand(3, -1), np.arange(3), np.arange(3)).logprobs()
    ids = [[token for token, _ in logprob.top] for logprob in logprobs if logprob]
    assert ids == [[], [4, 1, 3], [4, 1, 3, 5, 0, 2]]


# Suppressed tokens, broken logits


def test_suppressed_tokens_are_not_drawn_before_their_position(arithmetic: Arithmetic) -> None:
    """Each row by its own list and position; the logits stay as they were."""
    logits = random_logits(1).expand(4, -1).contiguous()
    before = logits.clone()
    first, second, third = logits[0].topk(3).indices.tolist()
    greedy = [
        Sampling(temperature=0, suppressed=(first,), suppressed_until=10),
        Sampling(temperature=0, suppressed=(second, first, first), suppressed_until=10),
        Sampling(temperature=0),
    ]
    sampler = sampler_of(greedy, VOCABULARY, arithmetic)
    drawn = sampler.sample(logits, np.array([0, 1, 2, 0]), np.array([9, 9, 9, 10]))
    assert drawn.tokens.tolist() == [second, third, first, first]
    assert torch.equal(logits, before)


def broken() -> Iterator[Tensor]:
    for value in (torch.nan, -torch.nan, torch.inf):
        row = torch.zeros(300)
        row[130] = value
        yield row
    yield torch.full((300,), -torch.inf)


@pytest.mark.parametrize("row", list(broken()), ids=["nan", "-nan", "inf", "all -inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_cannot_be_drawn_from_are_an_error(
    arithmetic: Arithmetic, row: Tensor, temperature: float
) -> None:
    sampler = sampler_of([Sampling(temperature=temperature, top_p=0.5, logprobs=1)], 300, arithmetic)
    logits = torch.stack([torch.zeros(300), row, torch.zeros(300)])
    with pytest.raises(BrokenLogits, match=r"rows \[1\] of 3"):
        sampler.sample(logits, np.zeros(3, np.int64), np.arange(3))


def test_an_error_found_on_a_device_comes_when_the_result_is_read() -> None:
    """Nothing waits before; both ways to read the result raise."""
    drawn = Drawn(torch.tensor([0, 0]), torch.tensor([True, False]), np.array([-1, -1]), None)
    with pytest.raises(BrokenLogits):
        drawn.check()
    with pytest.raises(BrokenLogits):
        drawn.logprobs()


def test_masked_logits_are_never_drawn(arithmetic: Arithmetic) -> None:
    row = torch.full((300,), -torch.inf)
    row[[5, 250]] = torch.tensor([0.0, 1.0])
    for sampling in (Sampling(), Sampling(top_p=0.999), Sampling(top_k=100), Sampling(temperature=100)):
        assert set(draw_many(row, sampling, 200, arithmetic).tolist()) == {5, 250}


def test_a_step_that_samples_nothing_gives_nothing(arithmetic: Arithmetic) -> None:
    drawn = sampler_of([Sampling()], 10, arithmetic).sample(
        torch.empty(0, 10), np.empty(0, int), np.empty(0, int)
    )
    assert (drawn.tokens.tolist(), drawn.logprobs()) == ([], ())
