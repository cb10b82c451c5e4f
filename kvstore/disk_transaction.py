"""One transaction of the disk tier, from within: a record goes in, or is forgotten, with LMDB's trust in pages checked.

LMDB frees as many pages as the header before a value says, so that is looked at before a value is forgotten; and
nothing is written over. All values go in before the index: LMDB takes pages in turn, so the values' are then next to
each other in the file, with none of the index between, and are written and read in larger pieces (48 KiB, on ext4:
1.5 times as fast). When there is one, and what its failure means, is disk.py's.
"""

import os
from collections.abc import Sequence
from ctypes import addressof, c_char, c_uint64
from mmap import PAGESIZE

import lmdb
import numpy as np

from kvstore.block import Key
from kvstore.copies import Place
from kvstore.disk_databases import Databases
from kvstore.format import (
    HEADER_BYTES,
    KEY_BYTES,
    PAGE_HEADER_BYTES,
    About,
    first_page,
    header,
    index_intact,
    pack_index,
    value_bytes,
    value_pages,
)
from kvstore.lmdb_pages import OVERFLOW, overflow_header
from kvstore.tier import Buffer
from kvstore.values import stamp


class PagesDamaged(Exception):
    """What LMDB relies on is damaged: it must be closed, and audited before it is opened again."""


class Records:
    """Puts and forgets records, one transaction at a time: the bytes of a value are put together in one place."""

    def __init__(self, databases: Databases, about: About) -> None:
        self._databases = databases
        self._about = about
        self._pages = value_pages(about.block_bytes, PAGESIZE)
        self._staging = np.zeros(value_bytes(about.block_bytes, PAGESIZE), np.uint8)

    def insert(
        self, txn: "lmdb.Transaction[memoryview]", blocks: Sequence[tuple[Place, Buffer]]
    ) -> dict[Key, int]:
        """The page that each value begins on. Raises PagesDamaged: the transaction must then be aborted."""
        for place, _ in blocks:
            self.forget(txn, place.key)  # never written over: LMDB would trust the old value's page header
        for place, buffer in blocks:
            self._put_value(txn, place, buffer)
        return {place.key: self._put_index(txn, place) for place, _ in blocks}

    def forget(self, txn: "lmdb.Transaction[memoryview]", key: Key) -> None:
        """Nothing, if there is none. Raises PagesDamaged."""
        known = txn.get(key, db=self._databases.index)
        if known is not None:
            self._check_pages(key, bytes(known))
            txn.delete(key, db=self._databases.data)
            txn.delete(key, db=self._databases.index)

    def _put_value(self, txn: "lmdb.Transaction[memoryview]", place: Place, data: Buffer) -> None:
        assert len(place.key) == KEY_BYTES, "a block key"
        self._staging.data[8:HEADER_BYTES] = header(self._about, place.key, place.tokens)
        stamp(self._staging, payload(data, self._about.block_bytes), self._about.block_bytes)
        new = txn.put(place.key, self._staging.data, overwrite=False, db=self._databases.data)
        assert new, "a block twice in one write"

    def _put_index(self, txn: "lmdb.Transaction[memoryview]", place: Place) -> int:
        page = _page_of(txn.get(place.key, db=self._databases.data))
        new = txn.put(place.key, pack_index(place, txn.id(), page), overwrite=False, db=self._databases.index)
        assert new, "values and index have the same keys"
        return page

    def _check_pages(self, key: Key, known: bytes) -> None:
        """LMDB would free as many pages as the value's page header says."""
        if not index_intact(key + known):
            raise PagesDamaged("an index value is damaged")
        page = first_page(known)
        before_value = os.pread(self._databases.file, PAGE_HEADER_BYTES, page * PAGESIZE)
        if overflow_header(before_value) != (page, OVERFLOW, self._pages):
            raise PagesDamaged(f"the header of page {page} is damaged")


def payload(buffer: Buffer, block_bytes: int) -> int:
    """The address of a block's bytes."""
    assert buffer.nbytes == block_bytes, "one block, whole"
    assert buffer.strides == (1,), "in one piece"
    return _address(buffer)


def _address(bytes_: Buffer) -> int:
    """0.2 µs where they may be written, else one, as `ctypes.data` takes."""
    if bytes_.flags.writeable:
        return addressof(c_char.from_buffer(bytes_.data))
    return int(bytes_.ctypes.data)


def _page_of(value: memoryview | None) -> int:
    """The page that a value begins on, by the header before it. Of one just written: py-lmdb touches all of it."""
    assert value is not None
    return c_uint64.from_address(_address(np.frombuffer(value, np.uint8)) - PAGE_HEADER_BYTES).value
