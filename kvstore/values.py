"""Data values of the disk tier in compiled code: many read and checked, or one laid out and stamped, in one call.

Layout: format.py. The interpreter's lock is free meanwhile, so that two readers are twice as fast as one, and a
payload is hashed just after it was moved, while it is in the processor's cache. A value is read by the system's call
and not through LMDB's map: what the disk cannot give is then an error, not a signal that ends the process.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore import xxh3
from kvstore.format import HEADER_BYTES, PAGE_HEADER_BYTES, TOKENS_AT
from kvstore.native import compiled, memcpy, preadv

HASHED_HEADER: Final = HEADER_BYTES - 8  # all but the checksum itself
SPLIT: Final = -HASHED_HEADER % xxh3.STRIPE  # bytes of the payload in the stripe where the header ends
LEAST_PAYLOAD: Final = xxh3.SHORT - HASHED_HEADER + 1  # less is hashed in another way


class Outcome(IntEnum):
    WHOLE = 0
    CORRUPT = 1  # cut off, another's header, or not what its checksum says
    UNREADABLE = 2  # the system says so


_WHOLE, _CORRUPT, _UNREADABLE = (int(outcome) for outcome in Outcome)


def read_values(
    file: int, offsets: Sequence[int], targets: Sequence[int], headers: bytes, block_bytes: int
) -> list[int]:
    """Reads values into memory, and checks them. An Outcome for each: only a WHOLE one's target may be used.

    `offsets`: of the values' first pages in the file. `targets`: addresses of `block_bytes` writable bytes. `headers`:
    what `format.header` gives for each, one after another; their `tokens` are not looked at.
    """
    assert len(headers) == HASHED_HEADER * len(offsets)
    ends = np.array([*offsets, *targets], np.int64)
    outcomes: list[int] = _read_values(file, ends, np.frombuffer(headers, np.uint8), block_bytes).tolist()
    return outcomes


@compiled
def _read_values(
    file: int, ends: NDArray[np.int64], headers: NDArray[np.uint8], block_bytes: int
) -> NDArray[np.int8]:
    count = len(ends) // 2
    outcomes = np.empty(count, np.int8)
    for index in range(count):
        header = headers[HASHED_HEADER * index : HASHED_HEADER * (index + 1)]
        outcomes[index] = _read_value(file, ends[index], ends[count + index], header, block_bytes)
    return outcomes


@compiled
def _read_value(file: int, offset: int, target: int, header: NDArray[np.uint8], block_bytes: int) -> int:
    head = np.empty(PAGE_HEADER_BYTES + HEADER_BYTES, np.uint8)
    parts = np.empty(4, np.int64)
    parts[0], parts[1], parts[2], parts[3] = head.ctypes.data, len(head), target, block_bytes
    count = preadv(file, parts.ctypes.data, 2, offset)
    if count < 0:
        return _UNREADABLE
    own = head[PAGE_HEADER_BYTES:]
    whole = count == len(head) + block_bytes
    if (
        not whole
        or not _same(own[8:], header)
        or own[:8].view(np.uint64)[0] != _hash(own, target, block_bytes)
    ):
        return _CORRUPT
    return _WHOLE


@compiled
def _same(header: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> bool:
    others = 0
    for at in range(len(wanted)):
        counts = not TOKENS_AT <= at + 8 < TOKENS_AT + 4
        others += counts and header[at] != wanted[at]
    return others == 0


@compiled
def stamp(value: NDArray[np.uint8], payload: int, size: int) -> None:
    """Completes a data value whose header is in place: copies the payload from an address, and writes the checksum."""
    target = value.ctypes.data + HEADER_BYTES
    memcpy(target, payload, size)
    value[:8].view(np.uint64)[0] = _hash(value[:HEADER_BYTES], target, size)


@compiled
def _hash(header: NDArray[np.uint8], payload: int, size: int) -> np.uint64:
    """The checksum of a header, but for the checksum in it, and of the payload at an address."""
    joint = np.empty(HASHED_HEADER + SPLIT, np.uint8)
    joint[:HASHED_HEADER] = header[8:]
    memcpy(joint.ctypes.data + HASHED_HEADER, payload, SPLIT)
    sums, first, length = xxh3.start(), len(joint) // xxh3.STRIPE, HASHED_HEADER + size
    xxh3.take_in(sums, 0, joint.ctypes.data, first)
    xxh3.take_in(sums, first, payload + SPLIT, (length - 1) // xxh3.STRIPE - first)
    found: np.uint64 = xxh3.finish(sums, payload + size - xxh3.STRIPE, length)
    return found


def warm_up() -> None:
    """Compiles what the first copies would wait for, or loads it from the cache."""
    read_values(-1, [0], [0], bytes(HASHED_HEADER), 0)
    value = np.zeros(HEADER_BYTES + 2 * LEAST_PAYLOAD, np.uint8)
    stamp(value, value.ctypes.data + HEADER_BYTES + LEAST_PAYLOAD, LEAST_PAYLOAD)
