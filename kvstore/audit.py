"""Whether a store of the disk tier may be given to LMDB: `python -m kvstore.audit FILE`, a child of disk_files.py.

LMDB trusts its file. A flipped bit in a page of a tree, in the list of free pages, or in the header before a value
makes it crash, or write over live pages. So this reads the file by itself, without LMDB, and demands what LMDB's writer
guarantees: each page is reached once, or free, and numbered; nodes fill their page without a gap; keys are in order,
and where the branches above say; counts are right; values have the size of ours. And what ours does: each index value's
checksum, and the same keys and pages in both databases.

Payloads are not read: their checksums are, when they are used. Some seconds for 1 M records. It prints one object:
`{"damage": why}`, or `{"about": hex, "records": how many}`, with an empty `about` where a store has only been begun.
"""

import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from mmap import ACCESS_READ, MADV_RANDOM, PAGESIZE, mmap
from operator import gt, lt
from struct import unpack_from
from typing import Final

from xxhash import xxh3_64

from kvstore.format import (
    ABOUT_KEY,
    DATA,
    FORMAT,
    INDEX,
    INDEX_BYTES,
    KEY_BYTES,
    PAGE_AT,
    About,
    index_intact,
    value_bytes,
)
from kvstore.lmdb_pages import (
    BIG,
    BRANCH,
    LEAF,
    LEAF_NODE,
    NO_PAGE,
    NODE_BYTES,
    OVERFLOW,
    PAGE_HEADER_BYTES,
    SUB,
    TREE_PAGE,
    Damage,
    Database,
    Meta,
    overflow_header,
    unpack_meta,
)

UNKNOWN, META_PAGE, BRANCH_PAGE, LEAF_PAGE, FREE_TREE_PAGE, VALUE_PAGE, FREE_PAGE = range(7)
"""What a page was found to be."""

MAX_DEPTH: Final = 32  # LMDB's cursors have room for so many levels
AHEAD: Final = 512  # headers of values that the disk is asked for at once

Key = bytes
Order = Callable[[Key], bytes]
Leaf = tuple[int, bytes, bytes, bytes | None]
"""Number and bytes of a leaf page; its keys are at least the third, and less than the fourth."""


def demand(condition: object, message: str) -> None:
    if not condition:
        raise Damage(message)


class Audit:
    """`run` reads the file once. `kinds[page]` is then what each page is. Raises Damage."""

    def __init__(self, file: mmap, descriptor: int) -> None:
        self._file = file
        self._descriptor = descriptor
        self.meta = newest_meta(file)
        demand(
            self.meta.page_bytes == PAGESIZE, f"its pages have {self.meta.page_bytes} bytes, ours {PAGESIZE}"
        )
        demand(len(file) >= self.meta.file_bytes, f"the file is cut off before byte {self.meta.file_bytes:,}")
        demand(self.meta.last_page > 0, "its last page is a meta page")
        self.kinds = bytearray(self.meta.last_page + 1)
        self.kinds[:2] = bytes([META_PAGE]) * 2

    def run(self) -> tuple[About | None, int]:
        """What the store holds (None: nothing, it has only been begun), and how many records."""
        about, databases = self._main()
        if about is None or about.format != FORMAT:
            return about, 0
        demand(databases.keys() == {DATA, INDEX}, "a database is missing")
        keys, values = self._records(databases[DATA], about)
        demand(self._index(databases[INDEX]) == keys, "index and values have different keys, or pages")
        self._free_pages()
        demand(not (lost := self.kinds.count(UNKNOWN)), f"{lost} pages are neither in use nor free")
        self._value_headers(values, value_pages_of(about))
        return about, databases[DATA].entries

    # --- pages and trees ------------------------------------------------------------------------------------------

    def _take(self, first: int, count: int, kind: int) -> None:
        """Marks pages; none may have been reached before."""
        demand(first > 1 and first + count <= len(self.kinds), f"page {first} is out of range")
        demand(self.kinds.count(UNKNOWN, first, first + count) == count, f"page {first} is used twice")
        self.kinds[first : first + count] = bytes([kind]) * count

    def _page(self, number: int, flags: int, kind: int) -> bytes:
        """A page of a tree, whose header must be this."""
        self._take(number, 1, kind)
        page = self._file[number * PAGESIZE : (number + 1) * PAGESIZE]
        own_number, _, own_flags, lower, upper = TREE_PAGE.unpack_from(page)
        demand((own_number, own_flags) == (number, flags), f"page {number} has another one's header")
        demand(
            PAGE_HEADER_BYTES < lower <= upper <= PAGESIZE and not lower & 1,
            f"page {number} has wrong bounds",
        )
        return page

    def _leaves(self, tree: Database, *, free: bool = False) -> Iterator[Leaf]:
        """A tree's leaf pages in order, all branches on the way checked, and its counts of pages."""
        if tree.root == NO_PAGE:
            demand(
                tree == Database(tree.page_bytes, tree.flags, 0, 0, 0, 0, 0, NO_PAGE),
                "an empty tree has pages",
            )
            return
        demand(0 < tree.depth <= MAX_DEPTH, "a tree is too deep")
        counts = [0, 0]
        stack: list[tuple[int, int, bytes, bytes | None]] = [(tree.root, 1, b"", None)]
        while stack:
            number, level, low, high = stack.pop()
            is_leaf = level == tree.depth
            counts[is_leaf] += 1
            kind = FREE_TREE_PAGE if free else LEAF_PAGE if is_leaf else BRANCH_PAGE
            page = self._page(number, LEAF if is_leaf else BRANCH, kind)
            if is_leaf:
                yield number, page, low, high
            else:
                below = children(number, page, low, high, _as_number if free else bytes)
                demand(free or len(below) > 1, f"branch page {number} has one child")
                stack += [(child, level + 1, start, end) for child, start, end in reversed(below)]
        demand(counts == [tree.branch_pages, tree.leaf_pages], "a tree has not as many pages as it says")

    # --- databases ------------------------------------------------------------------------------------------------

    def _main(self) -> tuple[About | None, dict[bytes, Database]]:
        """The main database: what the store is, and the databases in it."""
        values = {
            key: (flags, value)
            for leaf in self._leaves(self.meta.main)
            for key, flags, value in entries(leaf, bytes)
        }
        stated = (self.meta.main.entries, self.meta.main.overflow_pages, self.meta.main.page_bytes)
        demand(stated == (len(values), 0, 0), "the main database has not as many entries as it says")
        if not values:
            return None, {}
        _, stored = values.pop(ABOUT_KEY, (0, b""))
        about = About.unpack(stored)
        demand(about, "it is not a store of ours")
        demand(
            all(flags == SUB and len(value) == 48 for flags, value in values.values()),
            "a database is malformed",
        )
        return about, {key: Database.unpack(value) for key, (_, value) in values.items()}

    def _records(self, tree: Database, about: About) -> tuple[int, "array[int]"]:
        """The data values: a hash over all keys and first pages in order, and the first pages."""
        pages, head = (
            value_pages_of(about),
            LEAF_NODE.pack(value_bytes(about.block_bytes, PAGESIZE), BIG, KEY_BYTES),
        )
        demand(not tree.flags and not tree.page_bytes, "the values' database has flags")
        hashed, firsts = xxh3_64(), array("Q")
        for leaf in self._leaves(tree):
            nodes = uniform_nodes(leaf, head, 8)
            hashed.update(b"".join(node[NODE_BYTES:] for node in nodes))
            firsts.frombytes(b"".join(node[-8:] for node in nodes))
        for first in firsts:
            self._take(first, pages, VALUE_PAGE)
        counts = (len(firsts), len(firsts) * pages)
        demand(
            counts == (tree.entries, tree.overflow_pages),
            "there are not as many values as their database says",
        )
        return hashed.intdigest(), firsts

    def _index(self, tree: Database) -> int:
        """The index: a hash over all its keys, and the first pages that it names, in order."""
        head = LEAF_NODE.pack(INDEX_BYTES, 0, KEY_BYTES)
        demand(not tree.flags and not tree.page_bytes, "the index has flags")
        hashed, count, value = xxh3_64(), 0, NODE_BYTES + KEY_BYTES
        for leaf in self._leaves(tree):
            nodes = uniform_nodes(leaf, head, INDEX_BYTES)
            demand(
                all(index_intact(node[NODE_BYTES:]) for node in nodes),
                f"index page {leaf[0]}: a wrong checksum",
            )
            hashed.update(
                b"".join(
                    node[NODE_BYTES:value] + node[value + PAGE_AT : value + PAGE_AT + 8] for node in nodes
                )
            )
            count += len(nodes)
        demand(
            (count, 0) == (tree.entries, tree.overflow_pages), "the index has not as many entries as it says"
        )
        return hashed.intdigest()

    def _value_headers(self, firsts: Sequence[int], pages: int) -> None:
        """The page header before each value: LMDB frees as many pages as it says."""
        ordered = sorted(firsts)
        for start in range(0, len(ordered), AHEAD):
            batch = ordered[start : start + AHEAD]
            for first in batch if hasattr(os, "posix_fadvise") else ():  # a hint, where there is one
                os.posix_fadvise(
                    self._descriptor, first * PAGESIZE, PAGE_HEADER_BYTES, os.POSIX_FADV_WILLNEED
                )
            for first in batch:
                found = overflow_header(self._file[first * PAGESIZE : first * PAGESIZE + PAGE_HEADER_BYTES])
                demand(
                    found == (first, OVERFLOW, pages), f"the value on page {first} has another one's header"
                )

    # --- free pages -----------------------------------------------------------------------------------------------

    def _free_pages(self) -> None:
        """The list of free pages: by transaction, how many it freed, and which, last one first."""
        tree = self.meta.free
        count = overflow_pages = 0
        for leaf in self._leaves(tree, free=True):
            for key, flags, value in entries(leaf, _as_number):
                demand(
                    0 < int.from_bytes(key, "little") <= self.meta.transaction, "pages freed in the future"
                )
                if flags == BIG:
                    value, pages = self._long_value(leaf[0], value)
                    overflow_pages += pages
                self._free(value)
                count += 1
        demand(
            (count, overflow_pages) == (tree.entries, tree.overflow_pages),
            "the list of free pages is cut off",
        )

    def _long_value(self, leaf: int, node: bytes) -> tuple[bytes, int]:
        """A value on pages of its own, and how many it has: at least as many as it needs."""
        size, first = unpack_from("<IQ", node)
        demand(1 < first < len(self.kinds), f"page {first} is out of range")
        start = first * PAGESIZE
        number, flags, pages = overflow_header(self._file[start : start + PAGE_HEADER_BYTES])
        demand((number, flags) == (first, OVERFLOW), f"page {first} has another one's header")
        demand(PAGE_HEADER_BYTES + size <= pages * PAGESIZE, f"free list on page {leaf}: a value is too long")
        self._take(first, pages, FREE_TREE_PAGE)
        return self._file[start + PAGE_HEADER_BYTES : start + PAGE_HEADER_BYTES + size], pages

    def _free(self, value: bytes) -> None:
        demand(len(value) >= 8 and len(value) % 8 == 0, "a list of free pages is cut off")
        numbers = memoryview(value).cast("Q").tolist()
        count = numbers.pop(0)
        demand(count <= len(numbers), "a list of free pages is too short")
        del numbers[count:]
        demand(all(map(gt, numbers, islice(numbers, 1, None))), "a list of free pages is not in order")
        demand(
            not numbers or (numbers[0] < len(self.kinds) and numbers[-1] > 1), "a free page is out of range"
        )
        for number in numbers:
            demand(not self.kinds[number], f"free page {number} is in use")
            self.kinds[number] = FREE_PAGE


def value_pages_of(about: About) -> int:
    return (value_bytes(about.block_bytes, PAGESIZE) + PAGE_HEADER_BYTES) // PAGESIZE


def newest_meta(file: mmap) -> Meta:
    """That which LMDB will use. The other one must be sound enough for LMDB to open the file."""
    first = unpack_meta(file[:PAGESIZE], 0)
    demand(
        first.page_bytes == PAGESIZE, f"its pages have {first.page_bytes} bytes, here they have {PAGESIZE}"
    )
    second = unpack_meta(file[PAGESIZE : 2 * PAGESIZE], 1)
    demand(second.page_bytes == PAGESIZE, "its meta pages differ")
    return second if first.transaction < second.transaction else first


# --- the nodes of a page ----------------------------------------------------------------------------------------------


def offsets(page: bytes) -> tuple[int, ...]:
    """Where the nodes of a page of a tree are, in the order of their keys."""
    (lower,) = unpack_from("<H", page, 12)
    return unpack_from(f"<{(lower - PAGE_HEADER_BYTES) // 2}H", page, PAGE_HEADER_BYTES)


def uniform_nodes(leaf: Leaf, head: bytes, data_bytes: int) -> list[bytes]:
    """The nodes of a leaf page whose nodes all have the header `head`, a block key, and so many bytes. Checked."""
    number, page, low, high = leaf
    size = NODE_BYTES + KEY_BYTES + data_bytes
    (upper,) = unpack_from("<H", page, 14)
    where = offsets(page)
    demand(sorted(where) == list(range(upper, PAGESIZE, size)), f"nodes of page {number} do not fill it")
    nodes = [page[offset : offset + size] for offset in where]
    demand({node[:NODE_BYTES] for node in nodes} == {head}, f"page {number} has a node with another header")
    check_order(number, [node[NODE_BYTES : NODE_BYTES + KEY_BYTES] for node in nodes], low, high)
    return nodes


def entries(leaf: Leaf, order: Order) -> list[tuple[Key, int, bytes]]:
    """Key, flags and value of a leaf page's nodes. A value on pages of its own: its size (4 bytes) and first page."""
    number, page, low, high = leaf
    found, spans = [], []
    for offset in offsets(page):
        demand(offset + NODE_BYTES <= PAGESIZE, f"page {number} has a node beyond its end")
        size, flags, key_bytes = LEAF_NODE.unpack_from(page, offset)
        key_end = offset + NODE_BYTES + key_bytes
        end = key_end + (8 if flags == BIG else size)
        spans.append((offset, end + (end & 1)))
        value = page[key_end:end]
        found.append(
            (page[offset + NODE_BYTES : key_end], flags, _u32(size) + value if flags == BIG else value)
        )
    check_filled(number, page, spans)
    check_order(number, [order(key) for key, _, _ in found], low, high)
    return found


def children(
    number: int, page: bytes, low: bytes, high: bytes | None, order: Order
) -> list[tuple[int, bytes, bytes | None]]:
    """The pages below a branch page, each with the bounds of its keys. The first node's key counts for nothing."""
    below, keys, spans = [], [], []
    for offset in offsets(page):
        demand(offset + NODE_BYTES <= PAGESIZE, f"page {number} has a node beyond its end")
        short, middle, long, key_bytes = unpack_from("<HHHH", page, offset)
        end = offset + NODE_BYTES + key_bytes
        spans.append((offset, end + (end & 1)))
        keys.append(order(page[offset + NODE_BYTES : end]))
        below.append(short | middle << 16 | long << 32)
    check_filled(number, page, spans)
    check_order(number, keys[1:], low, high)
    bounds = pairwise([low, *keys[1:], high])
    return [(child, start or b"", end) for child, (start, end) in zip(below, bounds, strict=True)]


def check_filled(number: int, page: bytes, spans: list[tuple[int, int]]) -> None:
    """Nodes fill a page from its upper bound to its end: none overlaps another, none is lost."""
    (position,) = unpack_from("<H", page, 14)
    for start, end in sorted(spans):
        demand(start == position, f"nodes of page {number} overlap")
        position = end
    demand(position == PAGESIZE, f"nodes of page {number} do not fill it")


def check_order(number: int, keys: Sequence[bytes], low: bytes, high: bytes | None) -> None:
    demand(all(map(lt, keys, islice(keys, 1, None))), f"keys of page {number} are not in order")
    inside = not keys or (low <= keys[0] and (high is None or keys[-1] < high))
    demand(inside, f"keys of page {number} belong elsewhere")


def _as_number(key: bytes) -> bytes:
    """Orders the keys of the list of free pages, which are integers in the machine's byte order."""
    return key[::-1]


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def report(path: str) -> dict[str, object]:
    """What is printed."""
    with open(path, "rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            return {"about": "", "records": 0}
        with mmap(opened.fileno(), 0, access=ACCESS_READ) as file:
            file.madvise(MADV_RANDOM)
            try:
                about, records = Audit(file, opened.fileno()).run()
            except Damage as damage:
                return {"damage": str(damage)}
    return {"about": about.pack().hex() if about else "", "records": records}


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1])))
