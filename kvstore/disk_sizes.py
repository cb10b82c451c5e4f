"""How many blocks a disk store may hold, and how many one transaction, from the room for its file. Pure arithmetic.

Pages that a transaction frees are used again two transactions later: what is left free, beside the records, is the
pages of four transactions (disk.py).
"""

from dataclasses import dataclass
from mmap import PAGESIZE
from typing import Final

from kvstore.format import value_pages
from kvstore.tier import TierUnusable

TREE_BYTES: Final = 340
"""Of both trees' pages for one record, at worst, when they are half full: nodes of 50 and 106 bytes, and branches."""


@dataclass(frozen=True, slots=True)
class TransactionLimits:
    """One write holds so much, at most.

    Measured, durably written MB/s (bench/disk_records.py): blocks of 32 KiB 60, 310, 600 by 1, 8, 32 a transaction; of
    48 KiB 364, 453, 426, 448 by 8, 21, 42, 64; of 192 KiB 660, 671, 663, 479 by 5, 8, 10, 21; of 256 KiB 400, 840, 670
    by 1, 8, 32; of 1 MiB 330 by one and 500 to 870 by more, without order; of 4 MiB 990 by 1, 890 by 4 and 390 by 16.
    """

    blocks: int = 64
    bytes: int = 2 * 2**20

    def of(self, block_bytes: int) -> int:
        """Blocks of this size in one write, if the file has room for it."""
        return max(1, min(self.blocks, self.bytes // block_bytes))


@dataclass(frozen=True, slots=True)
class Sizes:
    value_pages: int  # of one record: header and payload
    transaction_blocks: int  # the most of one write
    capacity_blocks: int  # the most that are kept
    map_bytes: int  # what LMDB's file may have

    @property
    def record_bytes(self) -> int:
        """Of a value's pages; what the trees and free pages take is left out."""
        return self.value_pages * PAGESIZE

    @property
    def transaction_bytes(self) -> int:
        """Of the values of the largest write."""
        return self.transaction_blocks * self.record_bytes

    def holds(self, file_bytes: int, records: int) -> bool:
        """Whether a store of this size may be taken over: what is too much of it must be droppable."""
        surplus = records > self.capacity_blocks
        return file_bytes + (dropping_bytes(self.transaction_blocks) if surplus else 0) <= self.map_bytes


def sizes(room_bytes: int, block_bytes: int, limits: TransactionLimits) -> Sizes:
    """The sizes of a store whose file may have `room_bytes`. Raises TierUnusable: there is no room for a block."""
    pages, each = room_bytes // PAGESIZE, value_pages(block_bytes, PAGESIZE)
    fitting = (pages // 24 - 16) // (each + 4)  # the reserve is then a sixth of the quota, at most
    transaction_blocks = max(1, min(limits.of(block_bytes), fitting))
    reserve = _reserve(transaction_blocks, each)
    capacity_blocks = (pages - reserve) * PAGESIZE // (each * PAGESIZE + TREE_BYTES)
    if capacity_blocks < 1:
        least = (reserve + each + 2) * PAGESIZE
        raise TierUnusable(f"kvstore.disk.bytes has no room for a block: give it more than {least:,}")
    return Sizes(each, transaction_blocks, capacity_blocks, pages * PAGESIZE)


def least_room_bytes(block_bytes: int) -> int:
    """Of a store for one record: its reserve included, with transactions of one."""
    pages = value_pages(block_bytes, PAGESIZE)
    return (_reserve(1, pages) + pages + 2) * PAGESIZE


def dropping_bytes(transaction_blocks: int) -> int:
    """That a full file grows by before pages which drops have freed are used again."""
    return _reserve(transaction_blocks, 0) * PAGESIZE


def _reserve(transaction_blocks: int, pages: int) -> int:
    """Pages of four transactions, their trees' included."""
    return 4 * (transaction_blocks * (pages + 4) + 16)
