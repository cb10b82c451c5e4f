"""Recorded passes: the bits of the calls they were made of, and nothing recorded that would not be done again."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.decode_steps import DecodeSteps
from engine.kernels.cpu import CpuKernels
from engine.kernels.cpu_program import Arena
from engine.plan import Placement, Row, Sampling
from engine.runner import ModelRunner, flatten
from tests.engine.models import SHAPES, load, runner_for

ROWS = 3


def decoding(runner: ModelRunner, position: int) -> list[Row]:
    """A token a slot at `position`, in blocks of its own."""
    return [
        Row(slot, position, (slot + position,), 0, (2 * slot, 2 * slot + 1), samples=True)
        for slot in range(ROWS)
    ]


def eager(runner: ModelRunner, rows: list[Row]) -> Tensor:
    for row in rows:
        runner.tables.write(row)
    with torch.inference_mode():
        return runner._model.forward(runner.batch(flatten(rows)), runner.pool)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_recorded_step_has_the_bits_of_a_step_in_python(
    model_directory: Callable[[str], Path], shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and KV, over twenty positions of three sequences; and it was the recording that gave them."""
    loaded = load(model_directory(shape), "cpu", dtype)
    recorded, plain = runner_for(loaded), runner_for(loaded)
    for runner in (recorded, plain):
        for slot in range(ROWS):
            runner.tables.place(Placement(slot, Sampling()))
    given: list[bool] = []
    logits = DecodeSteps.logits

    def noting(*arguments: Any) -> Tensor | None:
        found = logits(*arguments)
        given.append(found is not None)
        return found

    monkeypatch.setattr(DecodeSteps, "logits", noting)
    for position in range(20):
        found = recorded.logits(decoding(recorded, position))
        assert torch.equal(found, eager(plain, decoding(plain, position)))
    assert given == [True] * 20
    assert torch.equal(recorded.pool, plain.pool)


def test_scratch_that_a_recording_uses_stays_when_a_later_step_needs_more(
    model_directory: Callable[[str], Path],
) -> None:
    """Regression: attention's was made while the first step was recorded, and given back by the first long prompt."""
    runner = runner_for(load(model_directory("gqa"), "cpu", "float32"))
    for slot in range(ROWS):
        runner.tables.place(Placement(slot, Sampling()))
    kernels = cast(CpuKernels, runner._kernels)
    before = kernels._scratch
    runner.logits(decoding(runner, 0))
    used = weakref.ref(kernels._scratch)
    assert used() is not before
    runner.tables.place(Placement(ROWS, Sampling()))
    runner.logits([Row(ROWS, 0, (1,) * 60, 0, (10, 11, 12, 13), samples=True)])
    assert used() is not None
    assert used() is not kernels._scratch


def test_what_torch_computes_itself_is_not_recorded() -> None:
    """A pass with an addition of torch's in it; the kernels compute at once again afterwards."""
    kernels = CpuKernels(torch.float32)
    linear, x = kernels.linear(torch.ones(16, 16), None), torch.ones(2, 16)
    assert kernels.record(lambda: linear(x) + 1) is None
    assert torch.equal(linear(x), torch.full((2, 16), 16.0))
    run = kernels.record(lambda: linear(x).view(4, 8))
    assert run is not None
    assert torch.equal(run(), torch.full((4, 8), 16.0))
    x[:] = 2
    assert torch.equal(run(), torch.full((4, 8), 32.0))


def test_memory_is_lent_again_when_nobody_looks_at_it() -> None:
    """Neither the tensor nor a view of it."""
    arena = Arena()
    first = arena.lend((5, 5), torch.float32)
    address, view = first.data_ptr(), first[1:]
    del first
    second = arena.lend((7, 4), torch.float32)
    assert second.data_ptr() != address
    del view
    assert arena.lend((3, 20), torch.bfloat16).data_ptr() == address
    assert np.prod(second.shape) == 28


def test_large_results_get_the_memory_of_those_before_them() -> None:
    """So a pass over many tokens takes new pages from the system once, not each time."""
    kernels = CpuKernels(torch.float32)
    linear = kernels.linear(torch.ones(512, 64), None)
    first = linear(torch.ones(40, 64))
    address = first.data_ptr()
    assert linear(torch.ones(40, 64)).data_ptr() != address
    del first
    assert address in {linear(torch.ones(40, 64)).data_ptr(), linear(torch.ones(33, 64)).data_ptr()}
