"""The one table: driven as a state machine, its books balance after every event, whatever ends, fails or is evicted."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.below import Below, ResidencyConfig
from kvstore.block import Key, extend_keys
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Drop, Loss, Place, TierUp
from kvstore.device import DevicePool
from kvstore.residency import Residency
from kvstore.shelf import Entry, Shelf
from policies.eviction import EVICTIONS, Scored, lru
from policies.placement import PLACEMENTS

SIZE = 4
BLOCKS = 24


def chain(family: int, length: int) -> list[Key]:
    keys: list[Key] = []
    extend_keys(keys, b"root%d" % family, list(range(length * SIZE)), SIZE)
    return keys


def residency_of(config: ResidencyConfig, eviction: str = "lru") -> Residency:
    return Residency(DevicePool(8), Below(config, EVICTIONS[eviction], PLACEMENTS["write_through"]))


class Holder:
    """What a sequence does to the table: holds blocks, publishes them, saves, and leaves."""

    def __init__(self, residency: Residency, keys: list[Key]) -> None:
        self.residency = residency
        self.keys = keys
        self.table = residency.pool.allocate(len(keys))
        for index, (key, parent) in enumerate(zip(keys, [b"", *keys], strict=False)):
            self.table[index] = residency.pool.publish(self.table[index], key, parent)

    def places(self) -> list[tuple[int, Place]]:
        parents = [b"", *self.keys]
        return [
            (block, Place(key, -1, parent, depth, SIZE))
            for depth, (block, key, parent) in enumerate(zip(self.table, self.keys, parents, strict=False))
        ]


class Table(RuleBasedStateMachine):
    placement = "write_through"

    @initialize(
        eviction=st.sampled_from(["lru", "lfu", "cost"]),
        placement=st.sampled_from(["write_through", "selective", "on_evict"]),
        host=st.sampled_from([0, 5, 11]),
        disk=st.sampled_from([0, 7, 40]),
    )
    def start(self, eviction: str, placement: str, host: int, disk: int) -> None:
        config = ResidencyConfig(host, disk, 3, 2, 8, 6, 0.5)
        self.residency = Residency(
            DevicePool(BLOCKS), Below(config, EVICTIONS[eviction], PLACEMENTS[placement])
        )
        self.holders: list[Holder] = []
        self.loads: list[list[int]] = []  # tables that fetches fill
        self.pinned: list[list[Entry]] = []
        self.under_way: list[Copy] = []
        self.on_disk: dict[Key, Place] = {}  # what a disk would have
        self.parts: list[TierUp] = []  # of what it told when it came up, still to come
        self.now = 0.0
        if disk:
            self.residency.tier_up(TierUp(DISK, ()), self.now)

    @rule(eviction=st.sampled_from(sorted(EVICTIONS)), placement=st.sampled_from(sorted(PLACEMENTS)))
    def switch(self, eviction: str, placement: str) -> None:
        self.residency.below.use(EVICTIONS[eviction], PLACEMENTS[placement])

    def carry_out(self) -> None:
        self.now += 1.0
        for told in self.residency.take(self.now):
            if isinstance(told, Copy):
                self.under_way.append(told)
            else:
                self.drop(told.keys)

    def drop(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.on_disk.pop(key, None)

    @rule(family=st.integers(0, 2), length=st.integers(1, 6))
    def compute(self, family: int, length: int) -> None:
        if self.residency.pool.available >= length:
            self.holders.append(Holder(self.residency, chain(family, length)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        assert 0 <= self.residency.save(holder.places(), self.now) <= len(holder.keys)
        self.carry_out()

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), pins=st.booleans())
    def leave(self, data: st.DataObject, pins: bool) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        if pins:
            self.pinned.append(self.residency.pin(holder.keys))
        self.residency.pool.release(holder.table)
        self.carry_out()

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.residency.unpin(self.pinned.pop())

    @rule(family=st.integers(0, 2), length=st.integers(1, 6))
    def find_and_fetch(self, family: int, length: int) -> None:
        keys = chain(family, length)
        found = [place for place in self.residency.find(keys) if isinstance(place, Entry)]
        self.residency.hit(keys, self.now)
        if 0 < len(found) <= self.residency.pool.available:
            table = self.residency.pool.allocate(len(found))
            self.residency.fetch(list(zip(found, table, strict=True)), after=0)
            self.loads.append(table)
        self.carry_out()

    @rule()
    def the_device_forgets(self) -> None:
        self.residency.pool.clear_cache()

    @rule(family=st.integers(0, 2), length=st.integers(3, 6))
    def serve(self, family: int, length: int) -> None:
        """A sequence from its computation to its end, saved on the way; its copies end well."""
        if self.residency.pool.available >= length:
            holder = Holder(self.residency, chain(family, length))
            self.residency.save(holder.places(), self.now)
            self.residency.pool.release(holder.table)
            self.carry_out()
            while self.under_way:
                self.end(self.under_way[0], None)

    @rule(family=st.integers(0, 2), length=st.integers(1, 6))
    def prefetch(self, family: int, length: int) -> None:
        self.residency.prefetch(chain(family, length), self.now)
        self.carry_out()

    @precondition(lambda self: self.loads)
    @rule()
    def give_a_load_up(self) -> None:
        self.residency.pool.release(self.loads.pop())

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), loss=st.sampled_from([None, None, None, *Loss]))
    def a_copy_ends(self, data: st.DataObject, loss: Loss | None) -> None:
        first_write = next((copy for copy in self.under_way if copy.target == DISK), None)
        copy = data.draw(st.sampled_from(self.under_way))
        self.end(first_write if first_write and copy.target == DISK else copy, loss)

    def end(self, copy: Copy, loss: Loss | None) -> None:
        self.under_way.remove(copy)
        count = len(copy.sources)
        lost = tuple((index, loss) for index in range(count) if loss and (copy.target == DISK or index % 2))
        if copy.target == DISK and not lost:
            self.drop(copy.drops)
            self.on_disk |= {place.key: place for place in copy.targets}
        self.residency.copied(CopyDone(copy.id, lost), self.now)
        self.carry_out()

    @rule(tier=st.sampled_from([HOST, DISK]), blocks=st.integers(0, 3))
    def prune(self, tier: str, blocks: int) -> None:
        self.residency.prune(tier, blocks, self.now) if blocks else self.residency.clear(tier)
        self.carry_out()

    @precondition(lambda self: self.residency.disk.up or self.parts)
    @rule(most=st.integers(1, 5), capacity=st.sampled_from([None, None, 3]))
    def the_disk_fails_and_begins_to_heal(self, most: int, capacity: int | None) -> None:
        """Perhaps before all of what it held the last time had been told."""
        self.residency.tier_down(DISK)
        self.carry_out()
        while busy := [copy for copy in self.under_way if DISK in (copy.source, copy.target)]:
            self.end(busy[0], Loss.DOWN)
        kept: dict[Key, Place] = {}
        for key, place in self.on_disk.items():
            if not place.parent or place.parent in kept:
                kept[key] = place
        self.on_disk = kept
        self.parts = list(TierUp(DISK, tuple(kept.values()), capacity).parts(most))

    @precondition(lambda self: self.parts)
    @rule()
    def a_part_of_what_the_disk_holds_comes(self) -> None:
        part = self.parts.pop(0)
        self.residency.tier_up(part, self.now)
        assert self.residency.disk.up == (not part.more)
        self.carry_out()
        if not part.more:
            assert {entry.key for entry in self.residency.disk.entries()} == self.on_disk.keys()

    @invariant()
    def books_balance(self) -> None:
        self.residency.check([*(holder.table for holder in self.holders), *self.loads])

    @invariant()
    def the_disk_has_room_for_what_the_table_says(self) -> None:
        assert len(self.residency.disk) <= self.residency.disk.capacity
        settled = {entry.key for entry in self.residency.disk.entries() if not entry.writing}
        assert settled <= self.on_disk.keys(), "the table promises records that the disk has not"

    def teardown(self) -> None:
        if not hasattr(self, "residency"):
            return
        while self.under_way:
            self.end(self.under_way[0], None)
        for holder in self.holders:
            self.residency.pool.release(holder.table)
        for table in self.loads:
            self.residency.pool.release(table)
        for entries in self.pinned:
            self.residency.unpin(entries)
        self.carry_out()
        while self.under_way:
            self.end(self.under_way[0], None)
        self.residency.check([])
        assert self.residency.quiet
        assert self.residency.pool.held == 0
        assert self.residency.pinned == 0


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def place(key: bytes, parent: bytes = b"", depth: int = 0) -> Place:
    return Place(key, -1, parent, depth, SIZE)


def test_a_slot_with_a_copy_in_flight_is_nobody_elses() -> None:
    shelf = Shelf(HOST, 1, Scored(lru), addressed=True)
    entry = shelf.add(place(b"a"), 0.0)
    shelf.remove(entry)
    assert shelf.room == 0, "the copy that fills it has not ended"
    shelf.written(entry)
    assert shelf.room == 1
    assert shelf.get(b"a") is None, "who was dropped meanwhile is not found"


def test_what_is_being_written_is_not_read_and_what_is_read_does_not_leave() -> None:
    shelf = Shelf(HOST, 2, Scored(lru), addressed=True)
    entry = shelf.add(place(b"a"), 0.0)
    assert entry.state.value == "writing"
    assert shelf.readable(b"a") is None
    shelf.written(entry)
    shelf.offer(entry)
    entry.readers += 1
    assert entry.state.value == "reading"
    assert shelf.pop_candidate(0.0) is None
    shelf.read(entry)
    shelf.offer(entry)
    assert shelf.pop_candidate(0.0) is entry


@pytest.mark.parametrize("eviction", ["lru", "lfu", "cost"])
def test_children_leave_before_their_parents(eviction: str) -> None:
    residency = residency_of(ResidencyConfig(host_blocks=6), eviction)
    holder = Holder(residency, chain(0, 6))
    residency.save(holder.places(), 0.0)
    for told in residency.take(0.0):
        assert isinstance(told, Copy)
        residency.copied(CopyDone(told.id), 0.0)
    for left in range(5, -1, -1):
        residency.prune(HOST, left, 1.0)
        assert [entry.depth for entry in residency.host.entries()] == list(range(left))


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_what_came_in_parts_leaves_children_first_and_beyond_the_capacity_is_dropped(most: int) -> None:
    """Parts that come at different moments, and part chains, are no other than one."""
    keys = chain(0, 6)
    places = [
        place(key, parent, depth) for depth, (parent, key) in enumerate(zip([b"", *keys], keys, strict=False))
    ]
    residency = residency_of(ResidencyConfig(disk_blocks=9))
    dropped: list[Key] = []
    for now, part in enumerate(TierUp(DISK, tuple(places), capacity_blocks=4).parts(most)):
        assert not residency.disk.up
        assert not residency.find(keys), "nothing is known before all is"
        residency.tier_up(part, float(now))
        dropped += [key for told in residency.take(float(now)) if isinstance(told, Drop) for key in told.keys]
        residency.check([])
    assert residency.disk.up
    assert dropped == keys[4:]
    for left in range(3, -1, -1):
        residency.prune(DISK, left, 100.0)
        assert [entry.depth for entry in residency.disk.entries()] == list(range(left))


def test_a_drop_never_follows_the_write_of_the_same_block() -> None:
    """Evicted and written again within one event: the drop leaves first, or in the same transaction before it."""
    residency = residency_of(ResidencyConfig(disk_blocks=2, transaction_blocks=2))
    residency.tier_up(TierUp(DISK, ()), 0.0)
    first, second = Holder(residency, chain(0, 2)), Holder(residency, chain(1, 2))
    for holder in (first, second, first, second):
        residency.save(holder.places(), 0.0)
        for told in residency.take(0.0):
            assert not isinstance(told, Drop), "a drop goes with the write that needs its room"
            written = {place.key for place in told.targets}
            assert not written & set(told.drops)
            residency.copied(CopyDone(told.id), 0.0)
    assert DEVICE not in {entry.tier for entry in residency.disk.entries()}
    assert len(residency.disk) == 2


def test_blocks_that_are_not_saved_are_told_once_by_the_replica_that_lost_them_or_by_one_for_all() -> None:
    """One of three is too much on its way down from the first replica's device; the disk is full for the others."""
    config = ResidencyConfig(host_blocks=8, disk_blocks=8, spilling_blocks=2)
    below = Below(config, EVICTIONS["lru"], PLACEMENTS["write_through"])
    first, second = (Residency(DevicePool(8), below, replica) for replica in range(2))
    first.tier_up(TierUp(DISK, ()), 0.0)
    assert first.save(Holder(first, chain(0, 3)).places(), 0.0) == 2
    (down,) = first.take(0.0)
    assert isinstance(down, Copy)
    first.copied(CopyDone(down.id), 1.0)
    (write,) = first.take(1.0)
    assert isinstance(write, Copy)
    first.copied(CopyDone(write.id, ((0, Loss.FULL), (1, Loss.FULL))), 2.0)
    assert [each.take_dropped() for each in (second, first, second, first)] == [2, 1, 0, 0]
