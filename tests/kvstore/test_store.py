"""The store: each copy is answered once, tiers that hang, break or cannot be opened go down and come back.

Time is virtual: `tick` is called by hand. Threads are real; a tier that hangs waits for an event of the test's.
"""

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Drop, Loss, Place, TierDown, TierUp
from kvstore.memory import MemoryTier
from kvstore.store import News, Opened, Store
from kvstore.tier import Buffer, Tier, TierUnusable
from tests.kvstore.conformance import place, places
from tests.kvstore.disk_rig import block_of, key_of
from tests.kvstore.memory_tier import MemoryRecords

SIZE = 256
WAIT = 10.0


class Gated(MemoryRecords):
    """A tier of records whose reads wait at a gate, and which can break."""

    def __init__(self) -> None:
        super().__init__(DISK, SIZE)
        self.broken: str | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = False
        self.raises: Exception | None = None

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        self.entered.set()
        assert self.gate.wait(WAIT)
        if self.raises:
            raise self.raises
        return super().read(places, into)

    def drop(self, keys: Sequence[Key]) -> None:
        self.entered.set()
        assert self.gate.wait(WAIT)
        super().drop(keys)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Rig:
    """A store of a device, a host and a disk that the test may spoil."""

    def __init__(self) -> None:
        self.now = 0.0
        self.news: SimpleQueue[News] = SimpleQueue()
        self.notes: list[str] = []
        self.disks: list[Gated] = []
        self.refuse: Exception | None = None
        self.device = MemoryTier(DEVICE, np.zeros((8, SIZE), np.uint8))
        self.host = MemoryTier(HOST, np.zeros((8, SIZE), np.uint8))
        for slot in range(8):
            self.device.buffer(slot)[:] = block_of(slot, SIZE)
        memories: dict[str, Tier] = {DEVICE: self.device, HOST: self.host}
        self.store = Store(
            memories,
            {DISK: self.open},
            hung_seconds=30.0,
            retry_seconds=10.0,
            notes=self.note,
            clock=lambda: self.now,
            supervision_seconds=None,
        )

    def open(self) -> Opened:
        if self.refuse:
            raise self.refuse
        self.disks.append(Gated())
        return self.disks[-1], TierUp(DISK, (place(7),), 10)

    def note(self, event: str, facts: dict[str, Any]) -> None:
        self.notes.append(event)

    def started(self) -> "Rig":
        self.store.open()
        self.store.start(self.news.put)
        return self

    def heard(self) -> News:
        return self.news.get(timeout=WAIT)

    def heard_copy(self) -> CopyDone:
        news = self.heard()
        assert isinstance(news, CopyDone)
        return news

    def copy(
        self, id: int, source: str, target: str, numbers: Sequence[int], drops: Sequence[int] = ()
    ) -> None:
        keys = tuple(key_of(number) for number in drops)
        self.store.submit(Copy(id, source, target, tuple(places(numbers)), tuple(places(numbers)), keys))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is carried out with another."""
    monkeypatch.setattr("kvstore.transfer.JOINED_BYTES", 0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    for disk in rig.disks:
        disk.gate.set()
    rig.store.stop(WAIT)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv ")]


def test_what_is_open_at_the_start_is_told_first(rig: Rig) -> None:
    rig.started()
    assert rig.heard() == TierUp(DISK, (place(7),), 10)


def test_a_brief_copy_has_ended_when_it_has_begun(rig: Rig) -> None:
    rig.started().heard()
    rig.copy(1, DEVICE, HOST, [3])
    assert rig.news.get_nowait() == CopyDone(1)
    assert np.array_equal(rig.host.buffer(3), block_of(3, SIZE))


def test_one_that_is_not_brief_is_a_threads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.transfer.BRIEF_BYTES", SIZE)
    rig.started().heard()
    tellers: list[str] = []

    def report(news: News) -> None:
        tellers.append(threading.current_thread().name)
        rig.news.put(news)

    monkeypatch.setattr(rig.store._outbox, "report", report)
    rig.copy(1, DEVICE, HOST, [3])
    assert rig.heard_copy().id == 1
    rig.copy(2, DEVICE, HOST, [4, 5])
    assert rig.heard_copy().id == 2
    assert tellers == [threading.current_thread().name, "kv down copier 0 0"]


def test_a_brief_copy_is_refused_once_the_store_has_stopped(rig: Rig) -> None:
    rig.started().heard()
    assert rig.store.stop(WAIT)
    rig.copy(1, DEVICE, HOST, [3])
    assert rig.heard_copy().lost == ((0, Loss.DOWN),)
    assert not rig.host.buffer(3).any()


@pytest.mark.parametrize(
    ("there", "back"), [(HOST, DEVICE), (DISK, DEVICE), (DISK, HOST)], ids=["host", "disk", "disk to host"]
)
def test_a_block_goes_down_and_comes_back(rig: Rig, there: str, back: str) -> None:
    rig.started().heard()
    rig.copy(1, DEVICE, there, [3, 5])
    first = rig.heard()
    assert isinstance(first, CopyDone)
    assert (first.id, first.lost) == (1, ())
    wanted = [block_of(number, SIZE) for number in (3, 5)]
    rig.device.buffer(3)[:] = 0
    rig.copy(2, there, back, [3, 5])
    assert rig.heard() == CopyDone(2)
    target = {DEVICE: rig.device, HOST: rig.host}[back]
    assert np.array_equal(target.buffer(3), wanted[0])
    assert np.array_equal(target.buffer(5), wanted[1])


def test_what_is_not_there_is_lost_and_counted(rig: Rig) -> None:
    rig.started().heard()
    rig.copy(1, DEVICE, DISK, [3])
    rig.heard()
    rig.copy(2, DISK, DEVICE, [2, 3])
    assert rig.heard() == CopyDone(2, ((0, Loss.MISSING),))
    assert rig.store.totals()[DISK].losses == {Loss.MISSING: 1}


def test_writes_and_drops_keep_their_order(rig: Rig) -> None:
    rig.started().heard()
    rig.copy(1, DEVICE, DISK, [1, 2])
    rig.store.drop(Drop(DISK, (key_of(1),)))
    rig.copy(2, DEVICE, DISK, [1], drops=[2])
    rig.heard(), rig.heard()
    rig.copy(3, DISK, DEVICE, [1, 2])
    assert rig.heard() == CopyDone(3, ((1, Loss.MISSING),))


def test_a_tier_that_raises_costs_the_copy_and_is_noted(rig: Rig) -> None:
    rig.started().heard()
    rig.disks[0].raises = OSError("no such sector")
    rig.copy(1, DISK, DEVICE, [1, 2])
    assert rig.heard() == CopyDone(1, ((0, Loss.IO), (1, Loss.IO)))
    assert "copy_raised" in rig.notes


def test_a_tier_that_hangs_goes_down_and_comes_back_when_it_has_come_back(rig: Rig) -> None:
    rig.started().heard()
    disk = rig.disks[0]
    disk.gate.clear()
    rig.copy(1, DISK, DEVICE, [1])
    assert disk.entered.wait(WAIT)
    rig.now = 30.0
    rig.store.tick()
    assert rig.news.empty(), "it has not been too long yet"
    rig.now = 31.0
    rig.store.tick()
    down = rig.heard()
    assert isinstance(down, TierDown)
    assert "hung" in down.reason
    rig.copy(2, DISK, DEVICE, [1])
    assert rig.heard() == CopyDone(2, ((0, Loss.DOWN),)), "answered at once"
    rig.now = 100.0
    rig.store.tick()
    assert rig.news.empty(), "it is not opened while a thread is inside"
    assert not disk.closed
    disk.gate.set()
    late = rig.heard()
    assert isinstance(late, CopyDone)
    assert late.id == 1
    rig.store.tick()
    assert rig.heard() == TierUp(DISK, (place(7),), 10)
    assert disk.closed
    assert len(rig.disks) == 2


@pytest.mark.usefixtures("alone")
def test_copies_behind_one_that_hangs_are_answered_when_the_tier_goes_down(rig: Rig) -> None:
    rig.started().heard()
    disk = rig.disks[0]
    disk.gate.clear()
    for id in range(1, 6):  # two readers hang with the first two
        rig.copy(id, DISK, DEVICE, [id])
    assert disk.entered.wait(WAIT)
    rig.now = 31.0
    rig.store.tick()
    assert isinstance(rig.heard(), TierDown)
    answered = {rig.heard_copy().id for _ in range(3)}
    assert len(answered & {3, 4, 5}) >= 2
    disk.gate.set()


def test_a_broken_tier_is_closed_and_opened_again(rig: Rig) -> None:
    rig.started().heard()
    rig.disks[0].broken = "CorruptedError"
    rig.store.tick()
    down = rig.heard()
    assert isinstance(down, TierDown)
    assert "CorruptedError" in down.reason
    rig.now = 10.0
    rig.store.tick()
    assert isinstance(rig.heard(), TierUp)
    assert rig.disks[0].closed


@pytest.mark.parametrize("error", [TierUnusable("in use by another server"), RuntimeError("odd")])
def test_a_tier_that_cannot_be_opened_is_tried_again(rig: Rig, error: Exception) -> None:
    rig.refuse = error
    rig.started()
    down = rig.heard()
    assert isinstance(down, TierDown)
    assert str(error) in down.reason
    rig.now = 5.0
    rig.store.tick()
    rig.refuse = None
    rig.store.tick()
    assert rig.news.empty(), "not before its time"
    rig.now = 15.0
    rig.store.tick()
    assert isinstance(rig.heard(), TierUp)
    assert rig.notes.count("tier_unusable") == 1, "one line, not one an attempt"


@pytest.mark.parametrize("work", ["drop", "operation"])
def test_a_tier_is_not_closed_under_work(rig: Rig, work: str) -> None:
    rig.started().heard()
    disk = rig.disks[0]
    disk.gate.clear()
    if work == "drop":
        rig.store.drop(Drop(DISK, (key_of(1),)))
    else:
        assert rig.store.run_among_reads(DISK, lambda tier: tier.drop(()))
    assert disk.entered.wait(WAIT)
    disk.broken = "x"
    rig.store.tick()
    rig.now = 100.0
    rig.store.tick()
    assert not disk.closed
    disk.gate.set()
    done = threading.Event()
    while not disk.closed:  # as soon as the work's thread has said that it has ended
        rig.store.tick()
        done.wait(0.001)
    assert len(rig.disks) == 2


def test_an_operation_may_take_long(rig: Rig) -> None:
    rig.started().heard()
    rig.disks[0].gate.clear()
    assert rig.store.run_among_reads(DISK, lambda tier: tier.drop(()))
    assert rig.disks[0].entered.wait(WAIT)
    rig.now = 1000.0
    rig.store.tick()
    assert rig.news.empty()
    rig.disks[0].gate.set()


def test_stopping_finishes_what_is_queued(rig: Rig) -> None:
    rig.started().heard()
    for id in range(20):
        rig.copy(id, DEVICE, DISK, [id % 8])
    assert rig.store.stop(WAIT)
    ids = {rig.heard_copy().id for _ in range(20)}
    assert ids == set(range(20))
    assert rig.disks[0].closed


@pytest.mark.usefixtures("alone")
def test_stopping_does_not_wait_for_what_hangs_and_answers_the_rest() -> None:
    rig = Rig().started()
    rig.heard()
    rig.disks[0].gate.clear()
    for id in range(5):
        rig.copy(id, DISK, DEVICE, [id])
    assert rig.disks[0].entered.wait(WAIT)
    assert not rig.store.stop(0.05)
    answered = [rig.heard() for _ in range(3)]
    assert all(isinstance(done, CopyDone) and done.lost[0][1] is Loss.DOWN for done in answered)
    assert not rig.disks[0].closed
    rig.copy(9, DEVICE, HOST, [1])
    assert rig.heard() == CopyDone(9, ((0, Loss.DOWN),)), "and what comes after it"
    rig.disks[0].gate.set()


def test_a_listener_that_raises_ends_no_thread(rig: Rig) -> None:
    rig.store.open()
    heard: SimpleQueue[News] = SimpleQueue()

    def listen(news: News) -> None:
        heard.put(news)
        raise ValueError("a bug of the listener's")

    rig.store.start(listen)
    heard.get(timeout=WAIT)
    for id in range(4):
        rig.copy(id, DISK, DEVICE, [1])
        assert heard.get(timeout=WAIT)


def test_measured_means_are_of_bytes_and_seconds(rig: Rig) -> None:
    rig.started().heard()
    for id in range(4):
        rig.copy(id, DEVICE, HOST, [0, 1, 2])
        rig.heard()
    [means] = rig.store.measured()
    assert (means.source, means.target, means.copies, means.size_class) == (DEVICE, HOST, 4, 1024)
    assert means.bytes == 3 * SIZE
    totals = rig.store.totals()
    assert totals[DEVICE].read_bytes == totals[HOST].written_bytes == 12 * SIZE
