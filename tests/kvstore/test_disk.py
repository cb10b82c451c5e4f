"""The disk tier keeps what it is given, over restarts, crashes, full disks and damage; or says that it has not."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from mmap import PAGESIZE
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from threading import Thread, Timer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import disk_faults
from kvstore import disk_files
from kvstore.audit import LEAF_PAGE, VALUE_PAGE
from kvstore.copies import Loss, Place
from kvstore.disk import DiskTier
from kvstore.format import KEY_BYTES, About, value_bytes, value_pages
from kvstore.lmdb_pages import BIG, LEAF_NODE
from kvstore.tier import TierUnusable
from tests.kvstore.disk_rig import (
    BLOCK_BYTES,
    QUOTA_BYTES,
    block_of,
    crowded,
    filled,
    kept,
    key_of,
    losses,
    open_tier,
    place_of,
    python,
    write,
)
from tests.kvstore.test_audit import flip, pages


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = open_tier(tmp_path)
    yield tier
    tier.close()


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_read_again_after_a_restart(tier: DiskTier, tmp_path: Path) -> None:
    assert write(tier, range(20)) == [None] * 20
    assert losses(tier, range(20)) == [None] * 20
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.notice == ""
    assert losses(tier, range(20)) == [None] * 20
    tier.close()


def test_closing_twice_takes_nothing_from_who_has_opened_it_since(tier: DiskTier, tmp_path: Path) -> None:
    write(tier, range(5))
    tier.close()
    with closing(open_tier(tmp_path)) as other:
        tier.close()
        assert losses(other, range(5)) == [None] * 5
        assert write(other, [5]) == [None]


def test_drops_leave_with_the_write_that_names_them(tier: DiskTier) -> None:
    write(tier, range(5))
    assert write(tier, [5, 6], drops=[0, 1]) == [None] * 2
    assert losses(tier, range(7)) == [Loss.MISSING] * 2 + [None] * 5
    tier.drop([key_of(2), key_of(99)])
    assert losses(tier, [2, 3]) == [Loss.MISSING, None]
    assert tier.stats().blocks == 4


def test_a_block_written_again_has_its_new_bytes(tier: DiskTier) -> None:
    write(tier, range(3))
    assert tier.write([place_of(1)], [block_of(7)]) == [None]
    buffer = np.zeros(BLOCK_BYTES, np.uint8)
    assert tier.read([place_of(1)], [buffer]) == [None]
    assert np.array_equal(buffer, block_of(7))
    assert tier.stats().blocks == 3


def test_records_come_parents_first_and_else_as_they_were_written(tier: DiskTier, tmp_path: Path) -> None:
    chain = [place_of(number, number - 1 if number else None) for number in range(6)]
    for place in (chain[0], chain[2], chain[1], chain[4], chain[3], chain[5]):
        assert tier.write([place], [block_of(place.depth)]) == [None]
    assert tier.records() == (chain[0], chain[1], chain[2], chain[3], chain[4], chain[5])
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.records() == tuple(chain)
    tier.close()


def test_orphans_are_dropped_and_counted(tier: DiskTier, tmp_path: Path) -> None:
    chain = [place_of(number, number - 1 if number else None) for number in range(6)]
    for number, place in enumerate(chain):
        assert tier.write([place], [block_of(number)]) == [None]
    tier.drop([key_of(2)])
    assert tier.records() == tuple(chain[:2])
    assert tier.orphans_dropped == 3
    assert losses(tier, range(6)) == [None] * 2 + [Loss.MISSING] * 4
    assert tier.stats().blocks == 2


def test_readers_and_the_writer_do_not_disturb_each_other(tier: DiskTier) -> None:
    write(tier, range(40))
    answers: list[Loss | None] = []
    threads = [Thread(target=lambda: answers.extend(losses(tier, range(40)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(40, 120):
        assert write(tier, [number], [number - 40] if number >= 80 else []) == [None]
    for thread in threads:
        thread.join()
    assert answers == [None] * 160


def test_values_of_one_write_are_next_to_each_other_in_the_file(tier: DiskTier, tmp_path: Path) -> None:
    write(tier, range(tier.transaction_blocks))
    firsts = sorted(pages(tmp_path / "data.mdb", VALUE_PAGE))
    assert len(firsts) == tier.transaction_blocks * value_pages(BLOCK_BYTES, PAGESIZE)
    assert firsts == list(range(firsts[0], firsts[0] + len(firsts)))


def test_a_page_that_is_another_values_by_now_costs_one_read_and_no_wrong_byte(tier: DiskTier) -> None:
    write(tier, range(3))
    tier._pages[key_of(1)] = tier._pages[key_of(2)]
    assert losses(tier, range(3)) == [None, Loss.CORRUPT, None]
    assert losses(tier, range(3)) == [None] * 3


def test_verify_goes_by_the_index_and_not_by_what_is_remembered(tier: DiskTier) -> None:
    write(tier, range(3))
    tier._pages[key_of(1)] = tier._pages[key_of(2)]
    assert tier.verify(lambda done, total: None).lost == ()


def test_verify_reads_every_record_and_names_the_damaged(tmp_path: Path) -> None:
    numbers = filled(tmp_path)
    flip(tmp_path / "data.mdb", pages(tmp_path / "data.mdb", VALUE_PAGE)[0] * PAGESIZE + 1000, 4)
    tier = open_tier(tmp_path)
    told: list[tuple[int, int]] = []
    found = tier.verify(lambda done, total: told.append((done, total)))
    bad = [number for number, loss in zip(numbers, losses(tier, numbers), strict=True) if loss]
    assert found.records == 40
    assert found.lost == ((key_of(bad[0]), Loss.CORRUPT),)
    assert told == [(done, 40) for done in range(1, 41)]
    assert tier.broken is None
    tier.close()


def test_clear_forgets_everything_and_the_next_start_gives_its_pages_back(tmp_path: Path) -> None:
    numbers = filled(tmp_path)
    tier = open_tier(tmp_path)
    assert tier.clear() is None
    assert tier.stats().blocks == 0
    assert set(losses(tier, numbers)) == {Loss.MISSING}
    assert write(tier, [1]) == [None]
    assert tier.clear() is None
    tier.close()
    tier = open_tier(tmp_path)
    assert (tier.notice, tier.records()) == ("", ())
    assert bytes_of(tmp_path) < 2**16
    tier.close()


# --- room -------------------------------------------------------------------------------------------------------------


def test_beyond_the_capacity_a_write_is_refused_whole_and_goes_when_others_leave(tier: DiskTier) -> None:
    most = tier.capacity_blocks
    assert not any(write(tier, range(most)))
    assert tier.write([place_of(most)], [block_of(most)]) == [Loss.FULL]
    assert losses(tier, [0, most]) == [None, Loss.MISSING]
    assert write(tier, [most], drops=[0]) == [None]
    assert losses(tier, [0, most]) == [Loss.MISSING, None]
    assert tier.stats().blocks == most
    assert tier.broken is None


def test_the_quota_holds_and_is_used(tier: DiskTier, tmp_path: Path) -> None:
    assert not any(write(tier, range(tier.capacity_blocks)))
    assert bytes_of(tmp_path) <= QUOTA_BYTES
    assert tier.capacity_blocks * BLOCK_BYTES > 0.6 * QUOTA_BYTES, "even a quota as small as this"


def test_a_quota_that_was_lowered_is_kept(tmp_path: Path) -> None:
    filled(tmp_path)
    tier = open_tier(tmp_path, quota_bytes=2**20)
    assert "larger than the quota" in tier.notice
    assert tier.records() == ()
    assert bytes_of(tmp_path) <= 2**20
    tier.close()


@pytest.mark.parametrize("pages", [0, 64, 112, 144])
def test_a_store_with_more_records_than_a_lowered_quota_has_room_for_goes_on(
    tmp_path: Path, pages: int
) -> None:
    """Its surplus can be dropped, or it is begun anew; then it takes blocks. The quota holds either way."""
    quota = crowded(tmp_path, 200) + disk_files.LOCKS_BYTES + pages * PAGESIZE
    tier = open_tier(tmp_path, quota_bytes=quota)
    surplus = list(range(200 - tier.capacity_blocks))
    assert ("larger than the quota" in tier.notice) == (tier.stats().blocks == 0)
    assert tier.notice or surplus
    tier.drop([key_of(number) for number in surplus])
    assert tier.notice or tier.stats().blocks == tier.capacity_blocks
    for number in range(300, 350):
        assert write(tier, [number], [number - 300 + len(surplus)]) == [None]
    assert bytes_of(tmp_path) <= quota
    tier.close()


def test_a_full_store_without_a_quota_to_grow_in_can_be_cleared(tmp_path: Path) -> None:
    crowded(tmp_path, 200)
    tier = DiskTier.open_existing(tmp_path)
    assert tier.clear() is None
    assert tier.stats().blocks == 0
    tier.close()


def test_a_quota_that_was_raised_is_used(tmp_path: Path) -> None:
    numbers = filled(tmp_path)
    tier = open_tier(tmp_path, quota_bytes=4 * QUOTA_BYTES)
    assert not any(losses(tier, numbers))
    assert not any(write(tier, range(1000, 1000 + tier.capacity_blocks - len(numbers))))
    assert QUOTA_BYTES < bytes_of(tmp_path) <= 4 * QUOTA_BYTES
    tier.close()


def test_a_quota_without_room_for_a_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TierUnusable, match="give it more than"):
        open_tier(tmp_path, quota_bytes=2**17)


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.kvstore.disk_rig import *
tier = open_tier(Path(sys.argv[1]))
assert not any(write(tier, range(40)))
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), limits[1]))
answers = [write(tier, [number])[0] for number in range(100, 200)]
assert Loss.FULL in answers and set(answers) <= {None, Loss.FULL}, answers
dropped = [number for number, answer in zip(range(100, 200), answers) if answer is None] + [0, 1]
assert losses(tier, range(40)) == [None] * 40
tier.drop([key_of(number) for number in dropped])
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
assert write(tier, range(200, 210)) == [None] * 10 and tier.broken is None
assert losses(tier, dropped) == [Loss.MISSING] * len(dropped)
assert kept(tier) == {key_of(number) for number in (*range(2, 40), *range(200, 210))}
tier.close()
print("well")
"""


@pytest.mark.parametrize("limit", [2 * PAGESIZE, 900_000, 1_500_000])
def test_a_full_file_system_damages_nothing_and_writes_go_on_when_it_has_room(
    tmp_path: Path, limit: int
) -> None:
    """A file size limit refuses writes half way, as a full disk does; at two pages it refuses drops too."""
    child = python(FULL_DISK, tmp_path, limit)
    assert child.communicate(timeout=60)[0] == "well\n"
    tier = open_tier(tmp_path)
    assert (tier.notice, len(kept(tier))) == ("", 48)
    tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_real_full_disk_answers_full_and_heals(small_disk: Path) -> None:
    tier = open_tier(small_disk / "store")
    answers = [write(tier, [number])[0] for number in range(100)]
    full = answers.index(Loss.FULL)
    assert set(answers) == {None, Loss.FULL}
    there = [number for number, answer in enumerate(answers) if answer is None]
    assert losses(tier, there) == [None] * len(there)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert write(tier, [full]) == [None]
    assert tier.broken is None
    tier.close()
    tier = open_tier(small_disk / "store")
    assert (tier.notice, losses(tier, [*there, full])) == ("", [None] * (len(there) + 1))
    tier.close()


# --- the directory ----------------------------------------------------------------------------------------------------


def test_only_its_owner_may_look_at_it(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "new" / "store")
    assert (tmp_path / "new" / "store").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "new" / "store").iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file
    tier.close()


def test_a_directory_with_files_of_others_keeps_its_mode_and_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "notes.txt").write_text("mine")
    open_tier(tmp_path).close()
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "data.mdb").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "notes.txt").read_text() == "mine"


HOLDER = """
import sys
from pathlib import Path
from tests.kvstore.disk_rig import *
tier = open_tier(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with python(HOLDER, tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(TierUnusable, match="in use by another server"):
            open_tier(tmp_path)
        holder.kill()
    open_tier(tmp_path).close()


FOREIGN_READER = """
import lmdb, sys
reading = lmdb.open(sys.argv[1], max_dbs=2, readonly=True).begin()
print("reads", flush=True)
sys.stdin.read()
"""


def test_another_process_that_reads_with_lmdb_disturbs_nothing_and_keeps_no_room_when_it_is_killed(
    tmp_path: Path,
) -> None:
    """Its snapshot keeps pages from reuse: until it has ended, however it ended."""
    tier = open_tier(tmp_path)
    fill = tier.capacity_blocks - 5
    assert not any(write(tier, range(fill)))
    with python(FOREIGN_READER, tmp_path) as foreign:
        assert foreign.stdout is not None
        assert foreign.stdout.readline() == "reads\n"
        assert write(tier, [fill], [0]) == [None]
        foreign.kill()
    for number in range(fill + 1, fill + 60):
        assert write(tier, [number], [number - fill]) == [None], number
    assert not any(losses(tier, range(60, fill + 60)))
    assert bytes_of(tmp_path) <= QUOTA_BYTES
    tier.close()
    tier = open_tier(tmp_path)
    assert (tier.notice, len(kept(tier))) == ("", fill)
    tier.close()


def test_a_store_whose_file_is_replaced_while_it_is_open_goes_on_and_the_next_opening_judges_what_is_there(
    tmp_path: Path,
) -> None:
    tier = open_tier(tmp_path)
    write(tier, range(20))
    (tmp_path / "other").write_bytes(b"no store" * 1000)
    (tmp_path / "other").replace(tmp_path / "data.mdb")
    assert losses(tier, range(20)) == [None] * 20
    assert write(tier, [20], [0]) == [None]
    assert losses(tier, [0, 20]) == [Loss.MISSING, None]
    tier.close()
    tier = open_tier(tmp_path)
    assert "is damaged, or not ours" in tier.notice
    assert kept(tier) == set()
    tier.close()


def test_a_second_opening_in_the_same_process_is_refused_and_the_first_goes_on(
    tier: DiskTier, tmp_path: Path
) -> None:
    with pytest.raises(TierUnusable, match="in use"):
        open_tier(tmp_path)
    assert write(tier, [1]) == [None]


def test_a_path_that_cannot_be_a_directory_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierUnusable, match="give one this user can write"):
        open_tier(tmp_path / "file")


# --- stores that cannot be used ---------------------------------------------------------------------------------------


def test_another_models_store_is_moved_aside_without_a_hit(tmp_path: Path) -> None:
    numbers = filled(tmp_path, 20)
    tier = open_tier(tmp_path, fingerprint="other")
    assert "another model" in tier.notice
    assert "moved to aside-" in tier.notice
    assert set(losses(tier, numbers)) == {Loss.MISSING}
    tier.close()


def test_another_block_size_is_moved_aside(tmp_path: Path) -> None:
    filled(tmp_path, 20)
    tier = open_tier(tmp_path, block_bytes=BLOCK_BYTES + 1)
    assert "20,000" in tier.notice
    assert tier.records() == ()
    tier.close()


def test_another_format_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        ours = About.of(BLOCK_BYTES, "model")
        patched.setattr(About, "of", lambda *_: replace(ours, format=0))
        filled(tmp_path, 20)
    tier = open_tier(tmp_path)
    assert "its format is 0, this version reads 2" in tier.notice
    assert tier.records() == ()
    tier.close()


def test_what_was_moved_aside_is_one_at_most_inside_the_quota_and_goes_with_clear(tmp_path: Path) -> None:
    for fingerprint in "abcd":
        tier = open_tier(tmp_path, fingerprint=fingerprint)
        assert not any(write(tier, range(30)))
        capacity = tier.capacity_blocks
        tier.close()
    tier = open_tier(tmp_path, fingerprint="d")
    assert len(list(tmp_path.glob("aside-*.mdb"))) == 1
    assert tier.capacity_blocks == capacity
    assert not any(write(tier, range(capacity)))
    assert bytes_of(tmp_path) <= QUOTA_BYTES
    assert tier.clear() is None
    tier.close()
    tier = open_tier(tmp_path, fingerprint="d")
    assert tier.capacity_blocks > capacity
    tier.close()


def test_a_store_of_more_than_half_of_the_quota_is_deleted(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    write(tier, range(tier.capacity_blocks))
    tier.close()
    tier = open_tier(tmp_path, fingerprint="other")
    assert "deleted" in tier.notice
    assert not list(tmp_path.glob("aside-*"))
    tier.close()


@pytest.mark.parametrize("seed", range(5))
def test_a_truncated_store_is_moved_aside(tmp_path: Path, seed: int) -> None:
    filled(tmp_path)
    data = tmp_path / "data.mdb"
    os.truncate(data, Random(seed).randrange(1, data.stat().st_size - 3 * PAGESIZE))
    tier = open_tier(tmp_path)
    assert "damaged" in tier.notice
    assert write(tier, [1]) == [None]
    tier.close()


def test_a_file_of_garbage_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(Random(1).randbytes(50_000))
    tier = open_tier(tmp_path)
    assert "not ours" in tier.notice
    assert write(tier, [1]) == [None]
    tier.close()


def test_garbage_in_place_of_lmdbs_lock_file_does_not_matter(tmp_path: Path) -> None:
    numbers = filled(tmp_path)
    (tmp_path / "lock.mdb").write_bytes(Random(1).randbytes(8192))
    tier = open_tier(tmp_path)
    assert (tier.notice, set(losses(tier, numbers))) == ("", {None})
    tier.close()


def test_a_store_that_the_audit_passes_and_lmdb_refuses_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    (tmp_path / "data.mdb").write_bytes(bytes(50_000))
    monkeypatch.setattr(disk_files, "audit", lambda *_: ("", 40))
    tier = open_tier(tmp_path)
    assert "LMDB refuses the store" in tier.notice
    assert write(tier, [1]) == [None]
    tier.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [("exec sleep 60", "took longer than"), ("kill -SEGV $$", "status -11"), ("exit 3", "status 3")],
)
def test_an_audit_that_hangs_or_dies_moves_the_store_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    filled(tmp_path / "store")
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(disk_files, "AUDIT_SECONDS", 0.2)
    tier = open_tier(tmp_path / "store")
    assert message in tier.notice
    assert tier.records() == ()
    tier.close()


def test_an_audit_that_somebody_stopped_says_nothing_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is told to end while it starts must not lose its store."""
    numbers = filled(tmp_path / "store")
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -TERM $$\n")
    program.chmod(0o700)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(program))
        with pytest.raises(TierUnusable, match="open it again"):
            open_tier(tmp_path / "store")
    tier = open_tier(tmp_path / "store")
    assert set(losses(tier, numbers)) == {None}
    tier.close()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_each_flip_in_a_value_is_corrupt_and_its_neighbours_are_not(tmp_path: Path) -> None:
    numbers = filled(tmp_path)
    data = tmp_path / "data.mdb"
    tier = open_tier(tmp_path)
    for page in pages(data, VALUE_PAGE)[::35]:
        for byte in (0, 12, 16, 24, 60, 128, 4095):
            flip(data, page * PAGESIZE + byte, 16)
            assert losses(tier, numbers).count(None) >= 39
            flip(data, page * PAGESIZE + byte, 16)
    first = pages(data, VALUE_PAGE)[0]
    flip(data, first * PAGESIZE + 2000, 1)
    assert sorted(map(str, losses(tier, numbers))) == ["None"] * 39 + ["corrupt"]
    assert tier.broken is None
    tier.close()


def test_flips_of_every_kind_at_rest_end_no_process_and_give_no_wrong_bytes() -> None:
    """A few trials of bench/disk_faults.py, each in fresh processes."""
    rows = disk_faults.trials(count=8, seed=7, workers=2)
    assert {row["place"] for row in rows} >= {*disk_faults.TREES, *disk_faults.RECORD_PARTS}
    assert {row["outcome"] for row in rows} <= {"audit", "checksum", "missing", "died", "harmless"}
    assert {"audit", "checksum"} <= {row["outcome"] for row in rows}


def test_two_values_that_changed_places_are_corrupt(tmp_path: Path) -> None:
    """Their checksums hold: it is the key that does not."""
    numbers = filled(tmp_path)
    data = tmp_path / "data.mdb"
    first, second = pages(data, VALUE_PAGE)[0], pages(data, VALUE_PAGE)[-5]
    content = bytearray(data.read_bytes())
    one, other = (slice(page * PAGESIZE + 16, (page + 5) * PAGESIZE) for page in (first, second))
    content[one], content[other] = content[other], content[one]
    data.write_bytes(content)
    tier = open_tier(tmp_path)
    assert sorted(map(str, losses(tier, numbers))) == ["None"] * 38 + ["corrupt"] * 2
    tier.close()


def test_a_value_whose_page_header_is_damaged_is_not_freed_by_it(tmp_path: Path) -> None:
    """LMDB frees as many pages as it says: the next writes would overwrite others' values."""
    numbers = filled(tmp_path)
    tier = open_tier(tmp_path)
    data = tmp_path / "data.mdb"
    for page in pages(data, VALUE_PAGE)[::5]:
        flip(data, page * PAGESIZE + 12, 2)
    assert write(tier, [1], drops=numbers[:1]) == [Loss.CORRUPT]
    assert tier.broken
    assert set(losses(tier, numbers)) == {None}
    tier.close()
    tier = open_tier(tmp_path)
    assert "another one's header" in tier.notice
    assert write(tier, [1]) == [None]
    tier.close()


def test_a_damaged_tree_breaks_the_tier_and_opening_it_again_heals_it(tmp_path: Path) -> None:
    numbers = filled(tmp_path)
    data = tmp_path / "data.mdb"
    tier = open_tier(tmp_path)
    content, values = data.read_bytes(), pages(data, VALUE_PAGE)
    for leaf in pages(data, LEAF_PAGE):
        for page in pages_pointed_at(content, leaf, values):
            flip(data, page + 4, 1)  # a page far beyond the end
    assert set(losses(tier, numbers)) == {None}, "the index says where they are"
    tier.drop([key_of(number) for number in numbers])
    assert tier.broken is not None
    tier.close()
    tier = open_tier(tmp_path)
    assert "out of range" in tier.notice
    assert set(losses(tier, numbers)) == {Loss.MISSING}
    tier.close()


VALUE_NODE = LEAF_NODE.pack(value_bytes(BLOCK_BYTES, PAGESIZE), BIG, KEY_BYTES)


def pages_pointed_at(content: bytes, leaf: int, values: Sequence[int]) -> list[int]:
    """Where in the file a leaf page names a value's first page."""
    page = content[leaf * PAGESIZE : (leaf + 1) * PAGESIZE]
    found = [page.find(value.to_bytes(8, "little"), 16) for value in values]
    return [leaf * PAGESIZE + at for at in found if at > 0 and page[at - 40 : at - 34] == VALUE_NODE[:6]]


def test_an_input_error_loses_the_block_only(
    tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tier, range(3))

    unreadable = os.open(tmp_path, os.O_RDONLY)  # a directory: reading it is an error
    with monkeypatch.context() as patched:
        patched.setattr(tier._db, "file", unreadable)
        assert losses(tier, [1]) == [Loss.IO]
    os.close(unreadable)
    assert losses(tier, range(3)) == [None] * 3
    assert tier.broken is None


def mapped_bytes() -> int:
    """Of the store's file, that this process has touched through LMDB's map."""
    maps = Path("/proc/self/smaps").read_text().split("data.mdb")[1:]
    return sum(int(re.findall(r"Rss: +(\d+) kB", each)[0]) * 1024 for each in maps)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_values_are_never_touched_through_the_map(tmp_path: Path) -> None:
    """A sector that cannot be read would end the process there."""
    tier = open_tier(tmp_path, block_bytes=2**20, quota_bytes=2**26)
    assert write(tier, range(24)) == [None] * 24
    tier.close()
    tier = open_tier(tmp_path, block_bytes=2**20, quota_bytes=2**26)
    before = mapped_bytes()
    assert losses(tier, range(24)) == [None] * 24
    tier.drop([key_of(number) for number in range(12)])
    assert mapped_bytes() - before < 12 * 2**20, (
        "pages of the trees, and those that the system maps around them"
    )
    tier.close()


CUT_WHILE_OPEN = """
import os, sys
from mmap import PAGESIZE
from pathlib import Path
from kvstore.audit import BRANCH_PAGE, LEAF_PAGE, VALUE_PAGE
from tests.kvstore.disk_rig import *
from tests.kvstore.test_audit import pages
path, number = Path(sys.argv[1]), 0
tier = open_tier(path, block_bytes=2**20, quota_bytes=2**26)
while True:
    assert write(tier, [number]) == [None]
    last = max(pages(path / "data.mdb", VALUE_PAGE))
    if number > 3 and last > max(*pages(path / "data.mdb", LEAF_PAGE), *pages(path / "data.mdb", BRANCH_PAGE), 0):
        break
    number += 1
os.truncate(path / "data.mdb", (last - 100) * PAGESIZE)
answers = losses(tier, range(number + 1))
assert sorted(map(str, answers)) == ["None"] * number + ["corrupt"], answers
print("lives")
"""


def test_a_value_that_is_cut_off_while_the_store_is_open_ends_no_process(tmp_path: Path) -> None:
    child = python(CUT_WHILE_OPEN, tmp_path)
    assert child.communicate(timeout=60)[0] == "lives\n"


# --- crashes, and anything --------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from tests.kvstore.disk_rig import *
tier = open_tier(Path(sys.argv[1]))
start = int(sys.argv[2])
for number in range(start, start + 100_000):
    assert write(tier, [number], [number - 50] if number >= 50 else []) == [None]
    print(number, flush=True)
"""


@pytest.mark.parametrize("moments", [(1, 5, 30), (60, 2, 133)])
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(
    tmp_path: Path, moments: tuple[int, ...]
) -> None:
    number = 0
    for moment in moments:
        with python(WRITER, tmp_path, number + 1 if number else 0) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(moment)]
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        number = int([line for line in lines if line.endswith("\n")][-1])
        tier = open_tier(tmp_path)
        assert tier.notice == ""
        must = {key_of(n) for n in range(max(0, number - 48), number + 1)}
        assert must <= kept(tier) <= must | {key_of(max(0, number - 49)), key_of(number + 1)}
        assert not any(losses(tier, range(max(0, number - 48), number + 1)))
        assert tier.verify(lambda done, total: None).lost == ()
        number = max(n for n in (number, number + 1) if key_of(n) in kept(tier))
        tier.close()


numbers_of = st.integers(0, 40)
steps = st.lists(
    st.tuples(
        st.lists(numbers_of, max_size=8, unique=True),
        st.lists(numbers_of, max_size=12),
        st.sampled_from("  r"),
    ),
    max_size=15,
)


@settings(max_examples=30, deadline=None)
@given(steps)
def test_it_behaves_as_a_dict_with_a_quota(batches: list[tuple[list[int], list[int], str]]) -> None:
    with TemporaryDirectory() as directory:
        path, model = Path(directory), set[int]()
        tier = open_tier(path, quota_bytes=2**20)
        for numbers, drops, reopen in batches:
            numbers = numbers[: tier.transaction_blocks]
            expected = (model - set(drops)) | set(numbers)
            refused = len(expected) > tier.capacity_blocks
            assert write(tier, numbers, drops) == [Loss.FULL if refused and numbers else None] * len(numbers)
            model = expected if not refused else model
            if refused:
                tier.drop([key_of(number) for number in drops])
                model = model - set(drops)
            if reopen == "r":
                tier.close()
                tier = open_tier(path, quota_bytes=2**20)
                assert tier.notice == ""
            assert kept(tier) == {key_of(number) for number in model}
            assert losses(tier, range(41)) == [None if n in model else Loss.MISSING for n in range(41)]
            assert tier.stats().blocks == len(model)
            assert bytes_of(path) <= 2**20
        tier.close()


def test_it_keeps_to_the_quota_at_95_percent_through_eight_times_its_size(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, block_bytes=4000)
    random, data = Random(1), block_of(1, 4000)
    fill = int(0.95 * tier.capacity_blocks)
    live = [key_of(number) for number in range(fill)]
    for start in range(0, fill, tier.transaction_blocks):
        some = live[start : start + tier.transaction_blocks]
        assert not any(tier.write([Place(key) for key in some], [data] * len(some)))
    for turn in range(8 * fill // tier.transaction_blocks):
        new = [random.randbytes(32) for _ in range(tier.transaction_blocks)]
        where = random.sample(range(fill), len(new))
        assert not any(
            tier.write([Place(key) for key in new], [data] * len(new), [live[i] for i in where])
        ), turn
        for i, key in zip(where, new, strict=True):
            live[i] = key
    assert {place.key for place in tier.records()} == set(live)
    assert bytes_of(tmp_path) <= QUOTA_BYTES
    tier.close()


def test_a_write_waits_for_a_reader_that_keeps_pages(tmp_path: Path) -> None:
    """Evicting writes beside one long reader: room comes back when it ends, and no block is refused."""
    tier = open_tier(tmp_path)
    numbers = iter(range(10**6))
    live = [next(numbers) for _ in range(tier.capacity_blocks)]
    assert not any(write(tier, live))
    reading = tier._db.env.begin()
    reading.get(b"x", db=tier._db.index)
    ended = Timer(0.05, reading.abort)  # within the time that a write waits
    ended.start()
    for _ in range(20):
        new = [next(numbers) for _ in range(tier.transaction_blocks)]
        gone, live = live[: len(new)], live[len(new) :] + new
        assert not any(write(tier, new, drops=gone))
    ended.join()
    tier.close()
