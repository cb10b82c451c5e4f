"""The disk tier: blocks as records of LMDB, that outlive the process.

Two databases in one file, written together: the values (header and payload, checksummed) and a small index (parent,
depth, tokens), which is all that a restart reads. Layouts: format.py. The directory, and what may be opened:
disk_files.py. Who may be evicted, and what is written: residency.py.

LMDB's rules, and how they are kept:
- a transaction is durable when it returns, but for the last one's meta page (`metasync=False`): a power cut may cost
  that transaction, never the store;
- pages that a transaction frees are used again two transactions later: `capacity_blocks` leaves room for four;
- a reader keeps the pages of its snapshot from reuse, so one transaction reads SNAPSHOT_BYTES at most;
- a value is read by `preadv` of its pages (values.py), not through the memory map: a bad sector is then an error, not a
  SIGBUS. The index says where it is, as py-lmdb touches every page of a value that it is asked for;
- LMDB frees as many pages as the header before a value says, so that is looked at before a value is forgotten.
"""

import errno
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_uint64
from dataclasses import dataclass
from itertools import islice
from mmap import PAGESIZE
from pathlib import Path
from threading import Lock
from typing import Final

import lmdb
import numpy as np

from kvstore.audit import report
from kvstore.block import Key
from kvstore.copies import DISK, Loss, Place
from kvstore.disk_files import DATA_FILE, LMDB_LOCK_FILE, Directory
from kvstore.format import (
    ABOUT_KEY,
    DATA,
    FORMAT,
    HEADER_BYTES,
    INDEX,
    KEY_BYTES,
    PAGE_HEADER_BYTES,
    About,
    first_page,
    header,
    index_intact,
    pack_index,
    unpack_index,
    value_bytes,
    value_pages,
)
from kvstore.lmdb_pages import OVERFLOW, Damage, overflow_header
from kvstore.tier import Buffer, TierStats, TierUnusable
from kvstore.values import LEAST_PAYLOAD, Outcome, read_values, stamp, warm_up

TRANSACTION_BYTES: Final = 2 * 2**20
TRANSACTION_BLOCKS: Final = 64
"""One write holds so much, at most. Measured, durably written MB/s (bench/disk_records.py): blocks of 32 KiB 60, 310,
600 by 1, 8, 32 a transaction; of 48 KiB 364, 453, 426, 448 by 8, 21, 42, 64; of 192 KiB 660, 671, 663, 479 by 5, 8, 10,
21; of 256 KiB 400, 840, 670 by 1, 8, 32; of 1 MiB 330 by one and 500 to 870 by more, without order; of 4 MiB 990 by 1,
890 by 4 and 390 by 16."""

SNAPSHOT_BYTES: Final = 4 * 2**20
"""One transaction reads so much, at most: about a millisecond. A write may have to wait for its end, see _transact."""

TREE_BYTES: Final = 340
"""Of both trees' pages for one record, at worst, when they are half full: nodes of 50 and 106 bytes, and branches."""

READERS: Final = 126
WAITS_FOR_READERS: Final = 25
WAIT_SECONDS: Final = 0.02
"""A write waits so often, so long, for room that readers keep: half a second in all; a read takes milliseconds."""

REFUSALS: Final = (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)
LOSSES: Final[dict[int, Loss | None]] = {
    Outcome.WHOLE: None,
    Outcome.CORRUPT: Loss.CORRUPT,
    Outcome.UNREADABLE: Loss.IO,
}
NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _NoRoom(Exception):
    """The quota has no room for a write."""


class _Damaged(Exception):
    """What LMDB relies on is damaged: it must be closed, and audited before it is opened again."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. `lost`: records that cannot be read, and why."""

    records: int
    lost: tuple[tuple[Key, Loss], ...]


class DiskTier:
    """Opened by `DiskTier.open`. Reads may come from READERS threads at once; writers take turns.

    `notice`: one line for the log where what was in the directory could not be used; else empty.
    `broken`: why the store must be closed and opened again, once it must; until then None.
    `transaction_blocks`: the most blocks one `write` may have. `capacity_blocks`: the most that are kept.
    `orphans_dropped`: records that `records` has dropped, as their chains could not be followed up to them.
    """

    name = DISK

    @classmethod
    def open(cls, path: Path, *, quota_bytes: int, block_bytes: int, fingerprint: str) -> "DiskTier":
        """Opens the store in directory `path`, or makes one. One that cannot be used is moved aside: see `notice`.

        All files together never have more than `quota_bytes`. Raises TierUnusable: another process has the
        directory, it cannot be written, or the quota is too small.
        """
        directory, about = Directory(path), About.of(block_bytes, fingerprint)
        try:
            notice = directory.prepare(about, quota_bytes)
            try:
                return cls(directory, about, directory.room_bytes(quota_bytes), notice)
            except REFUSALS as refusal:
                notice = directory.set_aside(f"LMDB refuses the store: {refusal}", quota_bytes)
                return cls(directory, about, directory.room_bytes(quota_bytes), notice)
        except (OSError, lmdb.Error) as error:
            directory.close()
            raise TierUnusable(f"kvstore.disk.path {path} cannot be opened: {error}") from error
        except BaseException:
            directory.close()
            raise

    @classmethod
    def open_existing(cls, path: Path, *, quota_bytes: int = 0) -> "DiskTier":
        """For an operator without a server: opens the store in `path` as it is, whatever model wrote it.

        Makes none, and moves nothing aside. The file may grow up to `quota_bytes`; 0 (or one that is too small): not
        at all. The audit runs in this process. Raises TierUnusable (there is no store, or another process has it) or
        Damage (it must not be opened).
        """
        data = path / DATA_FILE
        if not data.is_file():
            raise TierUnusable(f"there is no store in {path}")
        directory = Directory(path)
        try:
            (path / LMDB_LOCK_FILE).unlink(missing_ok=True)  # nobody else is here: what it says is outdated
            about = _audited(data)
            least = least_room_bytes(value_pages(about.block_bytes, PAGESIZE))
            room = max(directory.room_bytes(quota_bytes), data.stat().st_size, least)
            return cls(directory, about, room, notice="")
        except (OSError, lmdb.Error) as error:
            directory.close()
            raise TierUnusable(f"the store in {path} cannot be opened: {error}") from error
        except BaseException:
            directory.close()
            raise

    def __init__(self, directory: Directory, about: About, room_bytes: int, notice: str) -> None:
        """Use `open`. `directory` is prepared, and ours from now on."""
        if about.block_bytes < LEAST_PAYLOAD:
            raise TierUnusable(
                f"blocks of {about.block_bytes} bytes: the disk takes none below {LEAST_PAYLOAD}"
            )
        warm_up()
        self.notice = notice
        self.broken: str | None = None
        self.orphans_dropped = 0
        self._about = about
        self._directory = directory
        self._pages = value_pages(about.block_bytes, PAGESIZE)
        self._sizes(room_bytes)
        self._writing = Lock()
        self._closed = False
        self._to_drop: dict[Key, None] = {}  # what could not be dropped so far: it is with the next write
        self._snapshot_blocks = max(1, SNAPSHOT_BYTES // about.block_bytes)
        self._staging = np.zeros(value_bytes(about.block_bytes, PAGESIZE), np.uint8)
        self._open(room_bytes)

    def _sizes(self, room_bytes: int) -> None:
        """Chooses the transactions' size and the capacity, from the room for the file and the size of a record."""
        pages = room_bytes // PAGESIZE
        wanted = min(TRANSACTION_BLOCKS, TRANSACTION_BYTES // self.block_bytes)
        fitting = (pages // 24 - 16) // (self._pages + 4)  # the reserve is then a sixth of the quota, at most
        self.transaction_blocks = max(1, min(wanted, fitting))
        reserve = 4 * (self.transaction_blocks * (self._pages + 4) + 16)
        self.capacity_blocks = (pages - reserve) * PAGESIZE // (self._pages * PAGESIZE + TREE_BYTES)
        if self.capacity_blocks < 1:
            least = (reserve + self._pages + 2) * PAGESIZE
            raise TierUnusable(f"kvstore.disk.bytes has no room for a block: give it more than {least:,}")

    def _open(self, room_bytes: int) -> None:
        self._env = lmdb.open(
            str(self._directory.path),
            map_size=room_bytes // PAGESIZE * PAGESIZE,
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
            self._begin_store()
            self._file = os.open(self._directory.data, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self._env.close()
            raise

    def _begin_store(self) -> None:
        """Opens the databases, and writes into a new store what it holds."""
        assert self._env.stat()["psize"] == PAGESIZE, "the audit lets no other page size pass"
        main = self._env.open_db(None)
        with self._env.begin(write=True) as txn:
            self._data, self._index = self._env.open_db(DATA, txn), self._env.open_db(INDEX, txn)
            if txn.get(ABOUT_KEY, db=main) is None:
                txn.put(ABOUT_KEY, self._about.pack(), db=main)
            stored = About.unpack(txn.get(ABOUT_KEY, b"", db=main))
            assert stored == self._about, "prepare() lets no other pass"
        with self._env.begin() as reading:
            self._blocks = reading.stat(self._index)["entries"]

    @property
    def block_bytes(self) -> int:
        return self._about.block_bytes

    def buffer(self, slot: int) -> Buffer | None:
        """None: records are not memory."""
        return None

    def stats(self) -> TierStats:
        """Of the records; what the trees and free pages take is left out."""
        record = self._pages * PAGESIZE
        return TierStats(self._blocks * record, self.capacity_blocks * record, self._blocks)

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        assert len(places) == len(into)
        losses: list[Loss | None] = []
        for start in range(0, len(places), self._snapshot_blocks):
            end = start + self._snapshot_blocks
            losses += self._read(places[start:end], into[start:end])
        return losses

    def _read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        """In one transaction, and in one call without the interpreter's lock."""
        losses: list[Loss | None] = [Loss.MISSING] * len(places)
        found: list[int] = []
        offsets: list[int] = []
        try:
            with self._env.begin() as txn:
                for index, place in enumerate(places):
                    known = txn.get(place.key, db=self._index)
                    if known is not None:
                        losses[index] = Loss.CORRUPT
                        if index_intact(place.key + known):
                            found.append(index)
                            offsets.append(first_page(known) * PAGESIZE)
                outcomes = self._fetch(
                    [places[index] for index in found], offsets, [into[index] for index in found]
                )
        except lmdb.Error as error:
            return [self._loss(error)] * len(places)
        for index, outcome in zip(found, outcomes, strict=True):
            losses[index] = LOSSES[outcome]
        return losses

    def _fetch(self, places: Sequence[Place], offsets: Sequence[int], into: Sequence[Buffer]) -> list[int]:
        """Copies payloads out of the file, and checks them: whatever is said of a value, its checksum decides."""
        headers = b"".join([header(self._about, place.key, place.tokens) for place in places])
        targets = [self._payload(buffer) for buffer in into]
        return read_values(self._file, offsets, targets, headers, self.block_bytes)

    def _payload(self, buffer: Buffer) -> int:
        """The address of a block's bytes."""
        assert buffer.nbytes == self.block_bytes, "one block, whole"
        assert buffer.strides == (1,), "in one piece"
        return _address(buffer)

    # --- writing --------------------------------------------------------------------------------------------------

    def write(
        self, places: Sequence[Place], data: Sequence[Buffer], drops: Sequence[Key] = ()
    ) -> list[Loss | None]:
        """All or nothing, in one transaction; drops beyond `transaction_blocks` leave in others, before it."""
        assert len(places) == len(data) <= self.transaction_blocks, "more than one transaction may have"
        with self._writing:
            self._to_drop.update(dict.fromkeys(drops))
            loss = self._drop_down_to(self.transaction_blocks) or self._transact(
                list(zip(places, data, strict=True)), self._next_drops()
            )
        return [loss] * len(places)

    def drop(self, keys: Sequence[Key]) -> None:
        """What cannot be dropped now, for want of room, is with the next write."""
        with self._writing:
            self._to_drop.update(dict.fromkeys(keys))
            self._drop_down_to(0)

    def _drop_down_to(self, left: int) -> Loss | None:
        """Drops until no more than `left` wait. Why it could not."""
        while len(self._to_drop) > left:
            if loss := self._transact([], self._next_drops()):
                return loss
        return None

    def _next_drops(self) -> list[Key]:
        return list(islice(self._to_drop, self.transaction_blocks))

    def _transact(self, blocks: Sequence[tuple[Place, Buffer]], drops: Sequence[Key]) -> Loss | None:
        """Drops and inserts in one transaction. None, or why nothing was done.

        A reader that takes long keeps the pages of its snapshot: then there is no room until it is gone. One of another
        process (LMDB's own tools, say) that was killed would keep them for ever: LMDB looks for such when told to.
        """
        for _ in range(WAITS_FOR_READERS):
            try:
                return self._attempt(blocks, drops)
            except lmdb.MapFullError:
                if not self._env.reader_check():
                    time.sleep(WAIT_SECONDS)
        return Loss.FULL

    def _attempt(self, blocks: Sequence[tuple[Place, Buffer]], drops: Sequence[Key]) -> Loss | None:
        """Raises MapFullError: nothing was done, but it may be possible in a moment."""
        if self.broken:
            return Loss.IO  # whatever LMDB wrote now might go over live pages
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                for key in drops:
                    self._forget(txn, key)
                self._insert(txn, blocks)
                count = txn.stat(self._index)["entries"]
        except lmdb.MapFullError:
            raise
        except (lmdb.Error, OSError, _NoRoom, _Damaged) as error:
            return self._loss(error)
        self._blocks = count
        for key in drops:
            self._to_drop.pop(key, None)
        return None

    def _insert(self, txn: "lmdb.Transaction[memoryview]", blocks: Sequence[tuple[Place, Buffer]]) -> None:
        for place, _ in blocks:
            self._forget(txn, place.key)  # never written over: LMDB would trust the old value's page header
        if txn.stat(self._index)["entries"] + len(blocks) > self.capacity_blocks:
            raise _NoRoom
        for place, buffer in blocks:
            self._put(txn, place, buffer)

    def _put(self, txn: "lmdb.Transaction[memoryview]", place: Place, data: Buffer) -> None:
        assert len(place.key) == KEY_BYTES, "a block key"
        self._staging.data[8:HEADER_BYTES] = header(self._about, place.key, place.tokens)
        stamp(self._staging, self._payload(data), self.block_bytes)
        new = txn.put(place.key, self._staging.data, overwrite=False, db=self._data)
        known = pack_index(place, txn.id(), _page_of(txn.get(place.key, db=self._data)))
        new &= txn.put(place.key, known, overwrite=False, db=self._index)
        assert new, "a block twice in one write"

    def _forget(self, txn: "lmdb.Transaction[memoryview]", key: Key) -> None:
        known = txn.get(key, db=self._index)
        if known is not None:
            self._check_pages(key, bytes(known))
            txn.delete(key, db=self._data)
            txn.delete(key, db=self._index)

    def _check_pages(self, key: Key, known: bytes) -> None:
        """LMDB would free as many pages as the value's page header says. Raises _Damaged where it is not ours."""
        if not index_intact(key + known):
            raise _Damaged("an index value is damaged")
        page = first_page(known)
        if overflow_header(os.pread(self._file, PAGE_HEADER_BYTES, page * PAGESIZE)) != (
            page,
            OVERFLOW,
            self._pages,
        ):
            raise _Damaged(f"the header of page {page} is damaged")

    def _loss(self, error: Exception) -> Loss:
        """What an error means for the blocks concerned; notes whether the store can go on."""
        number = _number(error)
        if isinstance(error, _NoRoom | lmdb.MapFullError) or number in NO_ROOM:
            return Loss.FULL
        if isinstance(error, OSError):
            return Loss.IO  # of one record: a bad sector, say. The rest may be sound.
        if number == errno.EIO and not self._file_can_grow():
            return Loss.FULL
        self.broken = f"{type(error).__name__}: {error}"
        damaged = isinstance(error, _Damaged | lmdb.CorruptedError | lmdb.PageNotFoundError)
        return Loss.CORRUPT if damaged else Loss.IO

    def _file_can_grow(self) -> bool:
        """Whether the file system has room for a transaction: LMDB says EIO when one was cut short for want of it."""
        with self._directory.data.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = min(
                2 * self.transaction_blocks * self._pages * PAGESIZE, self._env.info()["map_size"] - size
            )
            try:
                if wanted > 0:
                    os.posix_fallocate(file.fileno(), size, wanted)
            except OSError as error:
                return error.errno not in NO_ROOM
            finally:
                file.truncate(size)
        return True

    # --- all records ----------------------------------------------------------------------------------------------

    def records(self) -> tuple[Place, ...]:
        """What the index holds, parents before children, and else in the order of writing. Some seconds for 1 M.

        Drops orphans: records whose chain of parents is not here as a whole. Writes wait meanwhile. Raises
        TierUnusable where the store cannot be read: open it again.
        """
        with self._writing:
            try:
                places, sequences, damaged = self._load()
            except lmdb.Error as error:
                self._loss(error)
                raise TierUnusable(f"the index of {self._directory.path} cannot be read: {error}") from error
            kept, orphans = in_order(places, sequences)
            self.orphans_dropped += len(orphans) + len(damaged)
            self._to_drop.update(dict.fromkeys((*orphans, *damaged)))
            self._drop_down_to(0)
        return tuple(kept)

    def _load(self) -> tuple[list[Place], Sequence[int], list[Key]]:
        """The places, the transactions that wrote them, and the keys whose index values are damaged."""
        places, sequences, damaged = [], array("Q"), []
        names: dict[Key, Key] = {}  # so that a key is one object, whoever names it
        with self._env.begin() as txn, txn.cursor(self._index) as cursor:
            for key, value in cursor.iternext():
                entry = unpack_index(names.setdefault(key, key), value, names)
                if entry is None:
                    damaged.append(key)
                else:
                    places.append(entry[0])
                    sequences.append(entry[1])
        return places, sequences, damaged

    def verify(self, progress: Callable[[int, int], None]) -> Verification:
        """Reads every record and checks it, while the tier is in use. `progress`: records checked, and of how many."""
        buffer = np.empty(self.block_bytes, np.uint8)
        lost = []
        done = 0
        for key in self._keys():
            (loss,) = self.read([Place(key)], [buffer])
            if loss and self._has(key):
                lost.append((key, loss))
            done += 1
            progress(done, max(done, self._blocks))
        return Verification(done, tuple(lost))

    def clear(self) -> Loss | None:
        """Forgets every record, and what was moved aside. None, or why some are left.

        The file keeps its size: its pages are used again.
        """
        self._directory.forget_asides()
        most = (
            32 * self.transaction_blocks
        )  # neighbours share pages of the trees, so that more fit a transaction
        for keys in _batches(self._keys(), most):
            with self._writing:
                if loss := self._transact([], keys):
                    return loss
        return None

    def _keys(self) -> Iterator[Key]:
        """Of the index, in order; each thousand is read at once, so that no snapshot is held for long."""
        after = b""
        while True:
            with self._env.begin() as txn, txn.cursor(self._index) as cursor:
                found = cursor.set_range(after + b"\0") if after else cursor.first()
                keys = list(islice(cursor.iternext(values=False), 1000)) if found else []
            if not keys:
                return
            yield from keys
            after = keys[-1]

    def _has(self, key: Key) -> bool:
        with self._env.begin() as txn:
            return txn.get(key, db=self._index) is not None

    def close(self) -> None:
        """No call may be under way, nor come after it; another `close` is none."""
        if not self._closed:
            self._closed = True
            os.close(self._file)
            self._env.close()
            self._directory.close()


def _audited(data: Path) -> About:
    """What a store holds, of which it is certain that LMDB may open it. Raises Damage, or TierUnusable: it is empty."""
    found = report(str(data))
    if damage := found.get("damage"):
        raise Damage(damage)
    about = About.unpack(bytes.fromhex(str(found["about"])))
    if about is None:
        raise TierUnusable(f"there is no store in {data.parent}: it has only been begun")
    if about.format != FORMAT:
        raise TierUnusable(
            f"the store in {data.parent} has format {about.format}, this version reads {FORMAT}"
        )
    return about


def least_room_bytes(pages: int) -> int:
    """Of a store for one record of so many pages: its reserve included, with transactions of one."""
    return (4 * (pages + 4 + 16) + pages + 2) * PAGESIZE


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


def _batches(keys: Iterator[Key], size: int) -> Iterator[list[Key]]:
    while batch := list(islice(keys, size)):
        yield batch


def _page_of(value: memoryview | None) -> int:
    """The page that a value begins on, by the header before it. Of one just written: py-lmdb touches all of it."""
    assert value is not None
    return c_uint64.from_address(_address(np.frombuffer(value, np.uint8)) - PAGE_HEADER_BYTES).value


def _address(bytes_: Buffer) -> int:
    return int(bytes_.ctypes.data)


def _number(error: Exception) -> int | None:
    """The system's number of an error, where it has one."""
    return error.errno if isinstance(error, OSError) else getattr(error, "code", None)
