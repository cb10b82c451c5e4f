"""The sampler's loops over a vocabulary, compiled: a row is one thread's work, in a fixed order.

Sorting is avoided: top-k and top-p find the bucket of a histogram in which they cut, and order that bucket
only. The noise of a token is turned into a Gumbel number only where a bound says that it may win. What is
computed is defined in sampler.py; sampler_torch.py is the plain version, sampler_cpu.py the entry.
"""

import ctypes
import math
from typing import Any

import numpy as np
from numba import carray, types

from engine import sampler_rows
from engine.kernels.cpu_lanes import claim, emitted, pointer
from engine.kernels.cpu_native import inner, native, structure

_TILE = 64  # tokens that one bound covers
_BUCKETS = 1024
_HIGHEST_GUMBEL = 53 * math.log(2)
_LOG2_E = 1 / math.log(2)
_EXP2 = tuple(math.log(2) ** n / math.factorial(n) for n in range(11))  # Taylor: 2.2e-13 on [-1/2, 1/2]

# Said once more here, as numba's cache of compiled code notices a change of this file only.
_MASS_BITS = 40
_FLOOR = -_MASS_BITS * math.log(2)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
assert (_MASS_BITS, _FLOOR) == (sampler_rows.MASS_BITS, sampler_rows.FLOOR)
assert [int(constant) for constant in (_GOLDEN, _MIX_1, _MIX_2)] == [
    sampler_rows.GOLDEN,
    sampler_rows.MIX_1,
    sampler_rows.MIX_2,
]

_i64 = ctypes.c_int64
_COMMON = {
    "next": _i64,  # the counter of rows claimed
    "thread": _i64,  # not used
    "counters": _i64,  # where the two are
    "rows": _i64,
    "vocabulary": _i64,
    "element": _i64,  # bytes of a logit: 4 or 2
    "logits": _i64,  # the addresses of arrays, from here on
    "tokens": _i64,
}
DrawArguments = structure(
    "DrawArguments",
    **_COMMON,
    max_sequences=_i64,  # a number: how many slots there are
    slots=_i64,
    positions=_i64,
    keys=_i64,  # arrays by slot, from here on
    inverse_temperatures=_i64,
    floors=_i64,
    top_k=_i64,
    top_p=_i64,
)
SummaryArguments = structure(
    "SummaryArguments",
    **_COMMON,
    top=_i64,  # a number: how many of the likeliest
    wanted=_i64,
    peaks=_i64,
    masses=_i64,
    chosen=_i64,
    ids=_i64,
    values=_i64,
)


@emitted(types.voidptr, types.int64)
def _at(builder: Any, address: Any) -> Any:
    return pointer(builder, address)


@inner
def _row(logits: int, row: int, vocabulary: int, element: int) -> Any:
    """A row of logits as fp32: where it stands, or widened from bf16."""
    if element == 4:
        return carray(_at(logits + 4 * row * vocabulary), vocabulary, np.float32)
    narrow = carray(_at(logits + 2 * row * vocabulary), vocabulary, np.uint16)
    wide = np.empty(vocabulary, np.uint32)
    for i in range(vocabulary):
        wide[i] = np.uint32(narrow[i]) << np.uint32(16)
    return wide.view(np.float32)


@inner
def _mixed(key: Any, count: int) -> Any:
    """The noise of a key's `count`: of a position, then of a token id."""
    x = key + np.uint64(count + 1) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@inner
def _noise(key: Any, token: int) -> Any:
    """52 random bits of this token."""
    return _mixed(key, token) >> np.uint64(12)


@inner
def _gumbel(noise: Any) -> float:
    """-log(-log(1 - v)), v in (0, 1) from 2**-53 to 1 - 2**-53: small v, large result, kept precise."""
    return -math.log(-math.log1p((np.float64(noise) + 0.5) * -(2.0**-52)))


@inner
def _mass(distance: float) -> Any:
    """round(exp(distance) * 2**_MASS_BITS) for _FLOOR <= distance <= 0, else 0.

    Written out without branches, so that loops over it vectorise.
    """
    inside = min(max(distance, _FLOOR), 0.0) * _LOG2_E
    whole = np.floor(inside + 0.5)
    part = inside - whole
    power = _EXP2[10]
    power = power * part + _EXP2[9]
    power = power * part + _EXP2[8]
    power = power * part + _EXP2[7]
    power = power * part + _EXP2[6]
    power = power * part + _EXP2[5]
    power = power * part + _EXP2[4]
    power = power * part + _EXP2[3]
    power = power * part + _EXP2[2]
    power = power * part + _EXP2[1]
    power = power * part + _EXP2[0]
    scale = np.int64(1) << (np.int64(whole) + _MASS_BITS)
    return np.int64(power * np.float64(scale) + 0.5) if distance >= _FLOOR else np.int64(0)


@inner
def _tile_tops(row: Any, tops: Any) -> int:
    """Fills tops with each tile's largest logit. The lowest id of the row's largest; -1: the row is unsound.

    Compared as integers: that vectorises, has -0 equal to 0, and shows NaN and infinities.
    """
    bits = row.view(np.int32)
    infinity = np.int32(0x7F800000)
    highest, lowest, winner = np.int32(-infinity), infinity, 0
    for tile in range(tops.size):
        top, bottom = np.int32(-infinity), infinity
        for i in range(tile * _TILE, min((tile + 1) * _TILE, row.size)):
            sign = np.int32(bits[i] >> 31)
            value = np.int32(np.int32(np.int32(bits[i] & 0x7FFFFFFF) ^ sign) - sign)
            top = max(top, value)
            bottom = min(bottom, value)
        lowest = min(lowest, bottom)
        if top > highest:
            highest, winner = top, tile
        tops[tile] = top if top >= 0 else np.int32(-0x80000000 - top)
    if highest == -infinity or highest >= infinity or lowest < -infinity:
        return -1
    peak = tops.view(np.float32)[winner]
    i = winner * _TILE
    while row[i] != peak:
        i += 1
    return i


@inner
def _draw_row(row: Any, key: Any, inverse_temperature: float, floor: float, top_k: int, top_p: float) -> int:
    """The token, or -1 if the row is unsound."""
    tops = np.empty((row.size + _TILE - 1) // _TILE, np.int32)
    peak = _tile_tops(row, tops)
    if peak < 0 or inverse_temperature == 0.0:
        return peak
    cut, last = floor, row.size
    if top_k < row.size or top_p < 1.0:
        nearest, last = _cut(
            row, tops.view(np.float32), np.float64(row[peak]), inverse_temperature, top_k, top_p
        )
        if nearest < floor:
            last = row.size
        cut = max(nearest, floor)
    return _race(row, tops.view(np.float32), peak, key, inverse_temperature, cut, last)


@inner
def _race(row: Any, tops: Any, peak: int, key: Any, inverse_temperature: float, cut: float, last: int) -> int:
    """argmax of distance + Gumbel noise over the tokens above `cut`, and those at it up to id `last`.

    As -log(-log(1 - v)) <= -log(v), a token can win only if v <= exp(distance - best).
    """
    base = np.float64(row[peak])
    winner, best = peak, _gumbel(_noise(key, peak))
    for tile in range(tops.size):
        top = (np.float64(tops[tile]) - base) * inverse_temperature
        if top < cut or top + _HIGHEST_GUMBEL < best:
            continue
        limit = np.uint64(min(math.exp(top - best) * (1 + 1e-9), 1.0) * 2.0**52)
        start, stop = tile * _TILE, min((tile + 1) * _TILE, row.size)
        if _lowest_noise(key, start, stop) > limit:
            continue
        for i in range(start, stop):
            noise = _noise(key, i)
            distance = (np.float64(row[i]) - base) * inverse_temperature
            if noise > limit or distance < cut or (distance == cut and i > last):
                continue
            score = distance + _gumbel(noise)
            if score > best or (score == best and i < winner):
                winner, best = i, score
    return winner


@inner
def _lowest_noise(key: Any, start: int, stop: int) -> Any:
    lowest = np.uint64(1 << 52)
    for i in range(start, stop):
        lowest = min(lowest, _noise(key, i))
    return lowest


@inner
def _cut(
    row: Any, tops: Any, base: float, inverse_temperature: float, top_k: int, top_p: float
) -> tuple[float, int]:
    """Where top-k, then top-p cut: the distance of the last token kept, and its id."""
    total: Any = np.int64(0)
    if top_k < row.size:
        reach = _reach_of_top_k(tops, base, inverse_temperature, top_k)
    else:
        total = _total_mass(row, base, inverse_temperature)
        reach = _reach_of_top_p(total, top_p, row.size)
    ids, distances = _candidates(row, tops, base, inverse_temperature, reach)
    scale = (_BUCKETS - 1) / max(-reach, 1e-9)
    counts, masses = _histogram(distances, scale)
    if top_k < row.size:
        total = masses.sum()
    cut, last = reach, row.size  # what is right if there are no more than top_k within reach
    if top_k < counts.sum():
        cut, last, total = _kth(ids, distances, scale, counts, masses, top_k)
    if top_p < 1.0:
        cut, last = _reaching(ids, distances, scale, counts, masses, _target_mass(total, top_p))
    return cut, last


@inner
def _total_mass(row: Any, base: float, inverse_temperature: float) -> Any:
    total = np.int64(0)
    for i in range(row.size):
        total += _mass((np.float64(row[i]) - base) * inverse_temperature)
    return total


@inner
def _target_mass(total: Any, top_p: float) -> Any:
    """What the kept tokens must reach together."""
    return min(max(np.int64(math.ceil(top_p * np.float64(total))), np.int64(1)), total)


@inner
def _reach_of_top_k(tops: Any, base: float, inverse_temperature: float, top_k: int) -> float:
    """A distance that the first k tokens all reach: the k-th largest of the tiles' tops."""
    if top_k > tops.size:
        return _FLOOR
    least = np.sort(tops)[tops.size - top_k]
    return max((np.float64(least) - base) * inverse_temperature, _FLOOR)


@inner
def _reach_of_top_p(total: Any, top_p: float, vocabulary: int) -> float:
    """A distance below which all the vocabulary together would not weigh what top-p may leave out."""
    spare = np.float64(total - _target_mass(total, top_p)) / np.float64(vocabulary)
    if spare < 2.0:
        return _FLOOR
    return max(math.log((spare - 1.0) * 2.0**-_MASS_BITS) - 1e-6, _FLOOR)  # 1: masses are rounded


@inner
def _candidates(
    row: Any, tops: Any, base: float, inverse_temperature: float, reach: float
) -> tuple[Any, Any]:
    """(ids, distances) of the tokens at `reach` or nearer, by id.

    Gathered without branches, which would be mispredicted. A tile without any is passed over.
    """
    ids, distances = np.empty(row.size + 1, np.int64), np.empty(row.size + 1, np.float64)
    found = 0
    for tile in range(tops.size):
        if (np.float64(tops[tile]) - base) * inverse_temperature < reach:
            continue
        for i in range(tile * _TILE, min((tile + 1) * _TILE, row.size)):
            ids[found] = i
            distances[found] = (np.float64(row[i]) - base) * inverse_temperature
            found += int(distances[found] >= reach)
    return ids[:found], distances[:found]


@inner
def _histogram(distances: Any, scale: float) -> tuple[Any, Any]:
    """(counts, masses) by bucket: likeliest first, `scale` buckets a unit of distance."""
    counts, masses = np.zeros(_BUCKETS, np.int64), np.zeros(_BUCKETS, np.int64)
    weights = np.empty(distances.size, np.int64)
    for i in range(distances.size):  # apart from the scatter below, so that it vectorises
        weights[i] = _mass(distances[i])
    for i in range(distances.size):
        bucket = int(-distances[i] * scale)
        counts[bucket] += 1
        masses[bucket] += weights[i]
    return counts, masses


@inner
def _kth(
    ids: Any, distances: Any, scale: float, counts: Any, masses: Any, top_k: int
) -> tuple[float, int, Any]:
    """The k-th token's distance and id, and the mass down to it."""
    bucket, before = _crossing(counts, top_k)
    ids, distances = _bucket_in_order(ids, distances, scale, bucket, counts[bucket])
    final = top_k - before - 1
    total = masses[:bucket].sum()
    for i in range(final + 1):
        total += _mass(distances[i])
    return distances[final], ids[final], total


@inner
def _reaching(
    ids: Any, distances: Any, scale: float, counts: Any, masses: Any, target: int
) -> tuple[float, int]:
    """Distance and id of the token that brings the mass to `target`."""
    bucket, mass = _crossing(masses, target)
    ids, distances = _bucket_in_order(ids, distances, scale, bucket, counts[bucket])
    final = 0
    mass += _mass(distances[0])
    while mass < target and final < distances.size - 1:
        final += 1
        mass += _mass(distances[final])
    return distances[final], ids[final]


@inner
def _crossing(amounts: Any, target: Any) -> tuple[int, Any]:
    """The bucket that brings the running sum to `target`, and the sum before it."""
    before, bucket = np.int64(0), 0
    while before + amounts[bucket] < target and bucket < amounts.size - 1:
        before += amounts[bucket]
        bucket += 1
    return bucket, before


@inner
def _bucket_in_order(ids: Any, distances: Any, scale: float, bucket: int, count: int) -> tuple[Any, Any]:
    """(ids, distances) of the bucket's tokens, likeliest first, equal ones by id."""
    members, found = np.empty(count, np.int64), 0
    for i in range(ids.size):
        if int(-distances[i] * scale) == bucket:
            members[found] = i
            found += 1
    members = members[np.argsort(-distances[members], kind="mergesort")]
    return ids[members], distances[members]


@inner
def _summarise_row(row: Any, ids: Any, values: Any) -> tuple[Any, Any]:
    """(largest logit, the row's mass); fills ids and values with the likeliest, in order."""
    tops = np.empty((row.size + _TILE - 1) // _TILE, np.int32)
    peak = row[_tile_tops(row, tops)]
    total = _total_mass(row, np.float64(peak), 1.0)
    if ids.size:
        _insert_likeliest(row, tops.view(np.float32), ids, values)
    return peak, total


@inner
def _insert_likeliest(row: Any, tops: Any, ids: Any, values: Any) -> None:
    """Insertion into a short sorted list, lower ids first among equals; tiles below it are passed over."""
    size, found = ids.size, 0
    for tile in range(tops.size):
        if found == size and tops[tile] <= values[size - 1]:
            continue
        for i in range(tile * _TILE, min((tile + 1) * _TILE, row.size)):
            if found == size and row[i] <= values[size - 1]:
                continue
            place = min(found, size - 1)
            while place > 0 and row[i] > values[place - 1]:
                ids[place], values[place] = ids[place - 1], values[place - 1]
                place -= 1
            ids[place], values[place] = i, row[i]
            found = min(found + 1, size)


@native(DrawArguments)
def draw_rows(arguments: Any) -> None:
    a = carray(arguments, 1)[0]
    tokens = carray(_at(a.tokens), a.rows, np.int64)
    slots = carray(_at(a.slots), a.rows, np.int64)
    positions = carray(_at(a.positions), a.rows, np.int64)
    keys = carray(_at(a.keys), a.max_sequences, np.uint64)
    inverse_temperatures = carray(_at(a.inverse_temperatures), a.max_sequences, np.float64)
    floors = carray(_at(a.floors), a.max_sequences, np.float64)
    top_k = carray(_at(a.top_k), a.max_sequences, np.int64)
    top_p = carray(_at(a.top_p), a.max_sequences, np.float64)
    while True:
        s = claim(a.counters)
        if s >= a.rows:
            break
        row = _row(a.logits, s, a.vocabulary, a.element)
        slot = slots[s]
        key = _mixed(keys[slot], positions[s])
        tokens[s] = _draw_row(row, key, inverse_temperatures[slot], floors[slot], top_k[slot], top_p[slot])


@native(SummaryArguments)
def summarise_rows(arguments: Any) -> None:
    a = carray(arguments, 1)[0]
    tokens = carray(_at(a.tokens), a.rows, np.int64)
    wanted = carray(_at(a.wanted), a.rows, np.int64)
    peaks = carray(_at(a.peaks), a.rows, np.float32)
    masses = carray(_at(a.masses), a.rows, np.int64)
    chosen = carray(_at(a.chosen), a.rows, np.float32)
    ids = carray(_at(a.ids), (a.rows, a.top), np.int64)
    values = carray(_at(a.values), (a.rows, a.top), np.float32)
    while True:
        s = claim(a.counters)
        if s >= a.rows:
            break
        row = _row(a.logits, wanted[s], a.vocabulary, a.element)
        peaks[s], masses[s] = _summarise_row(row, ids[s], values[s])
        chosen[s] = row[tokens[wanted[s]]]
