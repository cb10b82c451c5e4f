"""The disk tier's LMDB environment: the file, its two databases, and the index read as a whole, as a restart does.

What is read and written of single records is disk.py's and disk_transaction.py's; layouts are format.py's.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from mmap import PAGESIZE
from typing import Final

import lmdb
import numpy as np

from kvstore.block import Key
from kvstore.copies import Place
from kvstore.disk_files import Directory
from kvstore.format import ABOUT_KEY, DATA, INDEX, About, unpack_index

READERS: Final = 126
"""Transactions that may read at once."""


class Databases:
    """`env` has `data` (values by key) and `index`; `file` is the same file, for `pread`."""

    def __init__(self, directory: Directory, about: About, map_bytes: int) -> None:
        """Opens them; a new store is told what it holds. `directory` is prepared. Raises OSError or lmdb.Error."""
        self.env = lmdb.open(
            str(directory.path),
            map_size=map_bytes,
            sync=True,
            metasync=False,
            writemap=False,
            readahead=True,
            mode=0o600,
            max_dbs=2,
            max_readers=READERS,
            max_spare_txns=8,
            lib_version=0,
        )
        try:
            self._begin_store(about)
            self.file = os.open(directory.data, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.env.close()
            raise

    def _begin_store(self, about: About) -> None:
        assert self.env.stat()["psize"] == PAGESIZE, "the audit lets no other page size pass"
        main = self.env.open_db(None)
        with self.env.begin(write=True) as txn:
            self.data, self.index = self.env.open_db(DATA, txn), self.env.open_db(INDEX, txn)
            if txn.get(ABOUT_KEY, db=main) is None:
                txn.put(ABOUT_KEY, about.pack(), db=main)
            stored = About.unpack(txn.get(ABOUT_KEY, b"", db=main))
            assert stored == about, "prepare() lets no other pass"
        with self.env.begin() as reading:
            self.blocks_at_start = int(reading.stat(self.index)["entries"])

    def has(self, key: Key) -> bool:
        with self.env.begin() as txn:
            return txn.get(key, db=self.index) is not None

    def all_keys(self) -> Iterator[Key]:
        """Of the index, in order; each thousand is read at once, so that no snapshot is held for long."""
        after = b""
        while True:
            with self.env.begin() as txn, txn.cursor(self.index) as cursor:
                found = cursor.set_range(after + b"\0") if after else cursor.first()
                keys = list(islice(cursor.iternext(values=False), 1000)) if found else []
            if not keys:
                return
            yield from keys
            after = keys[-1]

    def places(self) -> tuple[list[Place], list[Key]]:
        """All that the index holds, `in_order`; and the keys of what cannot be followed up, or is damaged."""
        places, sequences, damaged = [], array("Q"), []
        names: dict[Key, Key] = {}  # so that a key is one object, whoever names it
        with self.env.begin() as txn, txn.cursor(self.index) as cursor:
            for key, value in cursor.iternext():
                entry = unpack_index(names.setdefault(key, key), value, names)
                if entry is None:
                    damaged.append(key)
                else:
                    places.append(entry[0])
                    sequences.append(entry[1])
        kept, orphans = in_order(places, sequences)
        return kept, [*orphans, *damaged]

    def close(self) -> None:
        os.close(self.file)
        self.env.close()


def in_order(places: Sequence[Place], sequences: Sequence[int]) -> tuple[list[Place], list[Key]]:
    """Places by their sequence numbers, but children after their parents; and the keys of those never reached."""
    waiting: dict[Key, list[Place]] = {}
    done: set[Key] = {b""}
    kept: list[Place] = []
    order = np.argsort(
        np.array(sequences, np.uint64), kind="stable"
    )  # without the interpreter's lock, unlike sorted()
    for number in order.tolist():
        ready = [places[number]]
        while ready:
            place = ready.pop()
            if place.parent not in done:
                waiting.setdefault(place.parent, []).append(place)
                continue
            kept.append(place)
            done.add(place.key)
            ready += waiting.pop(place.key, ())
    return kept, [place.key for places in waiting.values() for place in places]
