"""Transfers: bytes arrive on every route, each copy ends once, order is kept where it counts, figures are right.

Threads are real, and wait for events of the test's. What becomes of a tier that fails for good: test_store.py.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Loss, Place
from kvstore.memory import MemoryTier
from kvstore.tier import Buffer, Tier
from kvstore.transfer import Lane, Measured, Task, Transfers
from tests.kvstore.conformance import place, places
from tests.kvstore.disk_rig import BLOCK_BYTES, block_of, key_of, open_tier
from tests.kvstore.memory_tier import MemoryRecords

WAIT = 10.0
SLOTS = 12
REMOTE = "remote"


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Spoilt(MemoryRecords):
    """Records that can be told to wait, to raise, or to let time pass; it notes what is done to it, in order."""

    def __init__(self, name: str, clock: Clock) -> None:
        super().__init__(name, BLOCK_BYTES)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.raises: Exception | None = None
        self.seconds = 0.0
        self.log: list[tuple[str, tuple[Key, ...]]] = []
        self._clock = clock

    def _enter(self, what: str, keys: Sequence[Key]) -> None:
        self.entered.release()
        assert self.gate.wait(WAIT)
        self.log.append((what, tuple(keys)))
        self._clock.now += self.seconds
        if self.raises:
            raise self.raises

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        self._enter("read", [place.key for place in places])
        return super().read(places, into)

    def write(
        self, places: Sequence[Place], data: Sequence[Buffer], drops: Sequence[Key] = ()
    ) -> list[Loss | None]:
        self._enter("write", [place.key for place in places])
        return super().write(places, data, drops)


class Rig:
    """A device and a host in memory, and tiers of records: a disk that can be spoilt, and a remote one."""

    def __init__(self, device: Tier | None = None, disk: Tier | None = None) -> None:
        self.clock = Clock()
        self.done: SimpleQueue[CopyDone] = SimpleQueue()
        self.failures: list[tuple[int, Exception]] = []
        self.disk = Spoilt(DISK, self.clock)
        memories = {DEVICE: device or memory(DEVICE), HOST: memory(HOST)}
        self.transfers = Transfers(
            memories,
            self._ended,
            lambda copy, error: self.failures.append((copy.id, error)),
            clock=self.clock,
        )
        self.transfers.put_tier(DISK, disk or self.disk)
        self.transfers.put_tier(REMOTE, MemoryRecords(REMOTE, BLOCK_BYTES))

    def _ended(self, ended: Sequence[tuple[Task, CopyDone]]) -> None:
        for _, done in ended:
            self.done.put(done)

    def fill(self, tier: str, numbers: Sequence[int]) -> None:
        data = [block_of(number, BLOCK_BYTES) for number in numbers]
        assert not any(self.transfers.tiers[tier].write(places(numbers), data))

    def submit(
        self, id: int, source: str, target: str, numbers: Sequence[int], drops: Sequence[int] = ()
    ) -> Task:
        keys = tuple(key_of(number) for number in drops)
        return self.transfers.submit(
            Copy(id, source, target, tuple(places(numbers)), tuple(places(numbers)), keys)
        )

    def heard(self) -> CopyDone:
        return self.done.get(timeout=WAIT)

    def found(self, tier: str, numbers: Sequence[int]) -> list[Buffer]:
        into = [np.zeros(BLOCK_BYTES, np.uint8) for _ in numbers]
        assert not any(self.transfers.tiers[tier].read(places(numbers), into))
        return into

    def close(self) -> bool:
        self.disk.gate.set()
        return self.transfers.close(time.monotonic() + WAIT)


def memory(name: str) -> MemoryTier:
    return MemoryTier(name, np.zeros((SLOTS, BLOCK_BYTES), np.uint8))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    assert rig.close()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is carried out with another."""
    monkeypatch.setattr("kvstore.transfer.JOINED_BYTES", 0)


# --- routes -----------------------------------------------------------------------------------------------------------

ROUTES = [(a, b) for a in (DEVICE, HOST, DISK, REMOTE) for b in (DEVICE, HOST, DISK, REMOTE) if a != b]


@pytest.mark.parametrize(("source", "target"), ROUTES)
@pytest.mark.parametrize("card", [False, True], ids=["pool", "card"])
def test_bytes_arrive_on_every_route(source: str, target: str, card: bool, tmp_path: Path) -> None:
    """With the real disk; and with a device that lends no slots, as a card does: then some go through the bounce."""
    disk = open_tier(tmp_path, quota_bytes=2**24)
    rig = Rig(MemoryRecords(DEVICE, BLOCK_BYTES) if card else None, disk)
    rig.fill(source, [1, 5, 3])
    rig.submit(7, source, target, [5, 3, 1])
    assert rig.heard().lost == ()
    assert rig.close()
    assert rig.done.empty()
    for found, number in zip(rig.found(target, [1, 3, 5]), (1, 3, 5), strict=True):
        assert np.array_equal(found, block_of(number, BLOCK_BYTES))
    disk.close()


@pytest.mark.parametrize(("source", "target"), [(DISK, HOST), (DISK, REMOTE)])
def test_the_blocks_that_are_missing_are_named_and_the_rest_arrives(
    rig: Rig, source: str, target: str
) -> None:
    rig.fill(source, [1, 3])
    rig.submit(1, source, target, [0, 1, 2, 3])
    assert rig.heard().lost == ((0, Loss.MISSING), (2, Loss.MISSING))
    for found, number in zip(rig.found(target, [1, 3]), (1, 3), strict=True):
        assert np.array_equal(found, block_of(number, BLOCK_BYTES))


@pytest.mark.parametrize("source", [HOST, REMOTE])
def test_what_a_copy_drops_has_left_when_it_ends(rig: Rig, source: str) -> None:
    rig.fill(DISK, [8])
    rig.fill(source, [1])
    rig.submit(1, source, DISK, [1], drops=[8])
    assert rig.heard().lost == ()
    assert rig.transfers.tiers[DISK].stats().blocks == 1


def test_a_full_target_loses_all_and_counts_them(rig: Rig) -> None:
    rig.transfers.put_tier(REMOTE, MemoryRecords(REMOTE, BLOCK_BYTES, capacity=1))
    rig.submit(1, HOST, REMOTE, [1, 2])
    assert rig.heard().lost == ((0, Loss.FULL), (1, Loss.FULL))
    assert rig.transfers.totals()[REMOTE].losses == Counter({Loss.FULL: 2})


@pytest.mark.parametrize(("source", "target"), ROUTES)
def test_what_is_small_between_two_memories_is_brief(
    rig: Rig, source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.transfer.BRIEF_BYTES", 3 * BLOCK_BYTES)
    small, large = (Copy(1, source, target, of, of) for of in (tuple(places(range(n))) for n in (3, 4)))
    assert rig.transfers.is_brief(small) is ({source, target} == {DEVICE, HOST})
    assert not rig.transfers.is_brief(large)


def test_nothing_is_brief_that_a_card_has() -> None:
    rig = Rig(MemoryRecords(DEVICE, BLOCK_BYTES))
    assert not rig.transfers.is_brief(Copy(1, DEVICE, HOST, (place(1),), (place(1),)))
    assert rig.close()


def test_what_the_caller_carries_out_has_ended_then_and_is_measured(rig: Rig) -> None:
    rig.fill(DEVICE, [5, 3])
    of = tuple(places([5, 3]))
    rig.transfers.carry_out(Copy(1, DEVICE, HOST, of, of))
    assert rig.done.get_nowait() == CopyDone(1)
    for found, number in zip(rig.found(HOST, [5, 3]), (5, 3), strict=True):
        assert np.array_equal(found, block_of(number, BLOCK_BYTES))
    (measured,) = rig.transfers.measured()
    assert (measured.source, measured.target, measured.copies) == (DEVICE, HOST, 1)
    assert measured.bytes == 2 * BLOCK_BYTES


def test_a_memory_that_raises_costs_the_caller_nothing_but_the_copy(rig: Rig) -> None:
    nowhere = (place(SLOTS),)
    rig.transfers.carry_out(Copy(1, DEVICE, HOST, nowhere, nowhere))
    assert rig.done.get_nowait().lost == ((0, Loss.IO),)
    assert [id for id, _ in rig.failures] == [1]


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [(DISK, HOST), (HOST, DISK), (DISK, REMOTE), (REMOTE, DISK)])
def test_a_tier_that_raises_costs_all_of_the_copy_and_no_thread(rig: Rig, source: str, target: str) -> None:
    rig.fill(source, [1, 2])
    rig.disk.raises = OSError(5, "Input/output error")
    rig.submit(1, source, target, [1, 2])
    assert rig.heard().lost == ((0, Loss.IO), (1, Loss.IO))
    assert rig.failures == [(1, rig.disk.raises)]
    rig.disk.raises = None
    rig.submit(2, source, target, [1, 2])
    assert rig.heard() == CopyDone(2)


@given(
    st.lists(
        st.tuples(st.sampled_from(ROUTES), st.lists(st.integers(0, SLOTS - 1), unique=True, max_size=4)),
        max_size=25,
    )
)
def test_each_copy_ends_just_once(copies: list[tuple[tuple[str, str], list[int]]]) -> None:
    """Whatever is copied, there or not; all that a record tier delivers is right."""
    rig = Rig()
    rig.fill(DEVICE, range(SLOTS))
    rig.fill(HOST, range(SLOTS))
    rig.fill(REMOTE, [0, 2, 4])
    for id, ((source, target), numbers) in enumerate(copies):
        rig.submit(id, source, target, numbers)
    assert rig.close()
    ended = [rig.done.get_nowait() for _ in copies]
    assert rig.done.empty()
    assert sorted(done.id for done in ended) == list(range(len(copies)))
    assert {loss for done in ended for _, loss in done.lost} <= {Loss.MISSING}
    for tier in (DEVICE, HOST):
        for number, found in enumerate(rig.found(tier, range(SLOTS))):
            assert np.array_equal(found, block_of(number, BLOCK_BYTES))


# --- order ------------------------------------------------------------------------------------------------------------


def _logged_drop(rig: Rig, key: Key, _task: Task) -> None:
    rig.disk.log.append(("drop", (key,)))


def test_writes_and_drops_of_a_tier_keep_their_order(rig: Rig) -> None:
    rig.disk.gate.clear()
    wanted = []
    for number in range(6):
        key = key_of(number)
        rig.submit(number, HOST, DISK, [number])
        rig.transfers.put_write(DISK, Task(partial(_logged_drop, rig, key)))
        wanted += [("write", (key,)), ("drop", (key,))]
    rig.disk.gate.set()
    assert [rig.heard().id for _ in range(6)] == list(range(6))
    assert rig.close()
    assert rig.disk.log == wanted


@pytest.mark.usefixtures("alone")
def test_two_reads_go_on_at_once_and_no_write_waits_for_them(rig: Rig) -> None:
    rig.fill(DISK, [1, 2])
    rig.disk.gate.clear()
    for number in (1, 2, 3):
        rig.submit(number, DISK, HOST, [number])
    rig.submit(4, HOST, DISK, [4])
    for _ in range(3 + 1):  # `fill` entered once
        assert rig.disk.entered.acquire(timeout=WAIT)
    assert rig.done.empty()
    rig.disk.gate.set()
    assert {rig.heard().id for _ in range(4)} == {1, 2, 3, 4}


def test_small_copies_that_wait_along_one_route_are_carried_out_together(rig: Rig) -> None:
    """But for one that drops something, which those before it might write. Each has its share of the time."""
    rig.disk.gate.clear()
    rig.submit(0, HOST, DISK, [0])
    assert rig.disk.entered.acquire(timeout=WAIT)
    rig.disk.seconds = 3.0
    for number in (1, 2, 3):
        rig.submit(number, HOST, DISK, [number])
    rig.submit(4, HOST, DISK, [4], drops=[1])
    rig.submit(5, HOST, DISK, [5])
    rig.disk.gate.set()
    ends = [rig.heard() for _ in range(6)]
    assert [(done.id, done.queued_seconds, done.seconds) for done in ends] == [
        (0, 0.0, 3.0), (1, 3.0, 1.0), (2, 4.0, 1.0), (3, 5.0, 1.0), (4, 6.0, 1.5), (5, 7.5, 1.5)
    ]  # fmt: skip
    wrote = [keys for what, keys in rig.disk.log if what == "write"]
    assert wrote == [tuple(map(key_of, numbers)) for numbers in ((0,), (1, 2, 3), (4, 5))]
    assert rig.transfers.tiers[DISK].stats().blocks == 5, "and one has been dropped"


def test_each_of_copies_carried_out_together_loses_its_own(rig: Rig) -> None:
    rig.fill(DISK, [0, 1, 3])
    assert rig.disk.entered.acquire(timeout=WAIT)
    rig.disk.gate.clear()
    for _ in range(2):  # one for each reader
        rig.submit(9, DISK, HOST, [0])
        assert rig.disk.entered.acquire(timeout=WAIT)
    for number in (1, 2, 3):
        rig.submit(number, DISK, HOST, [number])
    rig.disk.gate.set()
    lost = {done.id: done.lost for done in (rig.heard() for _ in range(5))}
    assert lost == {9: (), 1: (), 2: ((0, Loss.MISSING),), 3: ()}
    assert ("read", tuple(map(key_of, (1, 2, 3)))) in rig.disk.log
    for number in (1, 3):
        assert np.array_equal(rig.found(HOST, [number])[0], block_of(number, BLOCK_BYTES))


def test_memory_waits_for_no_tier_of_records_nor_reads_for_an_operator(rig: Rig) -> None:
    rig.fill(DISK, [1])
    rig.disk.gate.clear()
    held = threading.Event()

    def operate(task: Task) -> None:
        assert held.wait(WAIT)

    rig.transfers.put_operation(DISK, Task(operate))
    rig.submit(1, HOST, DISK, [1])
    rig.submit(2, DEVICE, HOST, [2])
    rig.submit(3, HOST, DEVICE, [3])
    assert {rig.heard().id for _ in range(2)} == {2, 3}
    rig.disk.gate.set()
    assert rig.heard().id == 1
    rig.submit(4, DISK, HOST, [1])
    assert rig.heard().id == 4
    held.set()


@pytest.mark.usefixtures("alone")
def test_what_is_withdrawn_is_what_no_thread_has_taken_up(rig: Rig) -> None:
    rig.disk.gate.clear()
    tasks = [rig.submit(number, HOST, DISK, [number]) for number in range(4)]
    assert rig.disk.entered.acquire(timeout=WAIT)
    assert rig.transfers.withdraw({tasks[0], tasks[2]}) == [tasks[2]]
    assert rig.transfers.withdraw() == [tasks[1], tasks[3]]
    rig.disk.gate.set()
    assert rig.heard().id == 0
    assert rig.close()
    assert rig.done.empty()
    assert rig.disk.log == [("write", (key_of(0),))]


def test_closing_finishes_what_is_queued(rig: Rig) -> None:
    rig.disk.gate.clear()
    for number in range(5):
        rig.submit(number, HOST, DISK, [number])
    assert rig.close()
    assert [rig.done.get_nowait().id for _ in range(5)] == list(range(5))


def test_closing_does_not_wait_for_what_hangs() -> None:
    rig = Rig()
    rig.disk.gate.clear()
    rig.submit(1, HOST, DISK, [1])
    assert rig.disk.entered.acquire(timeout=WAIT)
    assert not rig.transfers.close(time.monotonic())
    rig.disk.gate.set()
    assert rig.heard().id == 1
    assert rig.close()


def test_a_lane_takes_nothing_once_it_is_shut() -> None:
    lane = Lane("test", 1, Clock())
    lane.shut()
    with pytest.raises(AssertionError):
        lane.put(Task(lambda task: None))
    assert lane.join(time.monotonic() + WAIT)


# --- figures ----------------------------------------------------------------------------------------------------------


def timed(rig: Rig, seconds: float, blocks: int) -> CopyDone:
    rig.disk.seconds = seconds
    rig.submit(1, HOST, DISK, range(blocks))
    return rig.heard()


def test_a_copy_says_how_long_it_waited_and_took(rig: Rig) -> None:
    rig.disk.gate.clear()
    rig.disk.seconds = 2.0
    rig.submit(1, HOST, DISK, [1])
    assert rig.disk.entered.acquire(timeout=WAIT)
    rig.submit(2, HOST, DISK, [2])
    rig.clock.now = 5.0
    rig.disk.gate.set()
    assert [(done.seconds, done.queued_seconds) for done in (rig.heard(), rig.heard())] == [
        (7.0, 0.0),
        (2.0, 7.0),
    ]


def test_figures_are_kept_by_route_and_size_class(rig: Rig) -> None:
    """20,000 bytes are in the class of 32,768; two of them in that of 65,536."""
    for blocks in (1, 2, 2):
        timed(rig, 0.5, blocks)
    found = {means.size_class: means for means in rig.transfers.measured()}
    assert {(means.source, means.target) for means in found.values()} == {(HOST, DISK)}
    assert {size: means.copies for size, means in found.items()} == {32_768: 1, 65_536: 2}
    assert found[32_768].bytes_per_second == pytest.approx(BLOCK_BYTES / 0.5)
    assert found[65_536].bytes_per_second == pytest.approx(2 * BLOCK_BYTES / 0.5)
    assert found[65_536].seconds == pytest.approx(0.5)


def test_bandwidth_is_that_of_all_copies_together() -> None:
    """Half of them quick, half slow: what an hour brings, not the mean of both rates."""
    means = Measured(HOST, DISK, 1024)
    for seconds in (0.1, 1.0):
        means.add(1000, seconds, 0.0)
    assert means.bytes_per_second == pytest.approx(2000 / 1.1)


def test_means_follow_what_changes() -> None:
    means = Measured(HOST, DISK, 1024)
    for seconds in [1.0] * 50 + [3.0] * 50:
        means.add(1000, seconds, seconds)
    assert means.seconds == pytest.approx(3.0, rel=0.01)
    assert means.queued_seconds == pytest.approx(3.0, rel=0.01)


def test_totals_count_what_moved_and_what_was_lost(rig: Rig) -> None:
    rig.fill(DISK, [1])
    rig.submit(1, DISK, HOST, [1, 2])
    rig.heard()
    before = rig.transfers.totals()
    assert (before[DISK].read_bytes, before[HOST].written_bytes) == (BLOCK_BYTES, BLOCK_BYTES)
    assert before[DISK].losses == Counter({Loss.MISSING: 1})
    rig.submit(2, HOST, DISK, [3, 4])
    rig.heard()
    assert before[DISK].written_bytes == 0, "what was told stays as it was"
    assert rig.transfers.totals()[DISK].written_bytes == 2 * BLOCK_BYTES


def test_a_copy_that_lost_everything_says_nothing_of_speed(rig: Rig) -> None:
    rig.submit(1, DISK, HOST, [1])
    assert rig.heard().lost == ((0, Loss.MISSING),)
    assert rig.transfers.measured() == []
