"""How LMDB 0.9 lays out its file on a 64-bit little-endian machine: only what the audit and the disk tier read.

Learnt from LMDB's mdb.c. What must hold of these is audit.py's.
"""

import sys
from dataclasses import dataclass
from struct import Struct
from typing import Final

assert sys.byteorder == "little", "LMDB files are in the machine's byte order, and we read little-endian ones"

# Page header. Pages of a tree end it with lower and upper, the first of a value's own pages with their count.
#
#  0  8  page number
#  8  2  (unused here)
# 10  2  flags: one of BRANCH, LEAF, OVERFLOW, META
# 12  2  lower: where the node offsets, 2 bytes each from byte 16 on, end      | 12  4  pages
# 14  2  upper: where the nodes begin; they fill the page to its end           |

TREE_PAGE: Final = Struct("<QHHHH")
OVERFLOW_PAGE: Final = Struct("<QHHI")
PAGE_HEADER_BYTES: Final = 16
assert TREE_PAGE.size == OVERFLOW_PAGE.size == PAGE_HEADER_BYTES

BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8

# Node, padded to an even size. A branch's has a key and a page; its first one's key counts for nothing.
#
#  0  4  leaf: size of the value                                               |  0  6  branch: the child's page number
#  4  2  leaf: flags: BIG: the value is the number of the first of its pages;  |
#             SUB: it is a database                                            |
#  6  2  size of the key; then the key, then the value

LEAF_NODE: Final = Struct("<IHH")
NODE_BYTES: Final = LEAF_NODE.size
BIG, SUB = 1, 2

# Database: of a named one this is its value in the main database.
#
#  0  4  page size, in a meta page's first one; else zero
#  4  2  flags; INTEGER_KEY for the list of free pages, else zero
#  6  2  depth: levels of its tree
#  8  8  branch pages
# 16  8  leaf pages
# 24  8  overflow pages
# 32  8  entries
# 40  8  root page; NO_PAGE: empty

DATABASE: Final = Struct("<IHHQQQQQ")
NO_PAGE: Final = 2**64 - 1
INTEGER_KEY: Final = 8

# Meta page: pages 0 and 1, written in turn; that with the larger transaction number counts.
#
#   0  16  page header
#  16   4  magic
#  20   4  version of the format
#  24   8  address of the map: zero
#  32   8  size of the map
#  40  48  database of free pages
#  88  48  main database
# 136   8  last page in use
# 144   8  transaction number

META_BODY: Final = Struct("<IIQQ48s48sQQ")
META_BYTES: Final = PAGE_HEADER_BYTES + META_BODY.size
META_MAGIC: Final = 0xBEEFC0DE
META_VERSION: Final = 1
assert (DATABASE.size, META_BYTES) == (48, 152)


class Damage(Exception):
    """The file is not what LMDB would have written."""


@dataclass(frozen=True, slots=True)
class Database:
    page_bytes: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int

    @classmethod
    def unpack(cls, data: bytes) -> "Database":
        return cls(*DATABASE.unpack(data))


@dataclass(frozen=True, slots=True)
class Meta:
    page_bytes: int
    free: Database
    main: Database
    last_page: int
    transaction: int

    @property
    def file_bytes(self) -> int:
        """What the file must have at least: LMDB maps it, and less is a SIGBUS."""
        return (self.last_page + 1) * self.page_bytes


def unpack_meta(page: bytes, number: int) -> Meta:
    """Meta page `number` (0 or 1). Raises Damage where LMDB would refuse the file, or could be led astray by it."""
    if len(page) < META_BYTES:
        raise Damage(f"meta page {number} is cut off")
    own_number, _, flags, _, _ = TREE_PAGE.unpack_from(page)
    magic, version, address, _, free, main, last_page, transaction = META_BODY.unpack_from(page, 16)
    if (magic, version) != (META_MAGIC, META_VERSION):
        raise Damage(f"meta page {number} is not of an LMDB 0.9 file")
    meta = Meta(
        Database.unpack(free).page_bytes, Database.unpack(free), Database.unpack(main), last_page, transaction
    )
    if (own_number, flags, address) != (number, META, 0) or meta.free.flags != INTEGER_KEY or meta.main.flags:
        raise Damage(f"meta page {number} has wrong flags")
    if transaction and transaction & 1 != number:
        raise Damage(f"meta page {number} has the other one's transaction number")
    return meta


def overflow_header(first_bytes: bytes) -> tuple[int, int, int]:
    """Of a value's first page: its own number, its flags, and how many pages the value has."""
    number, _, flags, pages = OVERFLOW_PAGE.unpack_from(first_bytes)
    return number, flags, pages
