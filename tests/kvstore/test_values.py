"""Data values are stamped and checked in compiled code as their layout says, and any change of one is noticed."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from kvstore import xxh3
from kvstore.format import HEADER_BYTES, PAGE_HEADER_BYTES, About, header, value_bytes
from kvstore.native import compiled
from kvstore.values import LEAST_PAYLOAD, Outcome, read_values, stamp
from tests.kvstore.disk_rig import block_of

KEY = bytes(range(32))
MODEL = About.of(300, "model")


@compiled
def hashed(data: NDArray[np.uint8], first: int) -> np.uint64:
    """Of all of it, taken in by two calls: `first` stripes, then the others."""
    sums, stripes = xxh3.start(), (len(data) - 1) // xxh3.STRIPE
    first = min(first, stripes)
    xxh3.take_in(sums, 0, data.ctypes.data, first)
    xxh3.take_in(sums, first, data.ctypes.data + first * xxh3.STRIPE, stripes - first)
    last = data.ctypes.data + len(data) - xxh3.STRIPE
    return xxh3.finish(sums, last, len(data))


@settings(deadline=None)
@given(st.integers(xxh3.SHORT + 1, 5000) | st.sampled_from([65_536, 65_537, 200_000]), st.integers(0, 100))
def test_hashes_are_those_of_the_xxhash_package(size: int, first: int) -> None:
    data = block_of(size, size).copy()
    assert hashed(data, first) == xxh3_64_intdigest(data.data)


@pytest.mark.parametrize("size", [1024, 1025, 16 * 1024, 17 * 1024 - 1])
def test_hashes_of_whole_blocks_of_stripes_are_those_of_the_package(size: int) -> None:
    for shift in range(3):  # memory that no vector is aligned to
        data = block_of(size, size + shift).copy()[shift:]
        assert hashed(data, 5) == xxh3_64_intdigest(data.data)


def stamped(about: About = MODEL, key: bytes = KEY) -> NDArray[np.uint8]:
    value = np.zeros(value_bytes(about.block_bytes, 4096), np.uint8)
    value.data[8:HEADER_BYTES] = header(about, key, 16)
    payload = block_of(1, about.block_bytes)
    stamp(value, payload.ctypes.data, len(payload))
    return value


class File:
    """Values behind page headers, one after another, as LMDB's file has them."""

    def __init__(self, path: Path, *values: NDArray[np.uint8]) -> None:
        self.values = values
        path.write_bytes(b"".join(bytes(PAGE_HEADER_BYTES) + value.tobytes() for value in values))
        self.descriptor = os.open(path, os.O_RDWR)

    def read(self, about: About = MODEL, key: bytes = KEY, tokens: int = 16) -> list[Outcome]:
        """What reading all of them says; what is whole has the right bytes, and nothing else was touched."""
        count, size = len(self.values), about.block_bytes
        offsets = [index * (PAGE_HEADER_BYTES + len(self.values[0])) for index in range(count)]
        targets = np.full((count, size + 16), 7, np.uint8)
        found = read_values(
            self.descriptor,
            offsets,
            [target.ctypes.data for target in targets],
            header(about, key, tokens) * count,
            size,
        )
        for outcome, target in zip(found, targets, strict=True):
            assert outcome != Outcome.WHOLE or np.array_equal(target[:size], block_of(1, size))
            assert (target[size:] == 7).all()
        return [Outcome(outcome) for outcome in found]

    def flip(self, bit: int) -> None:
        (byte,) = os.pread(self.descriptor, 1, PAGE_HEADER_BYTES + bit // 8)
        os.pwrite(self.descriptor, bytes([byte ^ 1 << bit % 8]), PAGE_HEADER_BYTES + bit // 8)


@pytest.mark.parametrize("size", [LEAST_PAYLOAD, 137 + 64, 3984, 4096, 20_000, 2**20 + 1])
def test_a_value_has_the_checksum_that_its_layout_says_and_is_read_back(size: int, tmp_path: Path) -> None:
    value = stamped(About.of(size, "model"))
    covered = value[8 : HEADER_BYTES + size]
    assert value[:8].view(np.uint64)[0] == xxh3_64_intdigest(covered.data)
    assert np.array_equal(value[HEADER_BYTES : HEADER_BYTES + size], block_of(1, size))
    assert not value[HEADER_BYTES + size :].any()
    assert File(tmp_path / "file", value).read(About.of(size, "model")) == [Outcome.WHOLE]


def test_every_flipped_bit_of_header_and_payload_is_noticed(tmp_path: Path) -> None:
    file = File(tmp_path / "file", stamped())
    for bit in range(8 * (HEADER_BYTES + MODEL.block_bytes)):
        file.flip(bit)
        assert file.read() == [Outcome.CORRUPT], bit
        file.flip(bit)
    assert file.read() == [Outcome.WHOLE]


@pytest.mark.parametrize(
    "other", [About.of(300, "another"), About.of(301, "model"), replace(MODEL, format=3)]
)
def test_a_value_of_another_store_is_corrupt(other: About, tmp_path: Path) -> None:
    assert File(tmp_path / "file", stamped(other)).read() == [Outcome.CORRUPT]


def test_a_value_under_another_key_is_corrupt(tmp_path: Path) -> None:
    assert File(tmp_path / "file", stamped(key=bytes(32))).read() == [Outcome.CORRUPT]


def test_who_reads_need_not_know_how_many_tokens_a_block_has(tmp_path: Path) -> None:
    assert File(tmp_path / "file", stamped()).read(tokens=0) == [Outcome.WHOLE]


def test_each_of_many_values_has_its_own_outcome_and_a_short_file_is_corrupt(tmp_path: Path) -> None:
    file = File(tmp_path / "file", stamped(), stamped(key=bytes(32)), stamped(), stamped())
    os.truncate(tmp_path / "file", 3 * (PAGE_HEADER_BYTES + len(file.values[0])) + HEADER_BYTES + 200)
    assert file.read() == [Outcome.WHOLE, Outcome.CORRUPT, Outcome.WHOLE, Outcome.CORRUPT]


def test_what_the_system_refuses_is_unreadable(tmp_path: Path) -> None:
    file = File(tmp_path / "file", stamped())
    os.close(file.descriptor)
    file.descriptor = os.open(tmp_path, os.O_RDONLY)
    assert file.read() == [Outcome.UNREADABLE], "a directory has no bytes"
