"""Linear layers in compiled code, on vectors of floats or on AMX tiles: fast for one row and for thousands.

Each element of the result is a chain over k in one order, whatever rows stand beside it: exact by construction.
(oneDNN 3.12 chooses its split of k by the number of rows: its bf16 is not row-invariant for many shapes where
AMX is used, its float32 is not for one row and k = 2,048.) It also saves the 12 µs that calling oneDNN through
torch costs, which is most of a small layer.

Weights are packed once into panels of 16 columns, [out / 16][k][16] in float32, [out / 16][k / 2][16][2] in bf16.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from numba import carray
from torch import Tensor

from engine.kernels.cpu_lanes import (
    LANES,
    claim,
    load,
    load_some,
    put_i64,
    store_f32_some,
    store_some,
)
from engine.kernels.cpu_native import Native, inner, native, structure, threads
from engine.kernels.cpu_product import PAIRED_A, multiply_ahead, multiply_paired_ahead
from engine.kernels.cpu_tiles import (
    CONFIGURATION_BYTES,
    configure_square,
    configure_tiles,
    restore_tiles,
    save_tiles,
    score_4,
    square,
)

COLUMNS = 64  # of a piece of work
AHEAD = 8 * COLUMNS // LANES  # bytes after the panels' addresses: what is asked for, and its step
_ALONE_PRODUCTS = 32768  # up to this many are faster on one thread

_i64 = ctypes.c_int64
LinearArguments = structure(
    "LinearArguments",
    next=_i64,  # the counter of pieces claimed
    thread=_i64,  # the counter of threads arrived
    counters=_i64,  # where the two are
    x=_i64,
    rows=_i64,
    inputs=_i64,
    weight=_i64,
    bias=_i64,  # float32, or 0
    outputs=_i64,
    out=_i64,
    element=_i64,  # bytes of a number of the model's dtype
    block=_i64,  # rows of a piece of work
    scratch=_i64,
    scratch_bytes=_i64,  # of one thread
    threads=_i64,
)


@inner
def _height(left: int) -> int:
    """Rows of the next tile when `left` remain, none of them padding."""
    if left >= 8:
        return 8
    if left >= 4:
        return 4
    return 2 if left >= 2 else 1


@inner
def _write(a: Any, row: int, rows: int, column: int, columns: int, sums: int) -> None:
    """Float32 sums [rows][columns] to the result from (row, column) on, the bias added; padding is left out."""
    for at in range(0, min(columns, a.outputs - column), LANES):
        count = min(LANES, a.outputs - column - at)
        for r in range(rows):
            value = load(sums + (r * columns + at) * 4)
            if a.bias != 0:
                value = value + load_some(a.bias + 4 * (column + at), count, 4)
            to = a.out + ((row + r) * a.outputs + column + at) * a.element
            store_some(to, value, count, a.element)


@inner
def _panels(a: Any, column: int, panels: int) -> int:
    """Writes the addresses of a piece's panels; returns the first."""
    panel_bytes = LANES * a.inputs * a.element
    at: int = a.weight + column // LANES * panel_bytes
    for group in range(COLUMNS // LANES):
        put_i64(panels + 8 * group, at + group * panel_bytes)
    return at


@inner
def _lanes_rows(a: Any, rows: int, source: int, panels: int, sums: int, floats: int) -> None:
    """sums [rows][COLUMNS] = rows at `source` times a piece's panels. `floats`: room for the rows as float32.

    Meanwhile it asks for the weights that AHEAD after the panels' addresses tells.
    """
    groups, ahead = COLUMNS // LANES, panels + AHEAD
    if a.element == 4:
        multiply_ahead(rows, groups, source, 4 * a.inputs, panels, 64, sums, 4 * COLUMNS, a.inputs, ahead)
        return
    if PAIRED_A == 4:
        for at in range(0, rows * a.inputs, LANES):
            count = min(LANES, rows * a.inputs - at)
            store_f32_some(floats + 4 * at, load_some(source + 2 * at, count, 2), count)
        source = floats
    width = PAIRED_A * a.inputs
    multiply_paired_ahead(rows, groups, source, width, panels, 64, sums, 4 * COLUMNS, a.inputs // 2, ahead)


@inner
def _lanes_piece(a: Any, row: int, end: int, column: int, panels: int) -> None:
    sums = panels + 64
    piece_bytes = COLUMNS * a.inputs * a.element
    panel = _panels(a, column, panels)
    passes = (end - row + 7) // 8  # that ask alike: what is asked for faster than memory brings it is dropped
    ahead, step = panel, 0
    if column + COLUMNS * a.threads < a.outputs:
        ahead, step = panel + a.threads * piece_bytes, min(64, 128 // passes)
    put_i64(panels + AHEAD + 8, step)
    while row < end:
        rows = _height(end - row)
        source = a.x + row * a.inputs * a.element
        put_i64(panels + AHEAD, ahead)
        _lanes_rows(a, rows, source, panels, sums, sums + 8 * 4 * COLUMNS)
        ahead += step * piece_bytes // 128  # what 8 rows ask for
        _write(a, row, rows, column, COLUMNS, sums)
        row += rows


@native(LinearArguments)
def linear_lanes(arguments: Any) -> None:
    """out = x · weight + bias on vectors."""
    a = carray(arguments, 1)[0]
    scratch = a.scratch + claim(a.counters + 8) * a.scratch_bytes
    chunks = (a.outputs + COLUMNS - 1) // COLUMNS
    while True:
        piece = claim(a.counters)
        row = piece // chunks * a.block
        if row >= a.rows:
            break
        _lanes_piece(a, row, min(row + a.block, a.rows), piece % chunks * COLUMNS, scratch)


@inner
def _configure(at: int, rows: int, configured: int) -> int:
    """Tiles for the next `rows` rows, up to 32, unless they are so already; returns how they are now."""
    if rows != configured:
        if rows > 16:
            configure_square(at, 16, rows - 16)
        else:
            configure_tiles(at, rows)
    return rows


@inner
def _tiles_piece(a: Any, row: int, end: int, column: int, scratch: int, configured: int) -> int:
    panels = scratch + CONFIGURATION_BYTES
    sums = panels + 64
    panel = _panels(a, column, panels)
    width = 2 * a.inputs
    far = LANES * width
    steps = a.inputs // 32
    while row < end:
        rows = min(32, end - row)
        configured = _configure(scratch, rows, configured)
        source = a.x + row * width
        if rows > 16:
            for pair in range(COLUMNS // 32):
                square(source, width, panel + 2 * pair * far, far, sums, steps)
                _write(a, row, rows, column + 32 * pair, 32, sums)
        else:
            score_4(source, width, panels, 64, sums, 4 * COLUMNS, steps)
            _write(a, row, rows, column, COLUMNS, sums)
        row += rows
    return configured


@native(LinearArguments)
def linear_tiles(arguments: Any) -> None:
    """out = x · weight + bias on AMX tiles; the thread's tile configuration is put back."""
    a = carray(arguments, 1)[0]
    saved = a.scratch + claim(a.counters + 8) * a.scratch_bytes
    scratch = saved + CONFIGURATION_BYTES
    save_tiles(saved)
    configured = 0
    chunks = (a.outputs + COLUMNS - 1) // COLUMNS
    while True:
        piece = claim(a.counters)
        row = piece // chunks * a.block
        if row >= a.rows:
            break
        end = min(row + a.block, a.rows)
        configured = _tiles_piece(a, row, end, piece % chunks * COLUMNS, scratch, configured)
    restore_tiles(saved)


def pack(weight: Tensor) -> Tensor:
    """[out, in] to panels, out padded with zeros to a multiple of COLUMNS. bf16 needs an even `in`."""
    outputs, inputs = weight.shape
    padded = torch.zeros((-(-outputs // COLUMNS) * COLUMNS, inputs), dtype=weight.dtype)
    padded[:outputs] = weight
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    return padded.view(-1, LANES, inputs // pair, pair).transpose(1, 2).contiguous()


def scratch_bytes(inputs: int) -> int:
    """What one thread needs for a layer of so many inputs."""
    return 4 * COLUMNS * 32 + 8 * 4 * inputs + 512


class Packed:
    """A layer's weights in panels: read only once made, so that layers on several threads share them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tiles: bool) -> None:
        """`tiles`: for AMX (bf16, `in` a multiple of 32)."""
        self.weight = pack(weight)
        self.bias = None if bias is None else bias.float().contiguous()
        self.outputs, self.inputs = weight.shape
        self.numbers = weight.numel()
        self.tiles = tiles


class PackedLinear:
    """`engine.kernels.protocol.Linear` over packed weights, for one thread at a time."""

    def __init__(
        self,
        packed: Packed,
        scratch: Callable[[], int],
        new: Callable[[tuple[int, ...], torch.dtype], Tensor],
        run: Callable[[Native, ctypes.Structure, bool], None],
    ) -> None:
        """`scratch` gives its address; `new` makes a result; `run` calls a kernel, on one thread if told so."""
        self.packed, self._scratch, self._new, self._run = packed, scratch, new, run
        self._dtype = packed.weight.dtype
        self._kernel = linear_tiles if packed.tiles else linear_lanes
        self._arguments = LinearArguments(
            inputs=packed.inputs,
            weight=packed.weight.data_ptr(),
            bias=0 if packed.bias is None else packed.bias.data_ptr(),
            outputs=packed.outputs,
            element=packed.weight.element_size(),
            block=256 if packed.tiles else 64,
            scratch_bytes=scratch_bytes(packed.inputs),
        )
        self._arguments.counters = ctypes.addressof(self._arguments)

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == self._dtype
        assert x.is_contiguous(), "kernels read rows by address"
        rows, outputs = x.shape[0], self.packed.outputs
        out = self._new((rows, outputs), self._dtype)
        arguments = self._arguments
        arguments.next = arguments.thread = 0
        arguments.x = x.data_ptr()
        arguments.rows = rows
        arguments.out = out.data_ptr()
        arguments.scratch = self._scratch()
        arguments.threads = threads()
        self._run(self._kernel, arguments, rows * self.packed.numbers <= _ALONE_PRODUCTS)
        return out
