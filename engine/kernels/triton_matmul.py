"""A batch-invariant linear in Triton: x [M, K] @ weight [N, K]^T (+ bias), whatever M is.

Every element is one accumulator that takes K from its beginning to its end in fp32: no split over K, no
second order. Tiles differ in size only. On Hopper each of TILES is the same wgmma instruction family over the
same steps of 16 along K, so a row's bits should not depend on the tile; that is measured, not believed:
`choose_tiles` compares them bit for bit on the machine at load, and keeps one tile for every M if they differ
(slower at one end, exact).

Proven in Triton's interpreter and compiled for sm_90; not yet run on a card.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (kernels are written in Triton's language: their arguments are pointers and tiles, not Python objects)

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

ENOUGH_PROGRAMS = 128
"""About one for each processor of a large card (132 on an H200)."""

BAND = 8
"""Tiles of rows worked on together."""

PROBE_ROWS = (1, 3, 64, 129, 256)


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    columns: int
    depth: int  # of K, a step
    warps: int
    stages: int


TILES = (
    Tile(rows=128, columns=256, depth=64, warps=8, stages=3),  # prefill
    Tile(rows=128, columns=128, depth=64, warps=8, stages=4),
    Tile(rows=64, columns=64, depth=128, warps=4, stages=4),
    Tile(
        rows=64, columns=32, depth=128, warps=4, stages=5
    ),  # decode: many programs, each a stream of weights
)
"""Widest first. 64 rows is the least wgmma takes."""

TILES_FP32 = (Tile(rows=32, columns=32, depth=32, warps=4, stages=2),)
"""Plain fused multiply-adds (no tf32): one tile, no choice to prove."""


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x, weight, bias, out, rows, columns, depth,
    HAS_BIAS: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program a tile of the result. Neighbours share weights and a band of x in the cache."""
    row_tiles = tl.cdiv(rows, ROWS)
    band_size = BAND * tl.cdiv(columns, COLUMNS)
    band = tl.program_id(0) // band_size
    height = tl.minimum(row_tiles - band * BAND, BAND)
    inside = tl.program_id(0) % band_size
    row = (band * BAND + inside % height) * ROWS + tl.arange(0, ROWS)
    column = inside // height * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    row_inside = (row < rows)[:, None]
    column_inside = (column < columns)[:, None]
    x_at = x + row.to(tl.int64)[:, None] * depth + step[None, :]
    weight_at = weight + column.to(tl.int64)[:, None] * depth + step[None, :]
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, depth, DEPTH):
        x_mask = row_inside
        weight_mask = column_inside
        if not EVEN_DEPTH:
            x_mask = x_mask & (done + step < depth)[None, :]
            weight_mask = weight_mask & (done + step < depth)[None, :]
        a = tl.load(x_at + done, mask=x_mask, other=0.0)
        if EVEN_DEPTH and EVEN_COLUMNS:
            b = tl.load(weight_at + done)
        else:
            b = tl.load(weight_at + done, mask=weight_mask, other=0.0)
        accumulator = tl.dot(a, tl.trans(b), accumulator, input_precision="ieee")
    if HAS_BIAS:
        accumulator += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    out_at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = row_inside & (column < columns)[None, :]
    tl.store(out_at, accumulator.to(out.dtype.element_ty), mask=mask)


def pick(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tile:
    """The widest tile that still makes enough programs to fill a card, else the narrowest."""
    for tile in tiles:
        if triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= ENOUGH_PROGRAMS:
            return tile
    return tiles[-1]


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: tuple[Tile, ...]) -> Tensor:
    """x [M, K], weight [N, K], both contiguous; returns [M, N] in x's dtype."""
    rows, depth = x.shape
    columns = weight.shape[0]
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert weight.shape[1] == depth
    out = x.new_empty(rows, columns)
    tile = pick(tiles, rows, columns)
    _matmul[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x, weight, weight if bias is None else bias, out, rows, columns, depth,
        HAS_BIAS=bias is not None,
        EVEN_DEPTH=depth % tile.depth == 0, EVEN_COLUMNS=columns % tile.columns == 0,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, BAND=BAND,
        num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def candidates(dtype: torch.dtype) -> tuple[Tile, ...]:
    return TILES_FP32 if dtype == torch.float32 else TILES


def choose_tiles(
    weight: Tensor, agreement: Callable[[Tensor, tuple[Tile, ...]], bool] | None = None
) -> tuple[Tile, ...]:
    """The tiles that may serve this weight at every M: all if they agree to the bit here, else a middle one.

    Runs on the device and waits for it: for load time. agreement: None is `agree`.
    """
    tiles = candidates(weight.dtype)
    if len(tiles) == 1 or (agreement or agree)(weight, tiles):
        return tiles
    return tiles[len(tiles) // 2 : len(tiles) // 2 + 1]


def agree(weight: Tensor, tiles: tuple[Tile, ...]) -> bool:
    """Whether a row's bits are the same in every tile and at every number of rows tried."""
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(max(PROBE_ROWS), weight.shape[1], generator=generator, device=weight.device).to(
        weight.dtype
    )
    whole = [matmul(x, weight, None, (tile,)) for tile in tiles]
    if not all(torch.equal(a, b) for a, b in pairwise(whole)):
        return False
    parts = ((matmul(x[:rows], weight, None, (tile,)), rows) for tile in tiles for rows in PROBE_ROWS)
    return all(torch.equal(part, whole[0][:rows]) for part, rows in parts)
