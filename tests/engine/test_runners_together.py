"""Runners of one model on threads of their own, at the same time: each computes what it computes alone, to the bit.

They share the weights. Which thread a runner was made and warmed up on does not matter.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.loading import Loaded
from engine.plan import PENDING, Placement, Plan, Row, Sampling, StepResult
from engine.runner import ModelRunner
from tests.engine.models import load, random_tokens, runner_for

RUNNERS = 3
SEQUENCES = 6
BLOCKS_EACH = 8
PROMPT_TOKENS, CHUNK, OUTPUT_TOKENS = 50, 24, 24
Directories = Callable[[str], Path]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def sampling(seed: int) -> Sampling:
    """One of each kind."""
    kinds = (
        Sampling(temperature=0.0),
        Sampling(seed=seed, top_p=0.9),
        Sampling(seed=seed, top_k=20, logprobs=3),
        Sampling(seed=seed, repetition_penalty=1.3, frequency_penalty=0.2),
        Sampling(seed=seed, min_p=0.05, suppressed=(1, 2, 3), suppressed_until=10**6),
        Sampling(seed=seed, temperature=0.7, logit_bias=((5, 4.0), (9, -3.0))),
    )
    return kinds[seed % len(kinds)]


def plans(vocabulary: int, seed: int) -> Iterator[Plan]:
    """Sequences that come two steps apart, their prompts in chunks beside the others' decoding, then decoding alone."""
    prompts = [
        random_tokens(PROMPT_TOKENS - 7 * slot, vocabulary, 100 * seed + slot) for slot in range(SEQUENCES)
    ]
    computed, drawn = [0] * SEQUENCES, [0] * SEQUENCES
    step = 0
    while min(drawn) < OUTPUT_TOKENS:
        placements, rows = [], []
        for slot, prompt in enumerate(prompts):
            if step < 2 * slot or drawn[slot] == OUTPUT_TOKENS:
                continue
            first, start = not computed[slot], computed[slot]
            if first:
                chosen = sampling(seed + slot)
                history = tuple(prompt) if chosen.penalises else ()
                placements.append(Placement(slot, chosen, history, len(history)))
            tokens = tuple(prompt[start : start + CHUNK]) or (PENDING,)
            blocks = tuple(range(slot * BLOCKS_EACH, (slot + 1) * BLOCKS_EACH)) if first else ()
            computed[slot] += len(tokens)
            samples = computed[slot] >= len(prompt)
            drawn[slot] += samples
            rows.append(Row(slot, start, tokens, 0 if first else BLOCKS_EACH, blocks, samples))
        yield Plan(step, tuple(placements), tuple(rows))
        step += 1


@dataclass(frozen=True)
class Run:
    drawn: list[StepResult]
    pool: Tensor

    def same_as(self, other: "Run") -> bool:
        return [(r.tokens, r.logprobs) for r in self.drawn] == [
            (r.tokens, r.logprobs) for r in other.drawn
        ] and torch.equal(self.pool.view(torch.uint8), other.pool.view(torch.uint8))


def made(loaded: Loaded) -> ModelRunner:
    """Warmed up on this thread: a step of one row is recorded then."""
    runner = runner_for(loaded, kv_blocks=SEQUENCES * BLOCKS_EACH, max_sequences=SEQUENCES)
    runner.warm_up()
    with torch.inference_mode():
        runner.pool.zero_()  # of what warming up has left
    return runner


def run(runner: ModelRunner, seed: int, begin: Barrier | None = None) -> Run:
    if begin is not None:
        begin.wait(60)
    vocabulary = runner._model.config.vocab_size
    drawn = [runner.launch(plan).collect() for plan in plans(vocabulary, seed)]
    return Run(drawn, runner.pool.clone())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_runners_at_once_compute_what_each_computes_alone(
    model_directory: Directories, dtype: str, threads: int
) -> None:
    """Prompt chunks, decoding and every kind of sampling, each runner on a thread and a team of its own."""
    loaded = load(model_directory("shipped"), "cpu", dtype)
    with torch_threads(threads):
        alone = [run(made(loaded), seed) for seed in range(RUNNERS)]
        assert not alone[0].same_as(alone[1])
        runners, begin = [made(loaded) for _ in range(RUNNERS)], Barrier(RUNNERS)
        with ThreadPoolExecutor(RUNNERS) as threads_of_runners:
            together = list(threads_of_runners.map(run, runners, range(RUNNERS), [begin] * RUNNERS))
    assert [one.same_as(other) for one, other in zip(alone, together, strict=True)] == [True] * RUNNERS
    assert all(len(runner._decode._steps) > 1 for runner in runners)  # decoding was recorded


def test_weights_are_shared_and_nothing_else(model_directory: Directories) -> None:
    """A twin reads the same memory; kernels, and what layers write their arguments to, are its own."""
    model = load(model_directory("gqa"), "cpu", "float32").model
    one, other = model.twin(), model.twin()
    assert one.kernels is not other.kernels
    for mine, its in zip(_linears(one), _linears(other), strict=True):
        assert mine is not its
        assert mine.packed is its.packed
    assert one._embedding is other._embedding


def _linears(model: Decoder) -> list[Any]:
    layers = [getattr(layer, name) for layer in model._layers for name in ("qkv", "out", "gate_up", "down")]
    return [*layers, model._head]
