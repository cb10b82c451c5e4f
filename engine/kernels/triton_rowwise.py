"""Triton kernels that work on one token at a time: add + RMS norm, RMS norm of heads, silu * mul, rotary embedding +
KV store.

Each program reads one token's row and reduces it in one fixed order, so a token's bits never depend on its
batch. Proven in Triton's interpreter and compiled for sm_90; not yet run on a card.

Not here: attention (triton_attention.py), linears (triton_matmul.py), who calls these (cuda.py).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (kernels are written in Triton's language: their arguments are pointers and tiles, not Python objects)

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.protocol import AttentionShape, Batch

SILU_TILE = 1024
STEP_ARRAYS = ["positions", "row_starts", "slots", "tables"]
"""Arguments that a runner may slice anywhere: no kernel is compiled anew for their alignment."""


@triton.jit
def find_row(row_starts, rows, token, ROWS: tl.constexpr):
    """The row that owns a token; `rows` for a padding token. ROWS: a power of two >= rows."""
    row = tl.arange(0, ROWS)
    ends = tl.load(row_starts + 1 + row, mask=row < rows, other=2147483647)
    return tl.sum((ends <= token).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["hidden"])
def _add_norm(residual, delta, weight, out, hidden, eps, HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + column
    x = tl.load(residual + at, mask=inside, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + at, x, mask=inside)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (x * inverse_rms * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm(
    qkv, weights, eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """One program a (token, head of q or k)."""
    head = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    at = (tl.program_id(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * DIM + column
    x = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps)
    w = tl.load(weights + (head >= HEADS).to(tl.int32) * DIM + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(qkv + at, (x * inverse_rms * w).to(qkv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def _silu_mul(gate_up, out, width, TILE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    gate = tl.load(gate_up + token * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(out + token * width + column, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(source, cos, sin, where, HALF: tl.constexpr, half, inside):
    """Rotates the two halves of some heads by this position's angles: [heads, head_dim] tiles by offset."""
    first = tl.load(source + where + half, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + where + HALF + half, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=STEP_ARRAYS)
def _rope_store(
    qkv, rope, queries, pool, positions, row_starts, slots, tables, rows, table_width, slab, layer_at,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HEADS_PAD: tl.constexpr, KV_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """One program a token: rotated q -> queries [T, heads, dim]; rotated k, and v -> the token's place."""
    token = tl.program_id(0)
    row = find_row(row_starts, rows, token, ROWS)
    if row >= rows:
        return  # padding of a captured graph
    HALF: tl.constexpr = DIM // 2
    position = tl.load(positions + token)
    slot = tl.load(slots + row).to(tl.int64)
    block = tl.load(tables + slot * table_width + position // BLOCK).to(tl.int64)
    half = tl.arange(0, HALF_PAD)[None, :]
    angle = rope + position.to(tl.int64) * DIM + half
    cos = tl.load(angle, mask=half < HALF, other=0.0)
    sin = tl.load(angle + HALF, mask=half < HALF, other=0.0)
    source = qkv + token.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM

    head = tl.arange(0, HEADS_PAD)[:, None]
    inside = (head < HEADS) & (half < HALF)
    first, second = _rotate(source, cos, sin, head * DIM, HALF, half, inside)
    target = queries + token.to(tl.int64) * HEADS * DIM + head * DIM + half
    tl.store(target, first.to(queries.dtype.element_ty), mask=inside)
    tl.store(target + HALF, second.to(queries.dtype.element_ty), mask=inside)

    kv_head = tl.arange(0, KV_PAD)[:, None]
    inside = (kv_head < KV_HEADS) & (half < HALF)
    first, second = _rotate(source + HEADS * DIM, cos, sin, kv_head * DIM, HALF, half, inside)
    key = pool + block * slab + layer_at + (kv_head * BLOCK + position % BLOCK) * DIM + half
    tl.store(key, first.to(pool.dtype.element_ty), mask=inside)
    tl.store(key + HALF, second.to(pool.dtype.element_ty), mask=inside)

    values = source + (HEADS + KV_HEADS) * DIM + kv_head * DIM + half
    value = key + KV_HEADS * BLOCK * DIM
    tl.store(value, tl.load(values, mask=inside), mask=inside)
    tl.store(value + HALF, tl.load(values + HALF, mask=inside), mask=inside)


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See Kernels.add_norm. residual: fp32 [T, hidden]."""
    tokens, hidden = residual.shape
    out = weight.new_empty(tokens, hidden)
    width = triton.next_power_of_2(hidden)
    _add_norm[(tokens,)](
        residual, residual if delta is None else delta, weight, out, hidden, eps,
        HAS_DELTA=delta is not None, WIDTH=width,
        num_warps=min(max(width // 512, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def head_norm(qkv: Tensor, weights: Tensor, shape: AttentionShape, eps: float) -> None:
    """See Kernels.head_norm."""
    _head_norm[(qkv.shape[0], shape.heads + shape.kv_heads)](
        qkv, weights, eps,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.head_dim,
        WIDTH=triton.next_power_of_2(shape.head_dim), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def silu_mul(gate_up: Tensor) -> Tensor:
    """See Kernels.silu_mul."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    _silu_mul[(tokens, triton.cdiv(width, SILU_TILE))](
        gate_up, out, width, TILE=SILU_TILE, num_warps=4, enable_fp_fusion=False
    )
    return out


def rope_store(
    pool: Tensor, layer: int, qkv: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch
) -> Tensor:
    """Stores this step's rotated keys and values of a layer; returns rotated queries [T, heads, head_dim].

    pool: [blocks, layers, 2, kv_heads, block_size, head_dim], contiguous. Padding tokens are left alone, and
    what their rows of the result hold is undefined.
    """
    rows = batch.slots.shape[0]
    queries = qkv.new_empty(qkv.shape[0], shape.heads, shape.head_dim)
    _rope_store[(qkv.shape[0],)](
        qkv, rope, queries, pool, batch.positions, batch.row_starts, batch.slots, batch.tables,
        rows, batch.tables.stride(0), pool.stride(0), layer * pool.stride(1),
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.head_dim, BLOCK=pool.shape[4],
        ROWS=triton.next_power_of_2(rows), HEADS_PAD=triton.next_power_of_2(shape.heads),
        KV_PAD=triton.next_power_of_2(shape.kv_heads), HALF_PAD=triton.next_power_of_2(shape.head_dim // 2),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return queries
