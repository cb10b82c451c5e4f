"""The CPU's kernels: compiled code of ours on vectors, or on AMX tiles for bfloat16 where the machine has them.

Attention is in cpu_keys.py, cpu_attention.py and cpu_amx.py, what is done row by row in cpu_rowwise.py, the linear
layers in cpu_linear.py; here is who calls what with which addresses, and what is small enough for one thread.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from math import prod

import numba
import torch
from torch import Tensor

from engine.kernels import cpu_attention, cpu_keys, cpu_linear, cpu_rowwise
from engine.kernels.cpu_amx import amx_fits, attend_tiles
from engine.kernels.cpu_lanes import BF16_INSTRUCTIONS
from engine.kernels.cpu_native import MAX_THREADS, Clock, Native, sources_digest, target, threads
from engine.kernels.cpu_program import Arena, Program, noted
from engine.kernels.cpu_team import team
from engine.kernels.cpu_tiles import amx_available
from engine.kernels.protocol import AttentionShape, Batch, KVShape, Linear, UnsupportedDevice

_ELEMENT = {torch.float32: 4, torch.bfloat16: 2}
_STORE_TOKENS = 64  # a piece of work when keys and values are stored apart from attention
_ALONE_NUMBERS = 16384  # elementwise work up to this many numbers is faster on one thread
_ALONE_PRODUCTS = 32768  # and attention up to this many
_LARGE_BYTES = 65536  # results from here on keep their memory: a page that was given back costs 3 µs anew


class UnsupportedOnCpu(UnsupportedDevice):
    """The CPU's kernels cannot run this model or this pool as configured."""


class CpuKernels:
    """`engine.kernels.protocol.Kernels` for float32 and bfloat16. For one thread at a time: see `twin`."""

    def __init__(self, dtype: torch.dtype, amx: bool | None = None) -> None:
        """amx: use AMX tiles for bfloat16; None is where the machine has them."""
        if dtype not in _ELEMENT:
            raise UnsupportedOnCpu(
                f"{dtype} is not supported on a CPU; set model.dtype to float32 or bfloat16"
            )
        self.dtype = dtype
        self.exact = True
        self._element = _ELEMENT[dtype]
        self._clock = Clock()
        self._arena = Arena()
        self._program: Program | None = None  # while it is made
        self._rows = cpu_rowwise.RowArguments(element=self._element)
        self._rows.counters = ctypes.addressof(self._rows)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._amx = dtype == torch.bfloat16 and amx is not False and amx_available()
        if amx and not self._amx:
            raise UnsupportedOnCpu(
                "AMX tiles were asked for; they need bfloat16 and a CPU and kernel with amx-bf16"
            )
        self.facts = (f"CPU kernels on {self._ways()}",)

    def _ways(self) -> str:
        if self._amx:
            return "AMX tiles"
        return "vectors of bfloat16" if self._element == 2 and BF16_INSTRUCTIONS else "vectors"

    def warm_up(self) -> None:
        """Compiles every kernel this dtype may need, or loads it from the cache: call before serving."""
        rows = (
            cpu_rowwise.embed_rows,
            cpu_rowwise.norm_rows,
            cpu_rowwise.head_rows,
            cpu_rowwise.gate_rows,
        )
        shared = (cpu_keys.cut_segments, cpu_keys.store_segments)
        lanes = (cpu_attention.attend_lanes, cpu_linear.linear_lanes)
        for kernel in (
            *rows,
            *shared,
            *lanes,
            *((attend_tiles, cpu_linear.linear_tiles) if self._amx else ()),
        ):
            kernel.compile()

    @property
    def identity(self) -> str:
        """Our sources, and what they are compiled for; torch makes the table of cosines."""
        triple, cpu, features = target()
        kind = "tiles" if self._amx else "vectors"
        return f"{triple} {cpu} {features} {kind} {sources_digest()} numba {numba.__version__} {torch.__version__}"

    @property
    def released_seconds(self) -> float:
        """Wall seconds spent so far in calls that released the interpreter lock."""
        return self._clock.seconds

    def new_pool(self, blocks: int, shape: KVShape) -> Tensor:
        """[blocks, layers, 2, kv_heads, head_dim * block_size]; the inside is described in cpu_keys.py."""
        if shape.block_size % 16:
            raise UnsupportedOnCpu(f"engine.block_size = {shape.block_size} is not a multiple of 16")
        if shape.head_dim % 16:
            raise UnsupportedOnCpu(f"a head size of {shape.head_dim} is not a multiple of 16")
        inside = (shape.layers, 2, shape.kv_heads, shape.head_dim * shape.block_size)
        return torch.zeros((blocks, *inside), dtype=self.dtype)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        inputs = weight.shape[1]
        if self._element == 2 and inputs % 2:
            raise UnsupportedOnCpu(
                f"a bfloat16 layer of {inputs} inputs: an even number is needed; use float32"
            )
        tiles = self._amx and inputs % 32 == 0
        return self._linear(cpu_linear.Packed(weight.to(self.dtype), bias, tiles))

    def twin(self) -> "CpuKernels":
        return CpuKernels(self.dtype, self._amx)

    def bound(self, linear: Linear) -> Linear:
        assert isinstance(linear, cpu_linear.PackedLinear)
        return self._linear(linear.packed)

    def _linear(self, packed: cpu_linear.Packed) -> cpu_linear.PackedLinear:
        self._reserve(cpu_linear.scratch_bytes(packed.inputs))
        return cpu_linear.PackedLinear(packed, lambda: self._scratch.data_ptr(), self._new, self._run)

    def record(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """See `Kernels.record`."""
        program = self._program = Program(self._arena)
        program.keep(self._scratch)
        try:
            found = noted(program, forward)
        finally:
            self._program = None
        return None if found is None else partial(found.run, self._clock)

    def _run(self, kernel: Native, arguments: ctypes.Structure, small: bool) -> None:
        """Now, or whenever what is being recorded is done."""
        if self._program is not None:
            self._program.add(kernel, arguments, small)
        elif small:
            kernel.alone(arguments)
        else:
            team().run(kernel, arguments, self._clock)

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        if self._program is None and prod(shape) * dtype.itemsize < _LARGE_BYTES:
            return torch.empty(shape, dtype=dtype)
        return self._arena.lend(shape, dtype)

    def _reserve(self, thread_bytes: int) -> None:
        """Makes the scratch large enough for every thread a kernel may run on."""
        if len(self._scratch) < thread_bytes * MAX_THREADS:
            self._scratch = torch.empty(thread_bytes * MAX_THREADS, dtype=torch.uint8)
            if self._program is not None:
                self._program.keep(self._scratch)

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        rows, width = len(tokens), table.shape[1]
        stream = self._new((rows, width), torch.float32)
        self._rows.left = table.data_ptr()
        self._rows.right = tokens.data_ptr()
        self._rows.stream = stream.data_ptr()
        self._over_rows(cpu_rowwise.embed_rows, rows, width)
        return stream

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        rows, width = residual.shape
        out = self._new((rows, width), self.dtype)
        arguments = self._rows
        arguments.left = 0 if delta is None else delta.data_ptr()
        arguments.right = weight.data_ptr()
        arguments.stream = residual.data_ptr()
        arguments.out = out.data_ptr()
        arguments.epsilon = eps
        self._over_rows(cpu_rowwise.norm_rows, rows, width)
        return out

    def head_norm(self, qkv: Tensor, weights: Tensor, shape: AttentionShape, eps: float) -> None:
        arguments = cpu_rowwise.HeadArguments(
            rows=len(qkv),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            element=self._element,
            qkv=qkv.data_ptr(),
            weights=weights.data_ptr(),
            epsilon=eps,
        )
        arguments.counters = ctypes.addressof(arguments)
        self._run(cpu_rowwise.head_rows, arguments, qkv.numel() <= _ALONE_NUMBERS)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        out = self._new((rows, width // 2), self.dtype)
        self._rows.left = gate_up.data_ptr()
        self._rows.out = out.data_ptr()
        self._over_rows(cpu_rowwise.gate_rows, rows, width // 2)
        return out

    def _over_rows(self, kernel: Native, rows: int, width: int) -> None:
        arguments = self._rows
        arguments.next = 0
        arguments.rows = rows
        arguments.width = width
        self._run(kernel, arguments, rows * width <= _ALONE_NUMBERS)

    def attend(
        self, pool: Tensor, layer: int, qkv: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch
    ) -> Tensor:
        work = batch.scratch.get(shape.window) or self._prepare(pool, rope, shape, batch)
        out = self._new((len(qkv), shape.heads * shape.head_dim), self.dtype)
        arguments = work.arguments
        arguments.pool = work.pool + layer * work.layer_bytes
        arguments.qkv = qkv.data_ptr()
        arguments.out = out.data_ptr()
        for kernel, segments, pieces in work.phases:
            arguments.next = arguments.thread = 0
            arguments.segments = segments
            arguments.pieces = pieces
            self._run(kernel, arguments, work.small)
        return out

    def _prepare(self, pool: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch) -> "_Attention":
        """What is the same in all layers of a step that have one window."""
        share = shape.heads // shape.kv_heads
        tokens = min(cpu_attention.tile_tokens(share), batch.longest_row)
        room = cpu_attention.scratch_bytes(tokens * share, shape.head_dim)
        self._reserve(room)
        tiles = self._amx and amx_fits(shape.head_dim)
        kernel = attend_tiles if tiles else cpu_attention.attend_lanes
        work = batch.scratch[shape.window] = _Attention(kernel, pool, rope, shape, batch, tokens)
        work.arguments.scratch = self._scratch.data_ptr()
        work.arguments.scratch_bytes = room
        work.arguments.threads = threads()
        return work


class _Attention:
    """One step's attention: the arguments of its kernels, and which run on which segments."""

    def __init__(
        self, kernel: Native, pool: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch, tokens: int
    ) -> None:
        element = pool.element_size()
        block_bytes, self.layer_bytes, values_bytes, head_bytes, _ = (n * element for n in pool.stride())
        decode = batch.longest_row == 1
        self.pool = pool.data_ptr()
        self.arguments = cpu_keys.AttendArguments(
            stores=decode,
            block_bytes=block_bytes,
            values_bytes=values_bytes,
            head_bytes=head_bytes,
            block_size=pool.shape[-1] // shape.head_dim,
            tables=batch.tables.data_ptr(),
            table_row=batch.tables.stride(0) * 4,
            slots=batch.slots.data_ptr(),
            positions=batch.positions.data_ptr(),
            rope=rope.data_ptr(),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            element=element,
            window=shape.window or cpu_attention.NO_WINDOW,
            scale=shape.scale * cpu_attention.LOG2_E,
        )
        self.arguments.counters = ctypes.addressof(self.arguments)
        self._kept: tuple[object, ...] = (batch, rope)
        products = len(batch.slots) * shape.heads * shape.head_dim * batch.longest_context * batch.longest_row
        self.small = products < _ALONE_PRODUCTS
        self.phases = [(kernel, *self._cut(batch, tokens))]
        if not decode:
            self.phases.insert(0, (cpu_keys.store_segments, *self._cut(batch, _STORE_TOKENS)))

    def _cut(self, batch: Batch, length: int) -> tuple[int, int]:
        """Address and count of the rows' segments of at most `length` tokens."""
        most = len(batch.slots) * 2 + len(batch.positions) // length
        segments = torch.empty((most, 3), dtype=torch.int32)
        cut = cpu_keys.SegmentArguments(
            row_starts=batch.row_starts.data_ptr(),
            positions=batch.positions.data_ptr(),
            rows=len(batch.slots),
            length=length,
            segments=segments.data_ptr(),
        )
        cpu_keys.cut_segments.alone(cut)
        self._kept = (*self._kept, segments)
        return segments.data_ptr(), cut.pieces
