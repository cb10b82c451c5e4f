"""Row by row in compiled code: embedding, residual add with RMS norm, RMS norm of heads, and the gated activation.

The residual stream is float32 whatever the model's dtype; a result is rounded once. Sums run over 16 lanes and are
reduced by a tree, so a row's bits depend on its numbers alone. Attention is in cpu_attention.py.
"""

import ctypes
import math
from typing import Any

import numpy as np
from numba import carray

from engine.kernels.cpu_lanes import (
    LANES,
    claim,
    exp2,
    fma,
    get_i64,
    load_some,
    smaller,
    splat,
    store_some,
    total,
)
from engine.kernels.cpu_native import inner, native, structure

PIECE = 16  # rows a thread takes at a time

_MINUS_LOG2_E = np.float32(-math.log2(math.e))
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)
_HIGHEST = np.float32(126.0)

_i64 = ctypes.c_int64
RowArguments = structure(
    "RowArguments",
    next=_i64,  # the counter of pieces claimed
    thread=_i64,  # not used
    counters=_i64,  # where the two are
    rows=_i64,
    width=_i64,  # numbers a row of the result
    element=_i64,  # bytes of a number of the model's dtype
    left=_i64,  # embedding: the table; norm: delta, or 0; activation: gate and up
    right=_i64,  # embedding: token ids (int64); norm: the weight
    stream=_i64,  # the float32 residual stream
    out=_i64,
    epsilon=ctypes.c_float,
)
HeadArguments = structure(
    "HeadArguments",
    next=_i64,  # the counter of pieces claimed
    thread=_i64,  # not used
    counters=_i64,  # where the two are
    rows=_i64,
    heads=_i64,
    kv_heads=_i64,
    head_dim=_i64,
    element=_i64,  # bytes of a number of the model's dtype
    qkv=_i64,
    weights=_i64,  # of q's heads, then of k's
    epsilon=ctypes.c_float,
)


@native(RowArguments)
def embed_rows(arguments: Any) -> None:
    """stream[row] = table[tokens[row]]."""
    a = carray(arguments, 1)[0]
    while True:
        start = claim(a.counters) * PIECE
        if start >= a.rows:
            break
        for row in range(start, min(start + PIECE, a.rows)):
            source = a.left + get_i64(a.right + 8 * row) * a.width * a.element
            for at in range(0, a.width, LANES):
                count = min(LANES, a.width - at)
                value = load_some(source + at * a.element, count, a.element)
                store_some(a.stream + 4 * (row * a.width + at), value, count, 4)


@native(RowArguments)
def norm_rows(arguments: Any) -> None:
    """stream += delta; out = stream / sqrt(mean(stream**2) + epsilon) * weight."""
    a = carray(arguments, 1)[0]
    while True:
        start = claim(a.counters) * PIECE
        if start >= a.rows:
            break
        for row in range(start, min(start + PIECE, a.rows)):
            stream = a.stream + 4 * row * a.width
            squares = splat(_ZERO)
            for at in range(0, a.width, LANES):
                count = min(LANES, a.width - at)
                value = load_some(stream + 4 * at, count, 4)
                if a.left != 0:
                    value = value + load_some(a.left + (row * a.width + at) * a.element, count, a.element)
                    store_some(stream + 4 * at, value, count, 4)
                squares = fma(value, value, squares)
            mean = total(squares) / np.float32(a.width)
            factor = splat(_ONE / np.float32(math.sqrt(mean + a.epsilon)))
            for at in range(0, a.width, LANES):
                count = min(LANES, a.width - at)
                value = load_some(stream + 4 * at, count, 4) * factor
                weight = load_some(a.right + at * a.element, count, a.element)
                store_some(a.out + (row * a.width + at) * a.element, value * weight, count, a.element)


@inner
def _norm_head(head: int, weights: int, head_dim: int, element: int, epsilon: Any) -> None:
    """One head over its root mean square, times the weights, in place."""
    squares = splat(_ZERO)
    for at in range(0, head_dim, LANES):
        value = load_some(head + at * element, min(LANES, head_dim - at), element)
        squares = fma(value, value, squares)
    mean = total(squares) / np.float32(head_dim)
    factor = splat(_ONE / np.float32(math.sqrt(mean + epsilon)))
    for at in range(0, head_dim, LANES):
        count = min(LANES, head_dim - at)
        value = load_some(head + at * element, count, element) * factor
        weight = load_some(weights + at * element, count, element)
        store_some(head + at * element, value * weight, count, element)


@native(HeadArguments)
def head_rows(arguments: Any) -> None:
    """Every head of q and of k is normed alone."""
    a = carray(arguments, 1)[0]
    head_bytes = a.head_dim * a.element
    while True:
        start = claim(a.counters) * PIECE
        if start >= a.rows:
            break
        for row in range(start, min(start + PIECE, a.rows)):
            first = a.qkv + row * (a.heads + 2 * a.kv_heads) * head_bytes
            for head in range(a.heads + a.kv_heads):
                weights = a.weights + (head_bytes if head >= a.heads else 0)
                _norm_head(first + head * head_bytes, weights, a.head_dim, a.element, a.epsilon)


@native(RowArguments)
def gate_rows(arguments: Any) -> None:
    """out = gate / (1 + exp(-gate)) * up, where a row of `left` is gate and up."""
    a = carray(arguments, 1)[0]
    while True:
        start = claim(a.counters) * PIECE
        if start >= a.rows:
            break
        for row in range(start, min(start + PIECE, a.rows)):
            source = a.left + 2 * row * a.width * a.element
            for at in range(0, a.width, LANES):
                count = min(LANES, a.width - at)
                gate = load_some(source + at * a.element, count, a.element)
                up = load_some(source + (a.width + at) * a.element, count, a.element)
                power = smaller(gate * splat(_MINUS_LOG2_E), splat(_HIGHEST))
                value = gate / (splat(_ONE) + exp2(power)) * up
                store_some(a.out + (row * a.width + at) * a.element, value, count, a.element)
