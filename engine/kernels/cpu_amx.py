"""Attention of bf16 on AMX tiles: the work of `attend_lanes`, with the matrix products 5 times as fast.

Same segments, same pool, same running maximum as in cpu_attention.py; queries and weights are rounded to bf16, the
dtype of keys and values, and summed in float32. Another order of sums, hence other bits: a model uses one of the
two, for all of its positions.
"""

from typing import Any

from numba import carray

from engine.kernels.cpu_attention import (
    STATE_BYTES,
    UNIT,
    begin,
    finish,
    key_panels,
    rescale,
    soften,
    window_start,
)
from engine.kernels.cpu_keys import AttendArguments, rotate, store_token
from engine.kernels.cpu_lanes import (
    LANES,
    claim,
    clear,
    get_i32,
    get_i64,
    load_words,
    put_i64,
    store_words,
)
from engine.kernels.cpu_native import inner, native
from engine.kernels.cpu_tiles import (
    CONFIGURATION_BYTES,
    configure_tiles,
    restore_tiles,
    save_tiles,
    score_1,
    score_4,
    weigh_1,
    weigh_4,
)

_ROWS = 16  # of a tile
_STEP = 32  # keys, or numbers of a head, that one instruction takes


def amx_fits(head_dim: int) -> bool:
    return head_dim % _STEP == 0


@inner
def _scores(head_dim: int, groups: int, q: int, panels: int, scores: int) -> None:
    """scores [16][UNIT] = queries times `groups` panels of 16 keys."""
    steps = head_dim // _STEP
    group = 0
    while group < groups:
        if group + 4 <= groups:
            score_4(q, 2 * head_dim, panels + 8 * group, 64, scores + 64 * group, 4 * UNIT, steps)
            group += 4
        else:
            score_1(q, 2 * head_dim, panels + 8 * group, 64, scores + 64 * group, 4 * UNIT, steps)
            group += 1


@inner
def _weigh(head_dim: int, steps: int, weights: int, starts: int, sums: int) -> None:
    """sums [16][head_dim] += weights [16][UNIT] (bf16) times the values of 32 * steps keys."""
    columns = starts + 8 * (UNIT // _STEP)
    for step in range(steps):
        put_i64(columns + 8 * step, get_i64(starts + 8 * step))
    group = 0
    while group < head_dim // LANES:
        wide = 4 if group + 4 <= head_dim // LANES else 1
        if wide == 4:
            weigh_4(weights, 2 * UNIT, columns, 4 * head_dim, sums + 64 * group, 4 * head_dim, steps)
        else:
            weigh_1(weights, 2 * UNIT, columns, 4 * head_dim, sums + 64 * group, 4 * head_dim, steps)
        for step in range(steps):
            put_i64(columns + 8 * step, get_i64(columns + 8 * step) + 64 * wide)
        group += wide


@inner
def _values(a: Any, groups: int, panels: int, starts: int, gathered: int) -> None:
    """Writes where every 32 keys' values start; gathers them where a block holds 16 (a missing half is zeros)."""
    half = LANES * a.head_dim * 2
    for step in range((groups + 1) // 2):
        at = panels + 8 * (UNIT // LANES + 2 * step)
        put_i64(starts + 8 * step, get_i64(at))
        if a.block_size % _STEP != 0:
            to = gathered + 2 * half * step
            put_i64(starts + 8 * step, to)
            _copy(get_i64(at), to, half)
            if 2 * step + 1 < groups:
                _copy(get_i64(at + 8), to + half, half)
            else:
                clear(to + half, half)


@inner
def _copy(source: int, to: int, count_bytes: int) -> None:
    for at in range(0, count_bytes, 64):
        store_words(to + at, load_words(source + at))


@inner
def _queries(a: Any, token: int, rows: int, head: int, q: int) -> None:
    """Rotates `rows` queries from `token` on into bf16 rows at `q`."""
    share = a.heads // a.kv_heads
    for row in range(rows):
        t = token + row // share
        source = (t * (a.heads + 2 * a.kv_heads) + head * share + row % share) * a.head_dim * 2
        position = get_i32(a.positions + 4 * t)
        rotate(a.qkv + source, a.rope + position * 4 * a.head_dim, q + row * 2 * a.head_dim, a.head_dim, 2, 2)


@inner
def _attend_tile(a: Any, token: int, tokens: int, head: int, table: int, q: int) -> None:
    """Attention of `tokens` tokens' queries on one KV head. `q`: scratch, laid out as below."""
    share = a.heads // a.kv_heads
    rows = tokens * share
    padded = (rows + _ROWS - 1) // _ROWS * _ROWS
    width = 4 * a.head_dim
    scores = q + padded * 2 * a.head_dim
    weights = scores + padded * 4 * UNIT
    sums = weights + padded * 2 * UNIT
    states = sums + padded * width
    panels = states + padded * STATE_BYTES
    starts = panels + 16 * (UNIT // LANES)
    gathered = starts + 16 * (UNIT // _STEP)
    clear(q, padded * 2 * a.head_dim)
    begin(padded, a.head_dim, sums, states)
    _queries(a, token, rows, head, q)
    position = get_i32(a.positions + 4 * token)
    end = position + tokens
    for start in range(window_start(a, position), end, UNIT):
        keys = min(UNIT, end - start)
        groups = (keys + LANES - 1) // LANES
        key_panels(a, table, head, start, groups, panels)
        for row in range(0, rows, _ROWS):
            _scores(a.head_dim, groups, q + row * 2 * a.head_dim, panels, scores + row * 4 * UNIT)
        for row in range(rows):
            seen = position + row // share + 1 - start
            at = scores + row * 4 * UNIT
            to = weights + row * 2 * UNIT
            state = states + row * STATE_BYTES
            factor = soften(at, groups, seen - a.window, seen, a.scale, state, to, 2)
            rescale(sums + row * width, a.head_dim, factor)
            if groups % 2:
                clear(to + 32 * groups, 32)  # half of what an instruction takes
        _values(a, groups, panels, starts, gathered)
        for row in range(0, rows, _ROWS):
            _weigh(a.head_dim, (groups + 1) // 2, weights + row * 2 * UNIT, starts, sums + row * width)
    for row in range(rows):
        finish(
            a,
            sums + row * width,
            states + row * STATE_BYTES,
            token + row // share,
            head * share + row % share,
        )


@native(AttendArguments)
def attend_tiles(arguments: Any) -> None:
    """Attention of every segment on every KV head; the thread's tile configuration is put back."""
    a = carray(arguments, 1)[0]
    saved = a.scratch + claim(a.counters + 8) * a.scratch_bytes
    scratch = saved + 2 * CONFIGURATION_BYTES
    save_tiles(saved)
    configured = 0
    while True:
        piece = claim(a.counters)
        if piece >= a.pieces * a.kv_heads:
            break
        segment = a.segments + 12 * (a.pieces - 1 - piece // a.kv_heads)  # long contexts first: shorter ends
        head = piece % a.kv_heads
        token, tokens = get_i32(segment + 4), get_i32(segment + 8)
        table = a.tables + get_i32(a.slots + 4 * get_i32(segment)) * a.table_row
        if a.stores:
            store_token(a, token, table, head, scratch)
        height = min(_ROWS, tokens * (a.heads // a.kv_heads))
        if height != configured:
            configure_tiles(saved + CONFIGURATION_BYTES, height)
            configured = height
        _attend_tile(a, token, tokens, head, table, scratch)
    restore_tiles(saved)
