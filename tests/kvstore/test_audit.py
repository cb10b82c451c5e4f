"""The audit passes what LMDB has written, and nothing that would lead LMDB astray."""

import os
from collections.abc import Callable
from mmap import PAGESIZE, mmap
from pathlib import Path
from random import Random

import lmdb
import numpy as np
import pytest
from lmdb import verify as independent

from kvstore.audit import (
    BRANCH_PAGE,
    FREE_PAGE,
    FREE_TREE_PAGE,
    LEAF_PAGE,
    META_PAGE,
    UNKNOWN,
    VALUE_PAGE,
    Audit,
    offsets,
    report,
    uniform_nodes,
)
from kvstore.copies import Place
from kvstore.disk import DiskTier
from kvstore.lmdb_pages import LEAF_NODE, Damage
from tests.kvstore.disk_rig import QUOTA_BYTES, filled, key_of, open_tier, write

RECORDS = 120


@pytest.fixture
def store(tmp_path: Path) -> Path:
    tier = open_tier(tmp_path, block_bytes=1000)
    write(tier, range(3 * RECORDS))
    write(tier, [], range(2 * RECORDS))
    write(tier, [3 * RECORDS])
    tier.drop([key_of(3 * RECORDS)])
    tier.close()
    return tmp_path / "data.mdb"


def audited(path: Path) -> Audit:
    with path.open("r+b") as file, mmap(file.fileno(), 0) as mapped:
        audit = Audit(mapped, file.fileno())
        audit.run()
        audit._file = None  # type: ignore[assignment]  # closed
        return audit


def pages(path: Path, kind: int) -> list[int]:
    return [number for number, found in enumerate(audited(path).kinds) if found == kind]


def second_opinion(path: Path) -> list[str]:
    """What py-lmdb's own verifier objects to: another's reading of the same format."""
    return list(independent.verify(str(path)))  # type: ignore[no-untyped-call]  # py-lmdb types its tools not


def flip(path: Path, byte: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        (old,) = file.read(1)
        file.seek(byte)
        file.write(bytes([old ^ mask]))


def damage(path: Path) -> str:
    return str(report(str(path)).get("damage", ""))


def test_a_sound_store_passes_and_every_page_is_known(store: Path) -> None:
    assert report(str(store))["records"] == RECORDS
    kinds = audited(store).kinds
    assert set(kinds) == {META_PAGE, BRANCH_PAGE, LEAF_PAGE, FREE_TREE_PAGE, VALUE_PAGE, FREE_PAGE}
    assert kinds.count(VALUE_PAGE) == RECORDS
    assert UNKNOWN not in kinds
    assert second_opinion(store) == []


def test_a_list_of_free_pages_on_pages_of_its_own_passes(tmp_path: Path) -> None:
    """Eight values of 1 MiB leave 2,056 pages at once: more than a node of the list can hold."""
    tier = open_tier(tmp_path, block_bytes=2**20, quota_bytes=2**27)
    write(tier, range(32))
    tier.drop([key_of(number) for number in range(30)])
    tier.close()
    path = tmp_path / "data.mdb"
    assert audited(path).meta.free.overflow_pages
    assert report(str(path))["records"] == 2
    flip(path, audited(path).kinds.index(FREE_TREE_PAGE) * PAGESIZE + 16, 1)
    assert damage(path)


@pytest.mark.parametrize("seed", range(8))
def test_every_flip_in_what_a_leaf_of_records_uses_is_noticed(store: Path, seed: int) -> None:
    random = Random(seed)
    content = store.read_bytes()
    leaves = [
        n for n in pages(store, LEAF_PAGE) if len(offsets(content[n * PAGESIZE :])) > 4
    ]  # not the main database's
    assert len(leaves) > 4
    for _ in range(40):
        number = random.choice(leaves)
        page = content[number * PAGESIZE : (number + 1) * PAGESIZE]
        lower, upper = int.from_bytes(page[12:14], "little"), int.from_bytes(page[14:16], "little")
        at = random.choice([*range(8), *range(10, lower), *range(upper, PAGESIZE)])
        mask = 1 << random.randrange(8)
        flip(store, number * PAGESIZE + at, mask)
        with pytest.raises(Exception):  # noqa: B017, PT011 (Damage, or whatever parsing nonsense ends in: the child dies)
            audited(store)
        flip(store, number * PAGESIZE + at, mask)
    assert not damage(store)


def test_a_flip_in_the_header_before_any_value_is_noticed(store: Path) -> None:
    """LMDB would free as many pages as it says, and later write over what stands there."""
    for number in pages(store, VALUE_PAGE):
        flip(store, number * PAGESIZE + 12, 2)
        assert f"page {number} " in damage(store)
        flip(store, number * PAGESIZE + 12, 2)


def test_a_free_page_that_is_in_use_is_noticed(store: Path) -> None:
    lists = pages(store, FREE_TREE_PAGE)
    used, free = pages(store, VALUE_PAGE)[0], pages(store, FREE_PAGE)
    content = store.read_bytes()
    start = min(number * PAGESIZE for number in lists)
    at = max(content.rfind(number.to_bytes(8, "little"), start, start + PAGESIZE) for number in free)
    assert at > start
    with store.open("r+b") as file:
        file.seek(at)
        file.write(used.to_bytes(8, "little"))
    assert damage(store)


def test_any_cut_is_noticed(store: Path) -> None:
    content = store.read_bytes()
    end = audited(store).meta.file_bytes
    for length in (1, 100, 4095, 4096, 8191, 8192, 12288, end // 2, end - 4096, end - 1):
        store.write_bytes(content[:length])
        assert damage(store), length
    store.write_bytes(content[:end])
    assert not damage(store)


def test_a_damaged_newest_meta_page_is_noticed_and_an_outdated_one_is_not_needed(store: Path) -> None:
    newest = audited(store).meta.transaction & 1
    flip(store, newest * PAGESIZE + 136, 64)  # its last page
    assert "cut off" in damage(store) or "neither" in damage(store)
    flip(store, newest * PAGESIZE + 136, 64)
    flip(store, (1 - newest) * PAGESIZE + 128, 64)  # the root of the older one
    assert not damage(store)


def test_the_transaction_before_the_last_is_as_good(store: Path) -> None:
    """As after a power cut that lost the newest meta page: LMDB then goes on from the older one."""
    newest = audited(store).meta.transaction & 1
    with store.open("r+b") as file:
        file.seek(newest * PAGESIZE + 144)
        file.write(bytes(8))
    answer = report(str(store))
    assert answer["records"] == RECORDS + 1


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(10 * PAGESIZE))


def garbage(path: Path) -> None:
    path.write_bytes(Random(1).randbytes(10 * PAGESIZE))


def another_lmdb(path: Path, version: int = 0) -> None:
    path.unlink()
    with (
        lmdb.open(str(path), subdir=False, max_dbs=2, lib_version=version) as env,
        env.begin(write=True) as txn,
    ):
        txn.put(b"key", b"value", db=env.open_db(b"data", txn))


def a_newer_lmdb(path: Path) -> None:
    another_lmdb(path, 1)


@pytest.mark.parametrize("replace", [zeros, garbage, another_lmdb, a_newer_lmdb])
def test_a_file_that_is_not_ours_is_noticed(store: Path, replace: Callable[[Path], None]) -> None:
    replace(store)
    assert damage(store)


def test_a_store_that_was_only_begun_is_empty(store: Path) -> None:
    empty(store)
    assert report(str(store)) == {"about": "", "records": 0}
    store.unlink()
    lmdb.open(str(store.parent), lib_version=0).close()
    assert report(str(store)) == {"about": "", "records": 0}


def test_different_keys_in_index_and_values_are_noticed(tmp_path: Path) -> None:
    filled(tmp_path)
    with lmdb.open(str(tmp_path), map_size=QUOTA_BYTES, max_dbs=2) as env, env.begin(write=True) as txn:
        index = env.open_db(b"index", txn)
        with txn.cursor(index) as cursor:
            assert cursor.first()
            txn.delete(cursor.key(), db=index)
    assert damage(tmp_path / "data.mdb") == "index and values have different keys, or pages"


def test_nodes_that_overlap_are_noticed() -> None:
    node = LEAF_NODE.pack(8, 0, 32)
    nodes = [node + bytes([number]) * 32 + bytes(8) for number in (1, 2)]
    sound = bytearray(PAGESIZE)
    sound[12:20] = b"".join(
        n.to_bytes(2, "little") for n in (20, PAGESIZE - 96, PAGESIZE - 96, PAGESIZE - 48)
    )
    sound[-96:] = b"".join(nodes)
    assert uniform_nodes((9, bytes(sound), b"", None), node, 8) == nodes
    sound[18:20] = sound[16:18]
    with pytest.raises(Damage, match="fill"):
        uniform_nodes((9, bytes(sound), b"", None), node, 8)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_lmdb_writes_passes(tmp_path: Path, seed: int) -> None:
    """Trees that grow and shrink, under an independent verifier's eyes too."""
    random = Random(seed)
    tier = DiskTier.open(
        tmp_path, quota_bytes=2**23, block_bytes=random.choice([300, 3000, 4000, 30_000]), fingerprint=""
    )
    data = np.zeros(tier.block_bytes, np.uint8)
    live: list[bytes] = []
    for _ in range(random.randrange(1, 250)):
        room = tier.capacity_blocks - len(live)
        new = [random.randbytes(32) for _ in range(random.randint(0, min(room, tier.transaction_blocks)))]
        drops = random.sample(live, random.randint(0, min(len(live), 2 * tier.transaction_blocks)))
        assert not any(tier.write([Place(key) for key in new], [data] * len(new), drops))
        live = [key for key in live if key not in set(drops)] + new
    tier.close()
    path = tmp_path / "data.mdb"
    assert report(str(path)).get("records") == len(live)
    assert second_opinion(path) == []
    assert os.path.getsize(path) <= 2**23
