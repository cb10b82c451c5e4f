"""Keys and values on their way into the paged pool, in compiled code; and what is attended in which pieces.

Work is cut into *segments*, runs of one row's tokens, times KV heads; threads claim them. Inside a block, one KV head's
keys are panels of 16: [block / 16][head_dim][16] in float32, [block / 16][head_dim / 2][16][2] in bf16, so a load is 16
keys' scores to be and no sum runs across lanes; its values are [block][head_dim], or [block / 2][head_dim][2]. The
pairs of bf16 are what AMX takes (cpu_amx.py). Who reads them is cpu_attention.py.
"""

import ctypes
from typing import Any

from numba import carray

from engine.kernels.cpu_lanes import (
    LANES,
    as_bf16,
    claim,
    clear,
    get_f32,
    get_i32,
    get_u16,
    load,
    load_some,
    put_f32,
    put_i32,
    put_u16,
    store,
    store_some,
)
from engine.kernels.cpu_native import inner, native, structure

_i64 = ctypes.c_int64
AttendArguments = structure(
    "AttendArguments",
    next=_i64,  # the counter of pieces claimed
    thread=_i64,  # the counter of threads arrived
    counters=_i64,  # where the two are
    segments=_i64,  # int32 [pieces][3]: row, its first token, tokens
    pieces=_i64,
    stores=_i64,  # whether a piece also stores its keys and values (one token a row)
    pool=_i64,  # of this layer: the first block's keys
    block_bytes=_i64,  # from one block to the next
    values_bytes=_i64,  # from a layer's keys to its values
    head_bytes=_i64,  # from one KV head to the next
    block_size=_i64,
    tables=_i64,
    table_row=_i64,  # bytes
    slots=_i64,
    positions=_i64,
    qkv=_i64,
    out=_i64,
    rope=_i64,
    heads=_i64,
    kv_heads=_i64,
    head_dim=_i64,
    element=_i64,  # bytes of a number of the model's dtype
    window=_i64,  # positions that a token sees, its own included
    threads=_i64,
    scratch=_i64,
    scratch_bytes=_i64,  # of one thread
    scale=ctypes.c_float,
)
SegmentArguments = structure(
    "SegmentArguments", row_starts=_i64, positions=_i64, rows=_i64, length=_i64, segments=_i64, pieces=_i64
)


@native(SegmentArguments)
def cut_segments(arguments: Any) -> None:
    """Cuts every row at the positions that are multiples of `length`; writes segments and their count."""
    a = carray(arguments, 1)[0]
    pieces = 0
    for row in range(a.rows):
        token = get_i32(a.row_starts + 4 * row)
        end = get_i32(a.row_starts + 4 * row + 4)
        while token < end:
            room = a.length - get_i32(a.positions + 4 * token) % a.length
            count = min(room, end - token)
            at = a.segments + 12 * pieces
            put_i32(at, row)
            put_i32(at + 4, token)
            put_i32(at + 8, count)
            token += count
            pieces += 1
    a.pieces = pieces


@inner
def rotate(source: int, rope: int, out: int, head_dim: int, element: int, wide: int) -> None:
    """One head's rotary embedding, rounded to the model's dtype, written to `out` in numbers of `wide` bytes."""
    half = head_dim // 2
    for at in range(0, half, LANES):
        count = min(LANES, half - at)
        low = load_some(source + at * element, count, element)
        high = load_some(source + (half + at) * element, count, element)
        cosine = load_some(rope + 4 * at, count, 4)
        sine = load_some(rope + 4 * (half + at), count, 4)
        new_low = low * cosine - high * sine
        new_high = high * cosine + low * sine
        if element == 2:
            new_low = as_bf16(new_low)
            new_high = as_bf16(new_high)
        store_some(out + wide * at, new_low, count, wide)
        store_some(out + wide * (half + at), new_high, count, wide)


@inner
def store_token(a: Any, token: int, table: int, head: int, key: int) -> None:
    """Stores one token's key and value of a KV head. `key`: a float32 buffer of head_dim.

    The first token of a group of 16 clears the group, so that nothing of a former owner is ever read.
    """
    position = get_i32(a.positions + 4 * token)
    block = get_i32(table + 4 * (position // a.block_size))
    offset = position % a.block_size
    keys = a.pool + block * a.block_bytes + head * a.head_bytes
    values = keys + a.values_bytes
    group_bytes = LANES * a.head_dim * a.element
    group = offset // LANES * group_bytes
    if offset % LANES == 0:
        clear(keys + group, group_bytes)
        clear(values + group, group_bytes)
    row = a.qkv + token * (a.heads + 2 * a.kv_heads) * a.head_dim * a.element
    source = row + (a.heads + head) * a.head_dim * a.element
    rotate(source, a.rope + position * a.head_dim * 4, key, a.head_dim, a.element, 4)
    panel = keys + group + offset % LANES * 4
    value = source + a.kv_heads * a.head_dim * a.element
    if a.element == 4:
        for d in range(a.head_dim):
            put_f32(panel + 64 * d, get_f32(key + 4 * d))
        for d in range(0, a.head_dim, LANES):
            store(values + (offset * a.head_dim + d) * 4, load(value + 4 * d))
    else:
        for d in range(0, a.head_dim, 2):
            low = get_u16(key + 4 * d + 2)
            put_i32(panel + 32 * d, low | get_u16(key + 4 * d + 6) << 16)
        pair = values + (offset // 2 * a.head_dim) * 4 + offset % 2 * 2
        for d in range(a.head_dim):
            put_u16(pair + 4 * d, get_u16(value + 2 * d))


@native(AttendArguments)
def store_segments(arguments: Any) -> None:
    """Keys (rotated) and values of every segment into the pool."""
    a = carray(arguments, 1)[0]
    scratch = a.scratch + claim(a.counters + 8) * a.scratch_bytes
    while True:
        piece = claim(a.counters)
        if piece >= a.pieces * a.kv_heads:
            break
        segment = a.segments + 12 * (piece // a.kv_heads)
        table = a.tables + get_i32(a.slots + 4 * get_i32(segment)) * a.table_row
        token = get_i32(segment + 4)
        for t in range(token, token + get_i32(segment + 8)):
            store_token(a, t, table, piece % a.kv_heads, scratch)
