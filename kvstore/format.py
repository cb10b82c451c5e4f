"""The bytes of the disk tier's records: their layout, their checksums, and what makes a store ours.

Pure, and quick to import: the audit's process needs no more than this. LMDB's own pages are lmdb_pages.py's.

The checksum is XXH3's 64 bits. Measured on 64 KiB and 4 MiB, in GB/s: XXH3 49 and 27 (its 128 bits: as many), CRC-32C
26 and 6, zlib's CRC-32 5 and 4, BLAKE2b 0.9 (bench/disk_records.py); long ones are hashed without the GIL. Damage of
any kind goes unseen once in 2⁶⁴, with CRC-32C once in 2³². It is no protection against somebody who writes records.
"""

from dataclasses import dataclass
from hashlib import sha256
from struct import Struct
from typing import Final

from xxhash import xxh3_64_intdigest

from kvstore.block import Key
from kvstore.copies import Place

FORMAT: Final = 2
"""Changes whenever a layout below does: a store with another number is moved aside."""

KEY_BYTES: Final = 32

# All integers are little-endian and unsigned; nothing is aligned by the compiler.
#
# What the store is: one value in LMDB's main database, under ABOUT_KEY.
#
#   0   8  magic, b"SluiceKV"
#   8   4  format number
#  12   4  zero
#  16   8  block_bytes: the payload of every record
#  24  32  SHA-256 of the fingerprint: all that changes the bytes of a block
#  56   8  checksum of bytes 0 … 55
#
# A data value: database DATA, by block key. Every one has the same size, n · page − 16 bytes, where 16 is LMDB's
# header on the first of the value's pages: values fill whole pages, and what one leaves another fits.
#
#   0   8  checksum of bytes 8 … 111 and of the payload
#   8   8  magic
#  16   4  format number
#  20   4  tokens: how many positions of the block are computed
#  24   8  block_bytes
#  32  32  block key
#  64  32  SHA-256 of the fingerprint
#  96  16  zero; so the payload is 128 bytes into its page
# 112   …  payload
#   …   …  zero, up to the value's size; not covered by the checksum
#
# An index value: database INDEX, by block key. The checksum comes last, so that in LMDB's node all it covers stands in
# one piece: the key, and then the value.
#
#   0  32  key of the parent; zeros: it has none
#  32   4  depth: blocks before it in its chain
#  36   4  tokens
#  40   8  number of the transaction that wrote it: later writes have larger ones
#  48   8  number of the value's first page: where in the file it is, without asking LMDB, which would touch all of it
#  56   8  checksum of the key and of bytes 0 … 55

ABOUT_KEY: Final = b"about"
DATA: Final = b"data"
INDEX: Final = b"index"
MAGIC: Final = b"SluiceKV"

_ABOUT = Struct("<8sIIQ32s")
_HEADER = Struct("<8sIIQ32s32s16x")  # without the checksum, which stands before it
_INDEX = Struct("<32sIIQQ")
_CHECKSUM = Struct("<Q")

ABOUT_BYTES: Final = _ABOUT.size + _CHECKSUM.size
HEADER_BYTES: Final = _CHECKSUM.size + _HEADER.size
TOKENS_AT: Final = 20  # in a data value's header: the one field that a reader need not know
INDEX_BYTES: Final = _INDEX.size + _CHECKSUM.size
PAGE_HEADER_BYTES: Final = 16
assert (ABOUT_BYTES, HEADER_BYTES, INDEX_BYTES) == (64, 112, 64)

PAGE_AT: Final = 48  # in an index value

NO_PARENT: Final = bytes(KEY_BYTES)


def checksum(data: bytes | memoryview) -> int:
    """Of contiguous bytes. Without the GIL where there are many."""
    return xxh3_64_intdigest(data)


@dataclass(frozen=True, slots=True)
class About:
    """What a store holds: equal ones can be used in each other's place."""

    block_bytes: int
    fingerprint: bytes  # SHA-256
    format: int = FORMAT

    @classmethod
    def of(cls, block_bytes: int, fingerprint: str) -> "About":
        return cls(block_bytes, sha256(fingerprint.encode()).digest())

    def pack(self) -> bytes:
        body = _ABOUT.pack(MAGIC, self.format, 0, self.block_bytes, self.fingerprint)
        return body + _CHECKSUM.pack(checksum(body))

    @classmethod
    def unpack(cls, value: bytes) -> "About | None":
        """None: this is not what `pack` writes. Another format number's may be longer, and begins alike."""
        if len(value) < ABOUT_BYTES:
            return None
        magic, number, _, block_bytes, fingerprint = _ABOUT.unpack_from(value)
        (stored,) = _CHECKSUM.unpack_from(value, _ABOUT.size)
        if magic != MAGIC or stored != checksum(value[: _ABOUT.size]):
            return None
        return cls(block_bytes, fingerprint, number)

    def difference(self, wanted: "About") -> str:
        """Why this store cannot be used as `wanted`; empty: it can."""
        if self.format != wanted.format:
            return f"its format is {self.format}, this version reads {wanted.format}"
        if self.block_bytes != wanted.block_bytes:
            return f"its blocks have {self.block_bytes:,} bytes, this model's {wanted.block_bytes:,}"
        if self.fingerprint != wanted.fingerprint:
            return "its blocks were computed by another model, or in another way"
        return ""


def value_pages(block_bytes: int, page_bytes: int) -> int:
    """Pages of one data value."""
    return -(-(PAGE_HEADER_BYTES + HEADER_BYTES + block_bytes) // page_bytes)


def value_bytes(block_bytes: int, page_bytes: int) -> int:
    """Size of a data value: it fills its pages."""
    return value_pages(block_bytes, page_bytes) * page_bytes - PAGE_HEADER_BYTES


def header(about: About, key: Key, tokens: int) -> bytes:
    """What stands before a data value's payload, without the checksum before it: HEADER_BYTES - 8 bytes."""
    return _HEADER.pack(MAGIC, about.format, tokens, about.block_bytes, key, about.fingerprint)


def pack_index(place: Place, sequence: int, page: int) -> bytes:
    """The index value of a block, written by transaction `sequence`, whose data value begins on `page`."""
    body = _INDEX.pack(place.parent or NO_PARENT, place.depth, place.tokens, sequence, page)
    return body + _CHECKSUM.pack(checksum(place.key + body))


def unpack_index(key: Key, value: bytes, names: dict[Key, Key]) -> tuple[Place, int] | None:
    """The place, and the transaction that wrote it; None where the checksum says that it is damaged.

    `names` has each key that was met, and gets the parent's: of a million chained keys none is kept twice.
    """
    if len(value) != INDEX_BYTES or not index_intact(key + value):
        return None
    parent, depth, tokens, sequence, _ = _INDEX.unpack_from(value)
    parent = b"" if parent == NO_PARENT else names.setdefault(parent, parent)
    return Place(key, -1, parent, depth, tokens), sequence


def first_page(index_value: bytes | memoryview) -> int:
    """Where the data value begins, by what the index says. Look at `index_intact` first."""
    return int.from_bytes(index_value[PAGE_AT : PAGE_AT + 8], "little")


def index_intact(key_and_value: bytes) -> bool:
    """Whether the checksum at the end is that of all before it."""
    return int.from_bytes(key_and_value[-8:], "little") == xxh3_64_intdigest(key_and_value[:-8])
