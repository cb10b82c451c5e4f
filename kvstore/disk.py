"""The disk tier: blocks as records of LMDB, that outlive the process.

Two databases in one file, written together: the values (header and payload, checksummed) and a small index (parent,
depth, tokens), which is all that a restart reads (disk_databases.py). Here is when there is a transaction, and what its
failure means; what it does to a record: disk_transaction.py. How much it may do, and how much the store may hold:
disk_sizes.py. Layouts: format.py. The directory, and what may be opened: disk_files.py. Who may be evicted, and what
is written: residency.py.

LMDB's rules, and how they are kept:
- a transaction is durable when it returns, but for the last one's meta page (`metasync=False`): a power cut may cost
  that transaction, never the store;
- pages that a transaction frees are used again two transactions later: `capacity_blocks` leaves room for four;
- a reader keeps the pages of its snapshot from reuse, so one transaction reads SNAPSHOT_BYTES at most;
- a value is read by `preadv` of its pages (values.py), not through the memory map: a bad sector is then an error, not a
  SIGBUS. The index says where it is, as py-lmdb touches every page of a value that it is asked for, and what it said
  is kept (`_pages`, about 75 bytes a record): LMDB gives up the interpreter's lock for each key;
- LMDB frees as many pages as the header before a value says, so that is looked at before (disk_transaction.py).
"""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from mmap import PAGESIZE
from pathlib import Path
from threading import Lock
from typing import Final

import lmdb
import numpy as np

from kvstore.block import Key
from kvstore.copies import DISK, Loss, Place
from kvstore.disk_databases import Databases
from kvstore.disk_files import DATA_FILE, LMDB_LOCK_FILE, NO_ROOM, Directory, audited_here
from kvstore.disk_sizes import TransactionLimits, dropping_bytes, least_room_bytes, sizes
from kvstore.disk_transaction import PagesDamaged, Records, payload
from kvstore.format import About, first_page, header, index_intact
from kvstore.tier import Buffer, TierStats, TierUnusable
from kvstore.values import LEAST_PAYLOAD, Outcome, read_values, warm_up

SNAPSHOT_BYTES: Final = 4 * 2**20
"""One transaction reads so much, at most: about a millisecond. A write may have to wait for its end, see _transact."""

WAITS_FOR_READERS: Final = 25
WAIT_SECONDS: Final = 0.02
"""A write waits so often, so long, for room that readers keep: half a second in all; a read takes milliseconds."""

REFUSALS: Final = (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)
LOSSES: Final[dict[int, Loss | None]] = {
    Outcome.WHOLE: None,
    Outcome.CORRUPT: Loss.CORRUPT,
    Outcome.UNREADABLE: Loss.IO,
}

LIMITS: Final = TransactionLimits()


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. `lost`: records that cannot be read, and why."""

    records: int
    lost: tuple[tuple[Key, Loss], ...]


class NoRoom(Exception):
    """The quota has no room for a write."""


class DiskTier:
    """Opened by `DiskTier.open`. Reads may come from READERS threads at once; writers take turns.

    `notice`: one line for the log where what was in the directory could not be used; else empty.
    `broken`: why the store must be closed and opened again, once it must; until then None.
    `transaction_blocks`: the most blocks one `write` may have. `capacity_blocks`: the most that are kept.
    `orphans_dropped`: records that `records` has dropped, as their chains could not be followed up to them.
    """

    name = DISK

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        quota_bytes: int,
        block_bytes: int,
        fingerprint: str,
        limits: TransactionLimits = LIMITS,
    ) -> "DiskTier":
        """Opens the store in directory `path`, or makes one. One that cannot be used is moved aside: see `notice`.

        All files together never have more than `quota_bytes`. Raises TierUnusable: another process has the
        directory, it cannot be written, or the quota is too small.
        """
        directory, about = Directory(path), About.of(block_bytes, fingerprint)
        try:
            notice = directory.prepare(about, quota_bytes, limits)
            try:
                return cls(directory, about, directory.room_bytes(quota_bytes), limits, notice)
            except REFUSALS as refusal:
                notice = directory.set_aside(f"LMDB refuses the store: {refusal}", quota_bytes)
                return cls(directory, about, directory.room_bytes(quota_bytes), limits, notice)
        except (OSError, lmdb.Error) as error:
            directory.close()
            raise TierUnusable(f"kvstore.disk.path {path} cannot be opened: {error}") from error
        except BaseException:
            directory.close()
            raise

    @classmethod
    def open_existing(cls, path: Path, *, quota_bytes: int = 0) -> "DiskTier":
        """For an operator without a server: opens the store in `path` as it is, whatever model wrote it.

        Makes none, and moves nothing aside. The file may grow up to `quota_bytes`; 0 (or one that is too small): by
        what it takes to drop records. The audit runs in this process. Raises TierUnusable (there is no store, or
        another process has it) or Damage (it must not be opened).
        """
        data = path / DATA_FILE
        if not data.is_file():
            raise TierUnusable(f"there is no store in {path}")
        directory = Directory(path)
        try:
            (path / LMDB_LOCK_FILE).unlink(missing_ok=True)  # nobody else is here: what it says is outdated
            about = audited_here(data)
            as_it_is = data.stat().st_size + dropping_bytes(LIMITS.of(about.block_bytes))
            room = max(directory.room_bytes(quota_bytes), as_it_is, least_room_bytes(about.block_bytes))
            return cls(directory, about, room, LIMITS, notice="")
        except (OSError, lmdb.Error) as error:
            directory.close()
            raise TierUnusable(f"the store in {path} cannot be opened: {error}") from error
        except BaseException:
            directory.close()
            raise

    def __init__(
        self, directory: Directory, about: About, room_bytes: int, limits: TransactionLimits, notice: str
    ) -> None:
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
        self._sizes = sizes(room_bytes, about.block_bytes, limits)
        self._db = Databases(directory, about, self._sizes.map_bytes)
        self._records = Records(self._db, about)
        self._blocks = self._db.blocks_at_start
        self._writing = Lock()
        self._closed = False
        self._pages: dict[Key, int] = {}  # where values begin, of those written or read
        self._to_drop: dict[Key, None] = {}  # what could not be dropped so far: it is with the next write
        self._snapshot_blocks = max(1, SNAPSHOT_BYTES // about.block_bytes)

    @property
    def block_bytes(self) -> int:
        return self._about.block_bytes

    @property
    def transaction_blocks(self) -> int:
        return self._sizes.transaction_blocks

    @property
    def capacity_blocks(self) -> int:
        return self._sizes.capacity_blocks

    def buffer(self, slot: int) -> Buffer | None:
        """None: records are not memory."""
        return None

    def stats(self) -> TierStats:
        """Of the records; what the trees and free pages take is left out."""
        record = self._sizes.record_bytes
        return TierStats(self._blocks * record, self._sizes.capacity_blocks * record, self._blocks)

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        assert len(places) == len(into)
        losses: list[Loss | None] = []
        for start in range(0, len(places), self._snapshot_blocks):
            end = start + self._snapshot_blocks
            losses += self._read(places[start:end], into[start:end], self._pages)
        return losses

    def _read(
        self, places: Sequence[Place], into: Sequence[Buffer], pages: dict[Key, int]
    ) -> list[Loss | None]:
        """In one transaction; bytes move in one call without the interpreter's lock.

        `pages`: only what is not in it is looked up. Where another thread waited for the interpreter's lock, 84 keys
        took 550 µs instead of 50, and that thread as long. A page that is another value's by now is harmless: its
        header has another key.
        """
        losses: list[Loss | None] = [None] * len(places)
        found, offsets = [], []
        try:
            with self._db.env.begin() as txn:
                for index, place in enumerate(places):
                    page = pages.get(place.key) or self._look_up(txn, place.key, pages)
                    if isinstance(page, Loss):
                        losses[index] = page
                    else:
                        found.append(index)
                        offsets.append(page * PAGESIZE)
                outcomes = self._fetch(
                    [places[index] for index in found], offsets, [into[index] for index in found]
                )
        except lmdb.Error as error:
            return [self._loss(error)] * len(places)
        for index, outcome in zip(found, outcomes, strict=True):
            losses[index] = LOSSES[outcome]
            if losses[index]:
                pages.pop(places[index].key, None)  # whoever asks again gets what the index says
        return losses

    def _look_up(self, txn: "lmdb.Transaction[bytes]", key: Key, pages: dict[Key, int]) -> int | Loss:
        """The page that a value begins on, by the index, noted in `pages`; or why there is none."""
        known = txn.get(key, db=self._db.index)
        if known is None:
            return Loss.MISSING
        if not index_intact(key + known):
            return Loss.CORRUPT
        return pages.setdefault(key, first_page(known))  # a writer may know better by now

    def _fetch(self, places: Sequence[Place], offsets: Sequence[int], into: Sequence[Buffer]) -> list[int]:
        """Copies payloads out of the file, and checks them: whatever is said of a value, its checksum decides."""
        headers = b"".join([header(self._about, place.key, place.tokens) for place in places])
        targets = [payload(buffer, self.block_bytes) for buffer in into]
        return read_values(self._db.file, offsets, targets, headers, self.block_bytes)

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
                if not self._db.env.reader_check():
                    time.sleep(WAIT_SECONDS)
        return Loss.FULL

    def _attempt(self, blocks: Sequence[tuple[Place, Buffer]], drops: Sequence[Key]) -> Loss | None:
        """Raises MapFullError: nothing was done, but it may be possible in a moment."""
        if self.broken:
            return Loss.IO  # whatever LMDB wrote now might go over live pages
        try:
            with self._db.env.begin(write=True, buffers=True) as txn:
                for key in drops:
                    self._records.forget(txn, key)
                written = self._records.insert(txn, blocks)
                count = txn.stat(self._db.index)["entries"]
                if blocks and count > self.capacity_blocks:
                    raise NoRoom
        except lmdb.MapFullError:
            raise
        except (lmdb.Error, OSError, NoRoom, PagesDamaged) as error:
            return self._loss(error)
        self._blocks = count
        for key in drops:
            self._to_drop.pop(key, None)
            self._pages.pop(key, None)
        self._pages.update(written)
        return None

    def _loss(self, error: Exception) -> Loss:
        """What an error means for the blocks concerned; notes whether the store can go on."""
        number = _number(error)
        if isinstance(error, NoRoom | lmdb.MapFullError) or number in NO_ROOM:
            return Loss.FULL
        if isinstance(error, OSError):
            return Loss.IO  # of one record: a bad sector, say. The rest may be sound.
        if number == errno.EIO and not self._file_can_grow():
            return Loss.FULL
        self.broken = f"{type(error).__name__}: {error}"
        damaged = isinstance(error, PagesDamaged | lmdb.CorruptedError | lmdb.PageNotFoundError)
        return Loss.CORRUPT if damaged else Loss.IO

    def _file_can_grow(self) -> bool:
        """Whether the file system has room for a transaction: LMDB says EIO when one was cut short for want of it."""
        return self._directory.can_grow(2 * self._sizes.transaction_bytes, self._db.env.info()["map_size"])

    # --- all records ----------------------------------------------------------------------------------------------

    def records(self) -> tuple[Place, ...]:
        """What the index holds, parents before children, and else in the order of writing. Some seconds for 1 M.

        Drops orphans: records whose chain of parents is not here as a whole. Writes wait meanwhile. Raises
        TierUnusable where the store cannot be read: open it again.
        """
        with self._writing:
            try:
                kept, lost = self._db.places()
            except lmdb.Error as error:
                self._loss(error)
                raise TierUnusable(f"the index of {self._directory.path} cannot be read: {error}") from error
            self.orphans_dropped += len(lost)
            self._to_drop.update(dict.fromkeys(lost))
            self._drop_down_to(0)
        return tuple(kept)

    def verify(self, progress: Callable[[int, int], None]) -> Verification:
        """Reads every record and checks it, while the tier is in use. `progress`: records checked, and of how many."""
        buffer = np.empty(self.block_bytes, np.uint8)
        lost = []
        done = 0
        for key in self._db.all_keys():
            (loss,) = self._read([Place(key)], [buffer], {})  # by the index itself
            if loss and self._db.has(key):
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
        for keys in _batches(self._db.all_keys(), most):
            with self._writing:
                if loss := self._transact([], keys):
                    return loss
        return None

    def close(self) -> None:
        """No call may be under way, nor come after it; another `close` is none."""
        if not self._closed:
            self._closed = True
            self._db.close()
            self._directory.close()


def _batches(keys: Iterator[Key], size: int) -> Iterator[list[Key]]:
    while batch := list(islice(keys, size)):
        yield batch


def _number(error: Exception) -> int | None:
    """The system's number of an error, where it has one."""
    return error.errno if isinstance(error, OSError) else getattr(error, "code", None)
