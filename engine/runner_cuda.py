"""Plans to tokens on a device with a queue (CUDA): `launch` queues a step and returns, `collect` waits for
it.

Nothing in a step waits for the device. All that a step needs goes up in one pinned copy; block tables and
last tokens stay on the device; PENDING tokens are read from there. A step of single-token rows runs a
captured graph for the next larger number of rows, its padding rows empty. Other steps are queued kernel by
kernel.

Proven on the CPU with a device that has no queue (tests/engine/test_runner_cuda.py); not yet run on a card.
Not here: a device that finishes a step at once (runner.py, whose host-side state this shares), streams and
graphs themselves (device_cuda.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device_cuda import CudaDevice, Mark, StreamedDevice
from engine.kernels.protocol import Batch
from engine.model.decoder import Decoder
from engine.plan import PENDING, Placement, Plan, Row, Sampling, StepResult
from engine.runner import BlockTables, FlatRows, flatten
from engine.sampler import Drawn, Sampler

Integers = NDArray[np.int64]


def graph_sizes(max_sequences: int) -> tuple[int, ...]:
    """Numbers of rows that decode graphs are captured for: powers of two, and the most there can be."""
    powers = (1 << exponent for exponent in range(max_sequences.bit_length()))
    return (*(size for size in powers if size < max_sequences), max_sequences)


def decode_inputs(flat: FlatRows, size: int) -> Integers:
    """A decode step for a graph of `size` rows: tokens, positions, slots [size], row_starts [size + 1]."""
    rows = len(flat.slots)
    packed = np.zeros(4 * size + 1, dtype=np.int64)
    packed[:rows] = flat.tokens
    packed[size : size + rows] = flat.positions
    packed[2 * size : 2 * size + rows] = flat.slots
    packed[3 * size :] = rows  # padding rows begin where they end
    packed[3 * size : 3 * size + rows + 1] = flat.row_starts
    return packed


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step queued on the device. Implements plan.Launched."""

    step: int
    begun: Mark
    ended: Mark
    tokens: Tensor | None  # on the host once `ended` has passed; None: nothing was sampled
    drawn: Drawn | None
    gil_seconds: float

    def collect(self) -> StepResult:
        """Waits for the step.

        `seconds` is device time; its first collect raises what the sampler found (BrokenLogits).
        """
        self.ended.wait()
        seconds = self.ended.seconds_since(self.begun)
        if self.tokens is None or self.drawn is None:
            return StepResult(self.step, (), (), seconds, self.gil_seconds)
        logprobs = self.drawn.logprobs()
        return StepResult(self.step, tuple(self.tokens.tolist()), logprobs, seconds, self.gil_seconds)


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    inputs: Tensor  # as decode_inputs packs them
    run: Callable[[], Tensor]  # -> logits [size, vocabulary]


class CudaRunner:
    """Implements plan.Runner for a model on a CUDA device; the plans of one thread, in order."""

    def __init__(
        self,
        model: Decoder,
        sampler: Sampler,
        *,
        kv_blocks: int,
        block_size: int,
        max_sequences: int,
        device: StreamedDevice | None = None,
        graphs: bool = True,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """As ModelRunner.

        device: None is the model's card; graphs=False queues decode steps kernel by kernel.
        """
        model = self._model = model.twin()
        self._sampler = sampler
        self._clock = clock
        self._device = device or CudaDevice(model.device)
        self._sizes = graph_sizes(max_sequences) if graphs else ()
        self._graphs: dict[int, DecodeGraph] = {}
        self._block_size = block_size
        max_blocks = min(kv_blocks, -(-model.config.max_positions // block_size))
        self._max_context = max_blocks * block_size
        self.tables = BlockTables(max_sequences, max_blocks, block_size)
        with torch.inference_mode(), self._device.queue():
            self.pool = model.kernels.new_pool(kv_blocks, model.kv_shape(block_size))
            self._tables = torch.zeros((max_sequences, max_blocks), dtype=torch.int32, device=model.device)
            self._last = torch.zeros(max_sequences, dtype=torch.int64, device=model.device)

    @property
    def exact(self) -> bool:
        return self._model.kernels.exact

    @property
    def captured(self) -> tuple[int, ...]:
        """The numbers of rows that have a graph."""
        return tuple(sorted(self._graphs))

    def launch(self, plan: Plan) -> InFlight:
        """Queues the plan. Waits for nothing, but for a capture the first time a size is met."""
        started = self._clock()
        with torch.inference_mode(), self._device.queue():
            for placement in plan.placements:
                self.tables.place(placement)
                self._sampler.place(placement)
            flat = flatten(plan.rows)
            size = next((size for size in self._sizes if size >= len(plan.rows)), None)
            graph = self._graph(size) if size is not None and flat.longest_row == 1 else None
            begun = self._device.mark()
            self._extend_tables(plan.rows)
            logits = self._logits(flat, flat.sampled) if graph is None else self._replay(graph, flat)
            drawn = self._draw(logits, flat)
            tokens = None if drawn is None else self._device.download(drawn.tokens)
            ended = self._device.mark()
        return InFlight(plan.step, begun, ended, tokens, drawn, self._clock() - started)

    def warm_up(self) -> None:
        """Compiles and captures what steps would wait for.

        Leaves garbage in block 0, which nobody holds yet.
        """
        tokens = (0,) * min(self._block_size, self._model.config.max_positions)
        prefill = Row(slot=0, start=0, tokens=tokens[:-1], blocks_at=0, blocks=(0,), samples=True)
        decode = Row(slot=0, start=len(tokens) - 1, tokens=(PENDING,), blocks_at=1, blocks=(), samples=True)
        self.launch(Plan(0, (Placement(0, Sampling()),), (prefill,))).collect()
        self.launch(Plan(0, (), (decode,))).collect()
        with torch.inference_mode(), self._device.queue():
            for size in self._sizes:
                self._graph(size)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Computes rows as a step does, draws nothing: all tokens' logits [T, vocab_size], on the host."""
        with torch.inference_mode(), self._device.queue():
            self._extend_tables(rows)
            flat = flatten(rows)
            found = self._device.download(self._logits(flat, np.arange(len(flat.tokens))))
            self._device.mark().wait()
        return found

    def slabs(self, slot: int) -> Tensor:
        """A copy of the slot's blocks, [blocks, …] in the kernels' layout, on the host.

        Waits for the device.
        """
        with torch.inference_mode(), self._device.queue():
            blocks = self._device.upload(self.tables.blocks(slot).astype(np.int64))
            copy = self._device.download(self.pool.index_select(0, blocks))
            self._device.mark().wait()
        return copy

    def _extend_tables(self, rows: Sequence[Row]) -> None:
        """The rows' new blocks, to the host's tables and to the device's."""
        width = self._tables.shape[1]
        at: list[int] = []
        for row in rows:
            self.tables.write(row)
            first = row.slot * width + row.blocks_at
            at.extend(range(first, first + len(row.blocks)))
        if at:
            blocks = [block for row in rows for block in row.blocks]
            sent = self._device.upload(np.array([at, blocks], dtype=np.int64))
            self._tables.view(-1).index_copy_(0, sent[0], sent[1].int())

    def _logits(self, flat: FlatRows, sampled: Integers | None) -> Tensor:
        """Logits of the tokens `sampled` (None: all), [S, vocabulary], kernel by kernel."""
        sampled = np.arange(len(flat.tokens)) if sampled is None else sampled
        arrays = (
            flat.tokens,
            flat.positions,
            flat.slots,
            flat.row_starts,
            flat.pending,
            flat.pending_slots,
            sampled,
        )
        sent = self._device.upload(np.concatenate(arrays, dtype=np.int64))
        tokens, positions, slots, starts, pending, pending_slots, wanted = torch.split(
            sent, [len(a) for a in arrays]
        )
        if len(flat.pending):
            tokens = tokens.index_copy(0, pending, self._last.index_select(0, pending_slots))
        batch = self._batch(tokens, positions, slots, starts, flat.longest_row, flat.longest_context)
        return self._model.forward(batch, self.pool, wanted)

    def _replay(self, graph: DecodeGraph, flat: FlatRows) -> Tensor:
        """Logits of the sampling rows of a pure decode step, by a graph."""
        graph.inputs.copy_(self._device.upload(decode_inputs(flat, (len(graph.inputs) - 1) // 4)))
        logits = graph.run()
        if flat.sampled is None:
            return logits[: len(flat.slots)]
        return logits.index_select(0, self._device.upload(flat.sampled))

    def _graph(self, size: int) -> DecodeGraph:
        if size not in self._graphs:
            inputs = torch.zeros(4 * size + 1, dtype=torch.int64, device=self._model.device)  # all rows empty
            run = self._device.capture(lambda: self._decode(inputs, size))
            self._graphs[size] = DecodeGraph(inputs, run)
        return self._graphs[size]

    def _decode(self, inputs: Tensor, size: int) -> Tensor:
        """What a decode graph does: bounds are the largest there are, arrays are read on the device."""
        tokens, positions, slots, starts = torch.split(inputs, [size, size, size, size + 1])
        tokens = torch.where(tokens == PENDING, self._last.index_select(0, slots), tokens)
        batch = self._batch(tokens, positions, slots, starts, 1, self._max_context)
        return self._model.forward(batch, self.pool)

    def _batch(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, starts: Tensor, longest_row: int, context: int
    ) -> Batch:
        return Batch(
            tokens=tokens,
            positions=positions.int(),
            row_starts=starts.int(),
            slots=slots.int(),
            tables=self._tables,
            longest_row=longest_row,
            longest_context=context,
            scratch={},
        )

    def _draw(self, logits: Tensor, flat: FlatRows) -> Drawn | None:
        """Queues the draw, and keeps its tokens for the rows that wait for them."""
        if not len(logits):
            return None
        drawn = self._sampler.sample(logits, flat.sampled_slots, flat.sampled_positions)
        self._last.index_copy_(0, self._device.upload(flat.sampled_slots), drawn.tokens)
        return drawn
