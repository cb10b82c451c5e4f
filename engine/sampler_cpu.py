"""The sampler's arithmetic on a CPU: the entry to the compiled loops of sampler_loops.py.

What is drawn is defined in sampler.py; sampler_torch.py says the same in torch.
"""

import ctypes
from threading import local
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu_native import Clock, Native
from engine.kernels.cpu_team import team
from engine.sampler_loops import DrawArguments, SummaryArguments, draw_rows, summarise_rows
from engine.sampler_rows import Summary
from engine.sampler_table import Table

ALONE_ELEMENTS = 1 << 14  # fewer logits take some 10 µs: not worth releasing the interpreter lock for


class _OfThread(local):
    def __init__(self) -> None:
        self.clock = Clock()


_mine = _OfThread()


def draw(
    logits: Tensor, table: Table, slots: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [S], and bool [S]: whether the row could be drawn from. logits: fp32 or bf16 [S, V]."""
    logits = logits.contiguous()
    tokens = np.empty(len(slots), np.int64)
    arguments = DrawArguments(
        **_described(logits, len(slots)),
        tokens=tokens.ctypes.data,
        max_sequences=len(table.keys),
        slots=slots.ctypes.data,
        positions=positions.ctypes.data,
        **table.addresses,
    )
    _run(draw_rows, arguments)
    return torch.from_numpy(tokens), torch.from_numpy(tokens >= 0)


def summarise(logits: Tensor, wanted: NDArray[np.int64], tokens: Tensor, top: int) -> Summary:
    """What logprobs need of the rows `wanted` [A] of logits [S, V]; they drew `tokens`[wanted]."""
    logits = logits.contiguous()
    count, top = len(wanted), min(top, logits.shape[1])
    summary = Summary(
        peaks=torch.empty(count),
        masses=torch.empty(count, dtype=torch.int64),
        chosen=torch.empty(count),
        ids=torch.empty(count, top, dtype=torch.int64),
        values=torch.empty(count, top),
    )
    arguments = SummaryArguments(
        **_described(logits, count),
        tokens=tokens.data_ptr(),
        top=top,
        wanted=wanted.ctypes.data,
        peaks=summary.peaks.data_ptr(),
        masses=summary.masses.data_ptr(),
        chosen=summary.chosen.data_ptr(),
        ids=summary.ids.data_ptr(),
        values=summary.values.data_ptr(),
    )
    _run(summarise_rows, arguments)
    return summary


def released_seconds() -> float:
    """Seconds spent in the loops with the interpreter lock released, by all samplers on this thread."""
    return _mine.clock.seconds


def _described(logits: Tensor, rows: int) -> dict[str, int]:
    assert logits.dtype in (torch.float32, torch.bfloat16), logits.dtype
    return {
        "rows": rows,
        "vocabulary": logits.shape[1],
        "element": logits.element_size(),
        "logits": logits.data_ptr(),
    }


def _run(kernel: Native, arguments: Any) -> None:
    """On one thread or on all: the bits are the same, as a row is one thread's work."""
    arguments.counters = ctypes.addressof(arguments)
    if arguments.rows * arguments.vocabulary < ALONE_ELEMENTS:
        kernel.alone(arguments)
    else:
        team().run(kernel, arguments, _mine.clock)
