"""Plans to tokens on a device that finishes a step before `launch` returns (a CPU).

Owns the KV pool, the slots' block tables and their last tokens. Not here: layers (model/), their arithmetic
(kernels/), drawing (sampler.py), which thread this runs on (worker.py), overlapped launches (runner_cuda.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.decode_steps import DecodeSteps
from engine.kernels.protocol import Batch
from engine.model.decoder import Decoder
from engine.plan import PENDING, Logprob, Placement, Plan, Row, Sampling, StepResult
from engine.sampler import Sampler


@dataclass(slots=True)
class FlatRows:
    """A plan's rows as arrays on the host: T tokens of R rows, S of which sample, P of which are pending."""

    tokens: NDArray[np.int64]  # [T]; PENDING where not known yet
    positions: NDArray[np.int32]  # [T]
    row_starts: NDArray[np.int32]  # [R + 1]
    slots: NDArray[np.int32]  # [R]
    pending: NDArray[np.int64]  # [P], which tokens
    pending_slots: NDArray[np.int64]  # [P], whose last tokens they are
    sampled: NDArray[np.int64] | None  # [S], which tokens want logits; None: every token does
    sampled_slots: NDArray[np.int64]  # [S]
    sampled_positions: NDArray[np.int64]  # [S], where the drawn tokens will stand
    longest_row: int
    longest_context: int


_NONE = np.empty(0, dtype=np.int64)


def flatten(rows: Sequence[Row]) -> FlatRows:
    """Arrays from at least one row. A pending token is its row's only one."""
    if all(len(row.tokens) == 1 and row.samples for row in rows):
        return _flatten_decode(rows)
    return _flatten_mixed(rows)


def _flatten_decode(rows: Sequence[Row]) -> FlatRows:
    """Of single tokens that all sample: the commonest step, here in a third of the general time."""
    ids = [row.tokens[0] for row in rows]
    starts = [row.start for row in rows]
    slots = np.array([row.slot for row in rows], dtype=np.int64)
    tokens, positions = np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64)
    pending = np.flatnonzero(tokens == PENDING) if PENDING in ids else _NONE
    return FlatRows(
        tokens=tokens,
        positions=positions.astype(np.int32),
        row_starts=np.arange(len(rows) + 1, dtype=np.int32),
        slots=slots.astype(np.int32),
        pending=pending,
        pending_slots=slots[pending] if len(pending) else _NONE,
        sampled=None,
        sampled_slots=slots,
        sampled_positions=positions + 1,
        longest_row=1,
        longest_context=max(starts) + 1,
    )


def _flatten_mixed(rows: Sequence[Row]) -> FlatRows:
    lengths = [len(row.tokens) for row in rows]
    ends = [row.start + length for row, length in zip(rows, lengths, strict=True)]
    row_starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=row_starts[1:])
    firsts = np.array([row.start for row in rows], dtype=np.int32) - row_starts[:-1]
    slots = np.array([row.slot for row in rows], dtype=np.int32)
    tokens = np.array(list(chain.from_iterable(row.tokens for row in rows)), dtype=np.int64)
    samples = np.array([row.samples for row in rows], dtype=np.bool_)
    waits = np.array([row.tokens[0] == PENDING for row in rows], dtype=np.bool_)
    return FlatRows(
        tokens=tokens,
        positions=np.arange(len(tokens), dtype=np.int32) + np.repeat(firsts, lengths),
        row_starts=row_starts,
        slots=slots,
        pending=row_starts[:-1][waits].astype(np.int64),
        pending_slots=slots[waits].astype(np.int64),
        sampled=row_starts[1:][samples].astype(np.int64) - 1,
        sampled_slots=slots[samples].astype(np.int64),
        sampled_positions=np.array(ends, dtype=np.int64)[samples],
        longest_row=max(lengths),
        longest_context=max(ends),
    )


class BlockTables:
    """The slots' block tables on the host, and how far each is filled."""

    def __init__(self, max_sequences: int, max_blocks: int, block_size: int) -> None:
        self.array = np.zeros((max_sequences, max_blocks), dtype=np.int32)
        self._held = [0] * max_sequences
        self._block_size = block_size

    def place(self, placement: Placement) -> None:
        """The slot's table starts empty."""
        self._held[placement.slot] = 0

    def write(self, row: Row) -> None:
        """Writes the row's blocks where it says; the table must then hold all that the row computes."""
        held = self._held[row.slot]
        if row.blocks:
            end = row.blocks_at + len(row.blocks)
            assert row.blocks_at <= held, row  # no hole
            self.array[row.slot, row.blocks_at : end] = row.blocks
            held = self._held[row.slot] = max(held, end)
        assert row.tokens, row
        assert row.start + len(row.tokens) <= held * self._block_size, row

    def blocks(self, slot: int) -> NDArray[np.int32]:
        """A copy of the filled part."""
        return self.array[slot, : self._held[slot]].copy()


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was over when its launch returned."""

    result: StepResult

    def collect(self) -> StepResult:
        return self.result


class ModelRunner:
    """Implements plan.Runner. Every step runs to its end inside `launch`."""

    def __init__(
        self,
        model: Decoder,
        sampler: Sampler,
        *,
        kv_blocks: int,
        block_size: int,
        max_sequences: int,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Allocates the pool, and tables for contexts as long as the model and the pool allow.

        Of `model` only what is never written is shared with others: each runner may have a thread of its own.
        """
        model = self._model = model.twin()
        self._kernels = model.kernels
        self._sampler = sampler
        self._clock = clock
        self._block_size = block_size
        max_blocks = min(kv_blocks, -(-model.config.max_positions // block_size))
        with torch.inference_mode():
            self.pool = model.kernels.new_pool(kv_blocks, model.kv_shape(block_size))
            self.tables = BlockTables(max_sequences, max_blocks, block_size)
            self._tables = torch.from_numpy(self.tables.array)
        self._decode = DecodeSteps(model, self.pool, self._tables, max_blocks * block_size)
        self._last = np.zeros(max_sequences, dtype=np.int64)

    @property
    def exact(self) -> bool:
        return self._kernels.exact

    def launch(self, plan: Plan) -> Done:
        """Computes the plan; its result is ready when this returns."""
        started, released = self._clock(), self._released_seconds()
        for placement in plan.placements:
            self.tables.place(placement)
            self._sampler.place(placement)
        with torch.inference_mode():
            tokens, logprobs = self._step(plan.rows)
        seconds = self._clock() - started
        held = max(0.0, seconds - (self._released_seconds() - released))
        return Done(StepResult(plan.step, tokens, logprobs, seconds, held))

    def _released_seconds(self) -> float:
        return self._kernels.released_seconds + self._sampler.released_seconds

    def warm_up(self) -> None:
        """Takes what a first step would wait for (compilers, page faults).

        Leaves garbage in block 0: call it before anyone holds that.
        """
        tokens = (0,) * min(self._block_size, self._model.config.max_positions)
        prefill = Row(slot=0, start=0, tokens=tokens[:-1], blocks_at=0, blocks=(0,), samples=True)
        decode = Row(slot=0, start=len(tokens) - 1, tokens=(PENDING,), blocks_at=0, blocks=(), samples=True)
        self.launch(Plan(0, (Placement(0, Sampling()),), (prefill,)))
        self.launch(Plan(0, (), (decode,)))
        self._sampler.warm_up()

    def batch(self, flat: FlatRows) -> Batch:
        """The rows for the model."""
        return Batch(
            tokens=torch.from_numpy(flat.tokens),
            positions=torch.from_numpy(flat.positions),
            row_starts=torch.from_numpy(flat.row_starts),
            slots=torch.from_numpy(flat.slots),
            tables=self._tables,
            longest_row=flat.longest_row,
            longest_context=flat.longest_context,
            scratch={},
        )

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Computes the rows as a step does, but draws nothing: the logits of every token, [T, vocab_size]."""
        with torch.inference_mode():
            for row in rows:
                self.tables.write(row)
            flat = flatten(rows)
            flat.sampled = None
            return self._logits(flat).clone()

    def slabs(self, slot: int) -> Tensor:
        """A copy of the slot's blocks, [blocks, …] in the kernels' layout: what a snapshot keeps."""
        return self.pool.index_select(0, torch.from_numpy(self.tables.blocks(slot)))

    def _step(self, rows: Sequence[Row]) -> tuple[tuple[int, ...], tuple[Logprob | None, ...]]:
        """Tokens and log-probabilities of the rows that sample."""
        for row in rows:
            self.tables.write(row)
        flat = flatten(rows)
        logits = self._logits(flat)
        if not len(logits):
            return (), ()
        drawn = self._sampler.sample(logits, flat.sampled_slots, flat.sampled_positions)
        tokens = drawn.tokens.numpy()
        self._last[flat.sampled_slots] = tokens
        return tuple(tokens.tolist()), drawn.logprobs()

    def _logits(self, flat: FlatRows) -> Tensor:
        """Of the tokens that sample; good until the next step. Fills in pending tokens from their slots' last draws."""
        if len(flat.pending):
            flat.tokens[flat.pending] = self._last[flat.pending_slots]
        if flat.sampled is None and flat.longest_row == 1:
            logits = self._decode.logits(flat.tokens, flat.positions, flat.slots)
            if logits is not None:
                return logits
        sampled = None if flat.sampled is None else torch.from_numpy(flat.sampled)
        return self._model.forward(self.batch(flat), self.pool, sampled)
