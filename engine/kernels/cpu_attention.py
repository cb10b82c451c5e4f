"""Paged attention in compiled code, on vectors of 16 floats.

A tile is a segment's query rows: its tokens times the heads that share the KV head. Keys are taken 64 at a time from
position 0 up, with a running maximum and sum (Milakov and Gimelshein 2018), so a query's order of reduction depends on
its position alone: decode, prefill and any chunking give the same bits. Keys that a query may not see weigh exactly 0,
and adding 0 changes nothing (the last step maps -0 to 0). With a window a tile begins at the unit of the first key that
its first query sees; to a later query that sees none of it, such a unit is nothing at all.

How keys and values lie in the pool, and what a segment is: cpu_keys.py.
"""

import math
from typing import Any

import numpy as np
from numba import carray

from engine.kernels.cpu_keys import AttendArguments, rotate, store_token
from engine.kernels.cpu_lanes import (
    LANES,
    claim,
    clear,
    except_first,
    exp2,
    first,
    fma,
    get_f32,
    get_i32,
    greater,
    greatest,
    load,
    only_first,
    put_f32,
    put_i64,
    splat,
    store,
    store_bf16,
    store_some,
    total,
)
from engine.kernels.cpu_native import inner, native
from engine.kernels.cpu_product import (
    PAIRED_A,
    multiply,
    multiply_later,
    multiply_paired,
    multiply_paired_later,
    weigh,
    weigh_later,
    weigh_paired,
    weigh_paired_later,
)

UNIT = 128  # keys between two updates of the running maximum
STATE_BYTES = 128  # of a query: its maximum, then its sum's lanes from byte 64
NO_WINDOW = 1 << 40  # positions: more than there are
_FEW = 8  # query rows that compute less than they read
LOG2_E = math.log2(math.e)
_LOWEST = np.float32(-np.inf)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


@inner
def window_start(a: Any, position: int) -> int:
    """The unit that holds the first key which the token at `position` sees."""
    first_key: int = max(0, position + 1 - a.window)
    return first_key // UNIT * UNIT


@inner
def _put_weight(weights: int, group: int, weight: Any, element: int) -> None:
    if element == 2:
        store_bf16(weights + 32 * group, weight)
    else:
        store(weights + 64 * group, weight)


@inner
def soften(
    scores: int, groups: int, hidden: int, seen: int, scale: Any, state: int, weights: int, element: int
) -> Any:
    """Weighs one query's keys: 2**(scale * (score - maximum)), written to `weights`.

    Keys below `hidden`, and from `seen` on, weigh 0; if that is all of them, the state stays as it is.
    state: the highest score (float32), then, at 64 bytes, 16 lanes of the running sum; both are brought up to date.
    `weights` (of `element` bytes) may be `scores`. Returns the factor for what was summed before.
    """
    if hidden >= LANES * groups:
        for group in range(groups):
            _put_weight(weights, group, splat(_ZERO), element)
        return _ONE
    before = get_f32(state)
    highest = splat(_LOWEST)
    for group in range(groups):
        at = scores + 64 * group
        score = load(at)
        if seen < LANES * (group + 1):
            score = only_first(score, seen - LANES * group)
            store(at, score)
        if hidden > LANES * group:
            score = except_first(score, hidden - LANES * group)
            store(at, score)
        highest = greater(score, highest)
    now = max(before, greatest(highest))
    factor = _ONE
    if now != before:
        factor = first(exp2(splat((before - now) * scale)))
    shift = splat(-now * scale)
    summed = load(state + 64) * splat(factor)
    for group in range(groups):
        weight = exp2(fma(load(scores + 64 * group), splat(scale), shift))
        summed = summed + weight
        _put_weight(weights, group, weight, element)
    put_f32(state, now)
    store(state + 64, summed)
    return factor


@inner
def rescale(row: int, head_dim: int, factor: Any) -> None:
    if factor != _ONE:
        for d in range(0, head_dim, LANES):
            store(row + 4 * d, load(row + 4 * d) * splat(factor))


@inner
def finish(a: Any, sums: int, state: int, token: int, head: int) -> None:
    """Divides one query's sums by its weights' and writes it out in the model's dtype."""
    weight = splat(_ONE) / splat(total(load(state + 64)))
    out = a.out + (token * a.heads + head) * a.head_dim * a.element
    for d in range(0, a.head_dim, LANES):
        value = fma(load(sums + 4 * d), weight, splat(_ZERO))
        store_some(out + d * a.element, value, LANES, a.element)


@inner
def key_panels(a: Any, table: int, head: int, start: int, groups: int, panels: int) -> None:
    """Writes the addresses of `groups` panels of 16 keys, and of their values MAX_GROUPS further on."""
    for group in range(groups):
        position = start + LANES * group
        block = get_i32(table + 4 * (position // a.block_size))
        inside = position % a.block_size * a.head_dim * a.element
        at = a.pool + block * a.block_bytes + head * a.head_bytes + inside
        put_i64(panels + 8 * group, at)
        put_i64(panels + 8 * (group + UNIT // LANES), at + a.values_bytes)


@inner
def later_panels(a: Any, table: int, head: int, start: int, end: int, following: Any, panels: int) -> None:
    """What to ask for during the unit at `start`, in the form of `key_panels`: the keys of the same piece a unit on.

    Behind its last keys come the first of the piece that follows: its table, head, start and end. So a piece finds its
    first unit asked for.
    """
    own = (end + LANES - 1) // LANES
    next_table, next_head, next_start, next_end = following
    last = (next_end - 1) // LANES
    first = start // LANES + min(own, UNIT // LANES)
    for group in range(UNIT // LANES):
        wanted = first + group
        at = panels + 8 * group
        if wanted < own:
            key_panels(a, table, head, LANES * wanted, 1, at)
        else:
            panel = min(next_start // LANES + wanted - own, last)
            key_panels(a, next_table, next_head, LANES * panel, 1, at)


@inner
def operand(a: Any) -> int:
    """Bytes of a number of a product's left side: queries and weights."""
    return 4 if a.element == 4 else PAIRED_A


@inner
def _scores(a: Any, rows: int, groups: int, q: int, panels: int, scores: int, later: int) -> None:
    """scores [rows][UNIT] = `rows` queries times groups of 16 keys. `later`: panels to ask for, or 0."""
    width = operand(a) * a.head_dim
    if a.element == 4:
        if later:
            multiply_later(rows, groups, q, width, panels, 64, scores, 4 * UNIT, a.head_dim, later)
        else:
            multiply(rows, groups, q, width, panels, 64, scores, 4 * UNIT, a.head_dim)
    elif later:
        multiply_paired_later(rows, groups, q, width, panels, 64, scores, 4 * UNIT, a.head_dim // 2, later)
    else:
        multiply_paired(rows, groups, q, width, panels, 64, scores, 4 * UNIT, a.head_dim // 2)


@inner
def _weigh(a: Any, rows: int, groups: int, weights: int, values: int, sums: int, later: int) -> None:
    """sums [rows][head_dim] += weights times the values of groups of 16 keys. Weights lie where scores did."""
    width, columns = 4 * a.head_dim, a.head_dim // LANES
    if a.element == 4:
        if later:
            weigh_later(rows, columns, weights, 4 * UNIT, values, width, sums, width, groups, later)
        else:
            weigh(rows, columns, weights, 4 * UNIT, values, width, sums, width, groups)
    elif later:
        weigh_paired_later(rows, columns, weights, 4 * UNIT, values, width, sums, width, groups, later)
    else:
        weigh_paired(rows, columns, weights, 4 * UNIT, values, width, sums, width, groups)


@inner
def tile_height(left: int) -> int:
    """Rows of the next tile when `left` remain: all of them up to 4, else 8 (padding is zeros)."""
    return 8 if left > 4 else left


@inner
def begin(rows: int, head_dim: int, sums: int, states: int) -> None:
    clear(sums, rows * head_dim * 4)
    clear(states, rows * STATE_BYTES)
    for row in range(rows):
        put_f32(states + row * STATE_BYTES, _LOWEST)


@inner
def _attend_tile(a: Any, token: int, tokens: int, head: int, table: int, following: Any, q: int) -> None:
    """Attention of `tokens` tokens' queries on one KV head; asks for the keys and values of the piece that follows.

    `q`: scratch, laid out as below.
    """
    share = a.heads // a.kv_heads
    rows = tokens * share
    padded = (rows + 7) // 8 * 8
    width, q_width = 4 * a.head_dim, operand(a) * a.head_dim
    scores = q + padded * q_width
    sums = scores + padded * 4 * UNIT
    states = sums + padded * width
    panels = states + padded * STATE_BYTES
    later = panels + 16 * (UNIT // LANES)
    key = later + 16 * (UNIT // LANES)
    beside = 8 * (UNIT // LANES)  # from addresses of keys to those of their values
    position = get_i32(a.positions + 4 * token)
    end = position + tokens
    clear(q, padded * q_width)
    begin(rows, a.head_dim, sums, states)
    for row in range(rows):
        t = token + row // share
        source = (t * (a.heads + 2 * a.kv_heads) + head * share + row % share) * a.head_dim * a.element
        rope = a.rope + get_i32(a.positions + 4 * t) * width
        rotate(a.qkv + source, rope, q + row * q_width, a.head_dim, a.element, operand(a))
    for start in range(window_start(a, position), end, UNIT):
        if a.stores and start + UNIT >= end:  # only now has the memory that it writes to come near
            store_token(a, token, table, head, key)
        keys = min(UNIT, end - start)
        groups = (keys + LANES - 1) // LANES
        key_panels(a, table, head, start, groups, panels)
        few = rows <= _FEW
        if few:
            later_panels(a, table, head, start, end, following, later)
        for row in range(0, rows, 8):
            height = tile_height(rows - row)
            _scores(
                a, height, groups, q + row * q_width, panels, scores + row * 4 * UNIT, later if few else 0
            )
        for row in range(rows):
            seen = position + row // share + 1 - start
            at = scores + row * 4 * UNIT
            state = states + row * STATE_BYTES
            factor = soften(at, groups, seen - a.window, seen, a.scale, state, at, operand(a))
            rescale(sums + row * width, a.head_dim, factor)
        for row in range(0, rows, 8):
            height = tile_height(rows - row)
            asked = later + beside if few else 0
            _weigh(a, height, groups, scores + row * 4 * UNIT, panels + beside, sums + row * width, asked)
    for row in range(rows):
        finish(
            a,
            sums + row * width,
            states + row * STATE_BYTES,
            token + row // share,
            head * share + row % share,
        )


@inner
def _piece(a: Any, piece: int) -> tuple[int, int, int]:
    """Address of a piece's segment, its KV head, address of its row's table. Long contexts first: shorter ends."""
    segment = a.segments + 12 * (a.pieces - 1 - piece // a.kv_heads)
    return segment, piece % a.kv_heads, a.tables + get_i32(a.slots + 4 * get_i32(segment)) * a.table_row


@inner
def _following(a: Any, piece: int) -> tuple[int, int, int, int]:
    """Table, head, start and end of the piece that this thread will likely claim after `piece`; else of this one."""
    if piece + a.threads < a.pieces * a.kv_heads:
        piece += a.threads
    segment, head, table = _piece(a, piece)
    position = get_i32(a.positions + 4 * get_i32(segment + 4))
    return table, head, window_start(a, position), position + get_i32(segment + 8)


@native(AttendArguments)
def attend_lanes(arguments: Any) -> None:
    """Attention of every segment on every KV head."""
    a = carray(arguments, 1)[0]
    scratch = a.scratch + claim(a.counters + 8) * a.scratch_bytes
    while True:
        piece = claim(a.counters)
        if piece >= a.pieces * a.kv_heads:
            break
        segment, head, table = _piece(a, piece)
        token = get_i32(segment + 4)
        _attend_tile(a, token, get_i32(segment + 8), head, table, _following(a, piece), scratch)


def tile_tokens(share: int) -> int:
    """Tokens of a segment: its tile has at least 32 query rows, a multiple of 8 (16, where that stays small)."""
    step = 16 // math.gcd(16, share)
    while step * share < 32:
        step *= 2
    return step


def scratch_bytes(rows: int, head_dim: int) -> int:
    """What one thread needs for a tile of `rows` query rows."""
    padded = (rows + 15) // 16 * 16
    numbers = padded * (3 * head_dim + 2 * UNIT) * 4 + UNIT * head_dim * 4
    return numbers + padded * STATE_BYTES + 16 * UNIT + 8 * head_dim + 256
