"""Paged attention in Triton, one reduction order for prefill and decode.

The order, for every (query position, head): keys 0 … position are cut into *splits* of SPLIT keys, by
absolute position. A split is reduced tile by tile from its first key with an online softmax; the splits'
(maximum, sum, accumulator) are then merged from the first to the last. Two kernels carry it out.
`_attend_tiles` gives a tile of queries all its splits in turn, merging in registers: for rows of many tokens.
`_attend_splits` spreads the splits of a single-token row over programs, and `_merge_splits` merges what they
left: for decode. They share `_reduce_split` and `_merge`, tile shapes and warps, so a position's bits are the
same in either, and neither the batch nor the chunk changes them: a tile wholly above a query's position adds
exact zeros. With a window, whoever reduces begins at the split of the first key that its first query sees; a tile or
split wholly below a query's window adds exact zeros too.

A tile's M dimension packs positions × the query heads of one KV head. Everything that varies from step to
step is read from device memory, so both can be captured in a CUDA graph.

Proven in Triton's interpreter and compiled for sm_90; not yet run on a card. Not here: rotation and the
writing of keys and values (triton_rowwise.py).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (kernels are written in Triton's language: their arguments are pointers and tiles, not Python objects)

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.protocol import AttentionShape, Batch
from engine.kernels.triton_rowwise import STEP_ARRAYS

SPLIT = 256
"""Keys in a split. Changing it changes bits: it belongs to the fingerprint of a KV store."""


WANTED_PROGRAMS = 512
"""Enough programs to fill a large card (132 processors) about four times, when a decode batch is small."""


NO_WINDOW = 1 << 30
"""Positions: more than there are."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the score matrix.

    Fixed by dtype and head_dim alone, never by the batch: it is part of the order.
    """

    queries: int  # positions × heads of a group
    keys: int
    warps: int
    stages: int


def tile_for(dtype: torch.dtype, head_dim: int) -> Tile:
    """64 queries is the least that Hopper's wgmma takes; decode fills few of them and stays bound by memory.

    Key counts and stages are the largest that fit into registers without spilling (sm_90,
    Triton 3.6 and 3.9).
    """
    if dtype == torch.float32:
        return Tile(queries=16, keys=32, warps=4, stages=2)
    if head_dim > 128:
        return Tile(queries=64, keys=32, warps=8, stages=2)
    return Tile(queries=64, keys=64, warps=4, stages=2 if head_dim > 64 else 3)


@triton.jit
def _reduce_split(
    q, position, highest, begin, keys_at, values_at, table, slab, scale_log2,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys begin … begin + SPLIT - 1 for a tile of queries.

    Returns maximum and sum [QUERIES], accumulator [QUERIES, DIM_PAD].
    """
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulator = tl.zeros([QUERIES, DIM_PAD], tl.float32)
    dim = tl.arange(0, DIM_PAD)[None, :]
    for first in range(begin, tl.minimum(begin + SPLIT, highest + 1), KEYS):
        key = first + tl.arange(0, KEYS)
        known = key <= highest  # what lies above is another's, or garbage
        block = tl.load(table + key // BLOCK, mask=known, other=0).to(tl.int64)
        at = (block * slab + (key % BLOCK) * DIM)[:, None] + dim
        inside = known[:, None] & (dim < DIM)
        k = tl.load(keys_at + at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - pivot[:, None])
        rescale = tl.exp2(maximum - pivot)
        total = tl.fma(total, rescale, tl.sum(weights, axis=1))
        v = tl.load(values_at + at, mask=inside, other=0.0)
        accumulator = tl.dot(
            weights.to(v.dtype), v, accumulator * rescale[:, None], input_precision=PRECISION
        )
        maximum = higher
    return maximum, total, accumulator


@triton.jit
def _first_split(position, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """Of the keys that the token at `position` sees."""
    return tl.maximum(position + 1 - WINDOW, 0) // SPLIT


@triton.jit
def _merge(maximum, total, accumulator, maximum2, total2, accumulator2):
    """Adds a later split to the merge of the earlier ones.

    Fused multiply-adds are spelled out: bits depend on them.
    """
    higher = tl.maximum(maximum, maximum2)
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    a = tl.exp2(maximum - pivot)
    b = tl.exp2(maximum2 - pivot)
    a_wide = tl.broadcast_to(a[:, None], accumulator.shape)
    merged = tl.fma(accumulator, a_wide, accumulator2 * b[:, None])
    return higher, tl.fma(total, a, total2 * b), merged


@triton.jit
def _load_queries(
    queries, positions, start, tokens, first, kv_head,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The tile from packed query `first` of a row: q, offsets, which are inside, positions (-1 outside)."""
    packed = first + tl.arange(0, QUERIES)
    valid = packed < tokens * GROUP
    token = start + packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    dim = tl.arange(0, DIM_PAD)[None, :]
    at = (token.to(tl.int64) * HEADS + head)[:, None] * DIM + dim
    inside = valid[:, None] & (dim < DIM)
    position = tl.load(positions + token, mask=valid, other=-1)
    return tl.load(queries + at, mask=inside, other=0.0), at, inside, position


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=STEP_ARRAYS)
def _attend_tiles(
    queries, pool, out, positions, row_starts, slots, tables, rows, table_width, slab, layer_at, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program a (tile of queries, KV head) of the rows of two tokens and more.

    Row r's tiles begin at program row_starts[r] * GROUP // QUERIES + r: never too few, at most one too many a
    row, so the grid needs no sum over rows that only the device knows.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_index = tl.arange(0, ROWS)
    ends = tl.load(row_starts + 1 + row_index, mask=row_index < rows, other=2147483647 // GROUP)
    firsts = ends * GROUP // QUERIES + row_index + 1  # of the row after
    row = tl.sum(((firsts <= program) & (row_index < rows)).to(tl.int32), axis=0)
    if row >= rows:
        return
    start = tl.load(row_starts + row)
    tokens = tl.load(row_starts + row + 1) - start
    first = (program - (start * GROUP // QUERIES + row)) * QUERIES
    if (tokens < 2) | (first >= tokens * GROUP):
        return
    q, at, inside, position = _load_queries(
        queries, positions, start, tokens, first, kv_head, GROUP, HEADS, DIM, DIM_PAD, QUERIES
    )
    table = tables + tl.load(slots + row).to(tl.int64) * table_width
    keys_at = pool + layer_at + kv_head * BLOCK * DIM
    values_at = keys_at + KV_HEADS * BLOCK * DIM
    highest = tl.max(position, axis=0)
    lowest = tl.load(positions + start + first // GROUP)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulator = tl.zeros([QUERIES, DIM_PAD], tl.float32)
    for begin in range(_first_split(lowest, SPLIT, WINDOW) * SPLIT, highest + 1, SPLIT):
        maximum2, total2, accumulator2 = _reduce_split(
            q, position, highest, begin, keys_at, values_at, table, slab, scale_log2,
            DIM, DIM_PAD, BLOCK, SPLIT, QUERIES, KEYS, PRECISION, WINDOW,
        )  # fmt: skip
        maximum, total, accumulator = _merge(maximum, total, accumulator, maximum2, total2, accumulator2)
    total = tl.where(position < 0, 1.0, total)  # beyond the row: nothing was seen, nothing is stored
    tl.store(out + at, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=STEP_ARRAYS)
def _attend_splits(
    queries, pool, partials, extremes, positions, row_starts, slots, tables,
    splits, table_width, slab, layer_at, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, z) of a single-token row leaves partials of every grid_z-th split from its z-th on.

    partials: fp32 [rows, heads, splits, DIM_PAD]; extremes: fp32 [rows, heads, splits, 2] (maximum, sum).
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    start = tl.load(row_starts + row)
    if tl.load(row_starts + row + 1) - start != 1:
        return
    slot = tl.load(slots + row).to(tl.int64)
    table = tables + slot * table_width
    keys_at = pool + layer_at + kv_head * BLOCK * DIM
    values_at = keys_at + KV_HEADS * BLOCK * DIM
    highest = tl.load(positions + start)
    dim = tl.arange(0, DIM_PAD)[None, :]
    for packed in range(0, GROUP, QUERIES):
        q, _at, _inside, position = _load_queries(
            queries, positions, start, 1, packed, kv_head, GROUP, HEADS, DIM, DIM_PAD, QUERIES
        )
        member = packed + tl.arange(0, QUERIES)
        head = row.to(tl.int64) * HEADS + kv_head * GROUP + member
        first = _first_split(highest, SPLIT, WINDOW)
        for split in range(first + tl.program_id(2), highest // SPLIT + 1, tl.num_programs(2)):
            maximum, total, accumulator = _reduce_split(
                q, position, highest, split * SPLIT, keys_at, values_at, table, slab, scale_log2,
                DIM, DIM_PAD, BLOCK, SPLIT, QUERIES, KEYS, PRECISION, WINDOW,
            )  # fmt: skip
            at = head * splits + split
            tl.store(partials + at[:, None] * DIM_PAD + dim, accumulator, mask=(member < GROUP)[:, None])
            tl.store(extremes + at * 2, maximum, mask=member < GROUP)
            tl.store(extremes + at * 2 + 1, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["splits", "tokens"], do_not_specialize_on_alignment=STEP_ARRAYS[:2])
def _merge_splits(
    partials, extremes, out, positions, row_starts, splits, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Program (row, head) of a single-token row merges its splits from the first to the last.

    An empty row writes zeros to the padding token of its own number, if there is one: as in a decode graph.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(row_starts + row)
    length = tl.load(row_starts + row + 1) - token
    one = tl.arange(0, 1)
    dim = tl.arange(0, DIM_PAD)[None, :]
    if (length == 0) & (row >= tl.load(row_starts + tl.num_programs(0))) & (row < tokens):
        at = out + (row.to(tl.int64) * HEADS + head) * DIM + dim
        tl.store(at, tl.zeros([1, DIM_PAD], out.dtype.element_ty), mask=dim < DIM)
    if length != 1:
        return
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([1, DIM_PAD], tl.float32)
    first = (row.to(tl.int64) * HEADS + head) * splits
    position = tl.load(positions + token)
    for split in range(_first_split(position, SPLIT, WINDOW), position // SPLIT + 1):
        at = first + split
        maximum2 = tl.load(extremes + at * 2 + one)
        total2 = tl.load(extremes + at * 2 + 1 + one)
        accumulator2 = tl.load(partials + at * DIM_PAD + dim)
        maximum, total, accumulator = _merge(maximum, total, accumulator, maximum2, total2, accumulator2)
    target = out + (token.to(tl.int64) * HEADS + head) * DIM + dim
    tl.store(target, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=dim < DIM)


def attend(pool: Tensor, layer: int, queries: Tensor, shape: AttentionShape, batch: Batch) -> Tensor:
    """Rotated queries [T, heads, head_dim], keys and values already in the pool -> [T, heads * head_dim].

    Reads longest_row and longest_context of the batch as upper bounds: a graph is captured with the largest.
    """
    out = torch.empty_like(queries)
    if batch.longest_row > 1:
        _launch_tiles(pool, layer, queries, out, shape, batch)
    _launch_splits(pool, layer, queries, out, shape, batch)
    return out.view(queries.shape[0], -1)


def _launch_tiles(
    pool: Tensor, layer: int, queries: Tensor, out: Tensor, shape: AttentionShape, batch: Batch
) -> None:
    rows, tile = batch.slots.shape[0], tile_for(queries.dtype, shape.head_dim)
    group = shape.heads // shape.kv_heads
    programs = queries.shape[0] * group // tile.queries + rows
    _attend_tiles[(programs, shape.kv_heads)](
        queries, pool, out, batch.positions, batch.row_starts, batch.slots, batch.tables,
        rows, batch.tables.stride(0), pool.stride(0), layer * pool.stride(1), _scale_log2(shape),
        ROWS=triton.next_power_of_2(rows), **_constants(pool, shape, tile),
    )  # fmt: skip


def _launch_splits(
    pool: Tensor, layer: int, queries: Tensor, out: Tensor, shape: AttentionShape, batch: Batch
) -> None:
    rows, tile = batch.slots.shape[0], tile_for(queries.dtype, shape.head_dim)
    constants, dim = _constants(pool, shape, tile), _padded(shape.head_dim)
    splits = triton.cdiv(batch.longest_context, SPLIT)
    partials = queries.new_empty(rows, shape.heads, splits, dim, dtype=torch.float32)
    extremes = queries.new_empty(rows, shape.heads, splits, 2, dtype=torch.float32)
    spread = min(splits, triton.cdiv(WANTED_PROGRAMS, rows * shape.kv_heads))
    _attend_splits[(rows, shape.kv_heads, spread)](
        queries, pool, partials, extremes, batch.positions, batch.row_starts, batch.slots, batch.tables,
        splits, batch.tables.stride(0), pool.stride(0), layer * pool.stride(1),
        _scale_log2(shape), **constants,
    )  # fmt: skip
    _merge_splits[(rows, shape.heads)](
        partials, extremes, out, batch.positions, batch.row_starts, splits, queries.shape[0],
        HEADS=shape.heads, DIM=shape.head_dim, DIM_PAD=dim, SPLIT=SPLIT,
        WINDOW=shape.window or NO_WINDOW, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def _scale_log2(shape: AttentionShape) -> float:
    return shape.scale * math.log2(math.e)


def _padded(head_dim: int) -> int:
    """Tiles are powers of two, and products of matrices take no fewer than 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _constants(pool: Tensor, shape: AttentionShape, tile: Tile) -> dict[str, int | str]:
    return {
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "DIM": shape.head_dim,
        "DIM_PAD": _padded(shape.head_dim),
        "BLOCK": pool.shape[4],
        "SPLIT": SPLIT,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "PRECISION": "ieee",
        "WINDOW": shape.window or NO_WINDOW,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": False,
    }
