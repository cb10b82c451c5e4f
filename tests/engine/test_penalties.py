"""Penalties and logit bias: the arithmetic by a plain reference, and that a draw depends on its request alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import sampler_cpu, sampler_torch
from engine.plan import Placement, Sampling
from engine.sampler import Arithmetic, Sampler

VOCABULARY = 300
F32 = np.float32
WISHES = (
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.7),
    Sampling(frequency_penalty=0.8),
    Sampling(frequency_penalty=-1.5, presence_penalty=2.0),
    Sampling(presence_penalty=-0.9),
    Sampling(logit_bias=((3, 2.5), (9, -100.0))),
    Sampling(1.0, 0.9, 40, repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=0.1, seed=5),
    Sampling(repetition_penalty=2.0, logit_bias=tuple((token, token / 7 - 20) for token in range(0, 300, 2))),
    Sampling(seed=9),  # asks for nothing
)


@pytest.fixture(params=[sampler_cpu, sampler_torch], ids=["loops", "torch"])
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    found: Arithmetic = request.param
    return found


def some_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def by_definition(row: Tensor, sampling: Sampling, history: Sequence[int], prompt_tokens: int) -> list[F32]:
    """engine/sampler_penalties.py's four steps, number by number, in fp32."""
    found, generated = [F32(value) for value in row.tolist()], list(history[prompt_tokens:])
    for token, bias in sampling.logit_bias:
        found[token] += F32(bias)
    penalty = F32(sampling.repetition_penalty)
    for token in set(history):
        found[token] = found[token] / penalty if found[token] > 0 else found[token] * penalty
    for token in set(generated):
        found[token] -= F32(sampling.frequency_penalty) * F32(generated.count(token))
        found[token] -= F32(sampling.presence_penalty)
    return found


def sampler_of(placements: Sequence[Placement], arithmetic: Arithmetic) -> Sampler:
    sampler = Sampler(len(placements), VOCABULARY, "cpu", arithmetic)
    for placement in placements:
        sampler.place(placement)
    return sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_changed_as_defined(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    """To the bit: greedy draws, one after the other, take the largest of what the definition gives."""
    prompt, greedy = (5, 7, 7, 250), [replace(wishes, temperature=0) for wishes in WISHES]
    sampler = sampler_of([Placement(s, each, prompt, 4) for s, each in enumerate(greedy)], arithmetic)
    histories = [list(prompt) for _ in greedy]
    slots, bare = np.arange(len(greedy)), 0
    for step in range(40):
        logits = some_logits(1, step // 8).expand(len(greedy), -1).contiguous().to(dtype)
        before = logits.clone()
        tokens = sampler.sample(logits, slots, slots + step).tokens.tolist()
        assert torch.equal(logits, before), "the model's logits are left alone"
        for token, history, sampling, row in zip(tokens, histories, greedy, logits, strict=True):
            wanted = by_definition(row, sampling, history, len(prompt))
            assert token == wanted.index(max(wanted))
            bare += token == int(row.argmax())
            history.append(token)
    assert bare < 30 * len(greedy), "the wishes hardly mattered"


def drawn(sampler: Sampler, slot: int, steps: range) -> list[int]:
    """One token a step, from logits that depend on the step."""
    return [
        int(sampler.sample(some_logits(1, step % 5), np.array([slot]), np.array([10 + step])).tokens[0])
        for step in steps
    ]


@pytest.mark.parametrize("sampling", WISHES)
@pytest.mark.parametrize("kept", [0, 1, 17])
def test_a_sequence_that_comes_back_draws_as_if_it_had_stayed(
    arithmetic: Arithmetic, sampling: Sampling, kept: int
) -> None:
    """Its history goes along with its placement, into another slot that was another's before."""
    prompt = tuple(range(20, 30))
    whole = drawn(sampler_of([Placement(0, sampling, prompt, 10)], arithmetic), 0, range(30))
    others = [Placement(slot, WISHES[slot], (1, 2, 3), 1) for slot in range(4)]
    sampler = sampler_of(others, arithmetic)
    first, second = Placement(2, sampling, prompt, 10), Placement(3, sampling, (*prompt, *whole[:kept]), 10)
    sampler.place(first)
    assert drawn(sampler, 2, range(kept)) == whole[:kept]
    sampler.place(second)
    assert drawn(sampler, 3, range(kept, 30)) == whole[kept:]


def test_a_row_is_drawn_alone_as_in_any_batch(arithmetic: Arithmetic) -> None:
    """Those that ask beside those that do not; bf16 logits of the others are drawn as without company."""
    logits = some_logits(len(WISHES)).bfloat16()
    placements = [Placement(slot, each, (4, 8, 8, 8), 2) for slot, each in enumerate(WISHES)]
    slots = np.arange(len(WISHES))
    together = sampler_of(placements, arithmetic).sample(logits, slots, slots)
    for slot, placement in enumerate(placements):
        sampler = sampler_of([replace(placement, slot=0)], arithmetic)
        alone = sampler.sample(logits[slot : slot + 1], np.array([0]), np.array([slot]))
        assert alone.tokens.tolist() == [int(together.tokens[slot])]


def test_log_probabilities_are_of_the_raw_logits(arithmetic: Arithmetic) -> None:
    logits, history = some_logits(1), tuple(range(200))
    asked = Sampling(temperature=0, repetition_penalty=3, presence_penalty=2, logprobs=5)
    asked = replace(asked, logit_bias=((7, 50.0),))
    found = sampler_of([Placement(0, asked, history, 100)], arithmetic).sample(
        logits, np.array([0]), np.array([200])
    )
    raw = torch.log_softmax(logits[0].double(), 0)
    [logprob] = found.logprobs()
    assert found.tokens.tolist() == [7]
    assert logprob is not None
    assert logprob.logprob == pytest.approx(float(raw[7]), abs=1e-8)
    assert [token for token, _ in logprob.top] == raw.topk(5).indices.tolist()


def test_a_bias_of_100_decides_and_min_tokens_overrules_it(arithmetic: Arithmetic) -> None:
    """What may not end yet does not, however much it is wished for."""
    wished = Sampling(temperature=0.5, logit_bias=((11, 100.0), (12, 90.0)), seed=1)
    sampler = sampler_of([Placement(0, wished)], arithmetic)
    assert drawn(sampler, 0, range(5)) == [11] * 5
    sampler.place(Placement(0, replace(wished, suppressed=(11,), suppressed_until=13)))
    assert drawn(sampler, 0, range(5)) == [12, 12, 12, 11, 11]
    sampler.place(Placement(0, Sampling(temperature=0, logit_bias=((11, -100.0),))))
    assert 11 not in drawn(sampler, 0, range(20))


def test_a_slot_placed_anew_forgets_and_counts_are_used_again(arithmetic: Arithmetic) -> None:
    """However many sequences come and go, no more counts are kept than slots."""
    sampler, plain = (
        sampler_of([Placement(slot, Sampling()) for slot in range(3)], arithmetic),
        Sampling(seed=2),
    )
    expected = drawn(sampler, 1, range(3))
    for number in range(20):
        asking = replace(WISHES[number % len(WISHES)], seed=number)
        sampler.place(Placement(number % 3, asking, tuple(range(50)), 25))
        drawn(sampler, number % 3, range(2))
        sampler.place(Placement(1, Sampling()))
        assert drawn(sampler, 1, range(3)) == expected
    assert len(sampler._penalties._counts) <= 4
    for slot in range(3):
        sampler.place(Placement(slot, plain))
    assert not sampler._penalties.active
