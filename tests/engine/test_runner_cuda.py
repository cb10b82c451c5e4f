"""The overlapped runner's logic on the CPU: a device that queues nothing, and the reference kernels.

Packing, padding, tables and last tokens kept on the device, pending tokens: the plans' results must be those
of ModelRunner, to the bit. What a card adds (streams, graphs) is in tests/gpu/test_runner.py.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device_cuda import Mark
from engine.kernels.protocol import AttentionShape, Batch
from engine.kernels.reference import ReferenceKernels
from engine.model.decoder import Decoder
from engine.model.loading import load_model
from engine.model.random_weights import llama_config, write_random_llama
from engine.plan import PENDING, Placement, Plan, Row, Runner, Sampling, StepResult
from engine.runner import ModelRunner, flatten
from engine.runner_cuda import CudaRunner, decode_inputs, graph_sizes
from engine.sampler import Sampler

BLOCK, BLOCKS, SLOTS = 4, 32, 6
CPU = torch.device("cpu")


class NoWait:
    def wait(self) -> None: ...

    def seconds_since(self, earlier: object) -> float:
        return 0.25


class InlineDevice:
    """A StreamedDevice whose queue is always empty. A captured work runs again, into the same result."""

    def __init__(self) -> None:
        self.replays = 0

    def queue(self) -> AbstractContextManager[None]:
        return nullcontext()

    def upload(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array.copy())

    def download(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def mark(self) -> Mark:
        return NoWait()

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        result = work()

        def replay() -> Tensor:
            self.replays += 1
            return result.copy_(work())

        return replay


class PaddedReference(ReferenceKernels):
    """The reference, for batches with empty rows: it leaves them out, and fills padding tokens with NaN."""

    def attend(
        self, pool: Tensor, layer: int, qkv: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch
    ) -> Tensor:
        held = batch.row_starts.diff() > 0
        end = int(batch.row_starts[-1])
        starts = torch.cat([batch.row_starts[:-1][held], batch.row_starts[-1:]])
        real = replace(batch, row_starts=starts, slots=batch.slots[held], positions=batch.positions[:end])
        padding = qkv.new_full((len(qkv) - end, shape.heads * shape.head_dim), torch.nan)
        if not end:
            return padding
        return torch.cat([super().attend(pool, layer, qkv[:end], rope, shape, real), padding])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory: Path = tmp_path_factory.mktemp("model")
    write_random_llama(directory, llama_config(vocab_size=300, max_position_embeddings=64))
    loaded = load_model(
        directory, device=CPU, dtype="float32", kernels=lambda device, dtype: PaddedReference(dtype, device)
    )
    return loaded.model


def plain(model: Decoder) -> ModelRunner:
    return ModelRunner(
        model, Sampler(SLOTS, 300, CPU), kv_blocks=BLOCKS, block_size=BLOCK, max_sequences=SLOTS
    )


def overlapped(model: Decoder, device: InlineDevice, *, graphs: bool) -> CudaRunner:
    return CudaRunner(
        model,
        Sampler(SLOTS, 300, CPU),
        kv_blocks=BLOCKS,
        block_size=BLOCK,
        max_sequences=SLOTS,
        device=device,
        graphs=graphs,
    )


def plans() -> tuple[Plan, ...]:
    """Prefill in chunks, mixed steps, pending decodes, a step that samples nothing, a slot taken anew."""

    def row(
        slot: int, start: int, tokens: Sequence[int], at: int, blocks: Sequence[int], samples: bool
    ) -> Row:
        return Row(slot, start, tuple(tokens), at, tuple(blocks), samples)

    warm = Sampling(
        temperature=0.9, top_p=0.9, seed=7, logprobs=2, repetition_penalty=1.4, presence_penalty=0.5
    )
    biased = Sampling(seed=3, logit_bias=((8, 1.5),))
    placed = (
        Placement(0, Sampling(temperature=0, frequency_penalty=0.2), tuple(range(10, 17)), 7),
        Placement(2, warm, tuple(range(40, 47)), 7),
        Placement(5, biased),
    )
    first = (
        row(0, 0, range(10, 17), 0, (3, 9), True),
        row(2, 0, range(40, 44), 0, (5,), False),
        row(5, 0, (7,), 0, (30,), True),
    )
    mixed = (
        row(0, 7, (PENDING,), 2, (), True),
        row(2, 4, range(44, 47), 1, (11,), True),
        row(5, 1, (PENDING,), 1, (), True),
    )
    decode = (
        row(0, 8, (PENDING,), 2, (1,), True),
        row(2, 7, (PENDING,), 2, (), True),
        row(5, 2, (8,), 1, (), False),
    )
    later = (row(5, 3, (9,), 1, (), True), row(0, 9, (PENDING,), 3, (), True))
    again = (row(5, 0, (1, 2), 0, (30,), True), row(2, 8, (PENDING,), 2, (8,), True))
    quiet = (row(5, 2, (4,), 1, (), False),)
    return (
        Plan(1, placed, first),
        Plan(2, (), mixed),
        Plan(3, (), decode),
        Plan(4, (), later),
        Plan(5, (Placement(5, warm, (1, 2), 2),), again),
        Plan(6, (), quiet),
    )


def results(runner: Runner) -> list[StepResult]:
    """Each plan launched before its predecessor is collected, as the engine does on a card."""
    launched = [runner.launch(plan) for plan in plans()]
    return [step.collect() for step in launched]


@pytest.mark.parametrize("graphs", [False, True])
def test_results_are_the_plain_runners(graphs: bool, model: Decoder) -> None:
    """Tokens, log-probabilities and KV, with padded graphs and without."""
    expected, device = plain(model), InlineDevice()
    ours = overlapped(model, device, graphs=graphs)
    theirs = results(expected)
    found = results(ours)
    assert [(step.step, step.tokens, step.logprobs) for step in found] == [
        (step.step, step.tokens, step.logprobs) for step in theirs
    ]
    assert any(logprob for step in found for logprob in step.logprobs)
    assert torch.equal(ours.pool, expected.pool)
    assert torch.equal(ours.slabs(0), expected.slabs(0))
    assert device.replays == (3 if graphs else 0)
    assert all(step.seconds == 0.25 for step in found)


def test_warm_up_captures_every_size(model: Decoder) -> None:
    """Afterwards no step waits for a capture."""
    runner = overlapped(model, InlineDevice(), graphs=True)
    runner.warm_up()
    assert runner.captured == graph_sizes(SLOTS) == (1, 2, 4, 6)
    assert results(runner)[0].tokens == results(overlapped(model, InlineDevice(), graphs=True))[0].tokens


def test_graph_sizes_end_with_the_largest() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(8) == (1, 2, 4, 8)
    assert graph_sizes(9) == (1, 2, 4, 8, 9)


def test_padding_rows_begin_where_they_end() -> None:
    """So kernels find nothing in them, and tokens beyond the last row belong to none."""
    flat = flatten(plans()[2].rows)
    tokens, positions, slots, starts = np.split(decode_inputs(flat, 4), [4, 8, 12])
    assert tokens.tolist() == [PENDING, PENDING, 8, 0]
    assert positions.tolist() == [8, 7, 2, 0]
    assert slots.tolist() == [0, 2, 5, 0]
    assert starts.tolist() == [0, 1, 2, 3, 3]
