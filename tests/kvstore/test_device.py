"""The device pool's books, driven as a state machine against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.block import block_key, root_key
from kvstore.device import DevicePool


def chain(*tokens: int) -> list[bytes]:
    keys = [root_key("", "")]
    for token in tokens:
        keys.append(block_key(keys[-1], [token]))
    return keys[1:]


def publish(pool: DevicePool, table: list[int], keys: list[bytes], found: int = 0) -> None:
    """All from `found` on."""
    for index in range(found, len(keys)):
        table[index] = pool.publish(table[index], keys[index], keys[index - 1] if index else b"")


def cached(pool: DevicePool, keys: list[bytes]) -> list[int]:
    table = pool.allocate(len(keys))
    publish(pool, table, keys)
    return table


def test_released_blocks_are_found_again_until_their_room_is_needed() -> None:
    pool = DevicePool(4)
    keys = chain(1, 2, 3)
    table = cached(pool, keys)
    pool.release(table)
    assert pool.match(keys) == table
    pool.release(pool.allocate(2))  # the free one, and the tail of the chain
    assert pool.match(keys) == table[:2]
    pool.check([])


def test_a_parent_never_leaves_before_its_child() -> None:
    pool = DevicePool(3)
    keys = chain(1, 2, 3)
    table = cached(pool, keys)
    pool.hold(table[:1])
    pool.release(table)
    pool.release(table[:1])
    for left in (2, 1, 0):
        pool.allocate(1)
        assert len(pool.match(keys)) == left


def test_what_is_cached_elsewhere_gives_way_first_but_not_what_others_share() -> None:
    pool = DevicePool(6)
    stays, goes = chain(1, 2, 3), chain(1, 2, 4, 5)
    first = cached(pool, stays)
    pool.release(first)
    held = pool.match(goes)
    pool.hold(held)
    table = held + pool.allocate(2)
    publish(pool, table, goes, found=2)
    pool.release(table)
    pool.demote(table)
    pool.allocate(3)  # one was free
    assert pool.match(goes) == first[:2]
    assert pool.match(stays) == first


def test_what_somebody_holds_is_not_the_first_to_give_way() -> None:
    pool = DevicePool(4)
    keys = chain(1, 2, 3)
    table = cached(pool, keys)
    pool.hold(table[:2])
    pool.release(table)
    pool.demote(table)
    pool.release(table[:2])
    pool.release(cached(pool, chain(7)))
    assert pool.match(keys) == table
    pool.allocate(1)
    assert pool.match(keys) == table[:2]


def test_a_block_with_a_known_key_gives_way() -> None:
    pool = DevicePool(2)
    (first,), (second,) = pool.allocate(1), pool.allocate(1)
    (key,) = chain(1)
    assert pool.publish(first, key, b"") == first
    assert pool.publish(second, key, b"") == first
    pool.check([[first], [first]])
    assert pool.available == 1


def test_asking_for_more_than_there_is_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="3 blocks asked, 2 available"):
        DevicePool(2).allocate(3)


def test_a_double_release_is_a_bug() -> None:
    pool = DevicePool(2)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(table)


class Pool(RuleBasedStateMachine):
    """Tables grow block by block along a small tree of tokens, and are released; the books always balance."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = DevicePool(12)
        self.tables: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def start(self, tokens: list[int]) -> None:
        keys = chain(*tokens)
        table = self.pool.match(keys)
        self.pool.hold(table)
        missing = len(tokens) - len(table)
        if missing > self.pool.available:
            self.pool.release(table)
            return
        found = len(table)
        table += self.pool.allocate(missing)
        publish(self.pool, table, keys, found)
        self.tables.append((tokens, table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), elsewhere=st.booleans())
    def end(self, data: st.DataObject, elsewhere: bool) -> None:
        _, table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        if elsewhere:
            self.pool.demote(table)

    @rule()
    def forget(self) -> None:
        self.pool.clear_cache()
        assert self.pool.cached == len({block for _, table in self.tables for block in table})

    @invariant()
    def the_books_balance(self) -> None:
        self.pool.check([table for _, table in self.tables])
        for tokens, table in self.tables:
            assert self.pool.match(chain(*tokens)) == table


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
