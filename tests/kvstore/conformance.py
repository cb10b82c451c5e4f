"""What every tier must do (kvstore/tier.py), whatever it is made of. test_tiers.py runs it on each of ours.

A subclass has a fixture `tier`: an open one of at least BLOCKS blocks, which holds nothing and is closed afterwards.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from kvstore.copies import Loss, Place
from kvstore.tier import Buffer, Tier
from tests.kvstore.disk_rig import block_of, key_of

BLOCKS = 24
THREADS = 4
ROUNDS = 5
GUARD = 64
"""Bytes on either side of a buffer that nobody may touch."""


def place(number: int) -> Place:
    """In the slot and under the key of the same number: a tier looks at one of them."""
    return Place(key_of(number), slot=number, depth=number, tokens=16)


def places(numbers: Sequence[int]) -> list[Place]:
    return [place(number) for number in numbers]


def blocks(tier: Tier, numbers: Sequence[int]) -> list[Buffer]:
    return [block_of(number, tier.block_bytes) for number in numbers]


def write(tier: Tier, numbers: Sequence[int], drops: Sequence[int] = ()) -> list[Loss | None]:
    return tier.write(places(numbers), blocks(tier, numbers), [key_of(number) for number in drops])


def read(tier: Tier, numbers: Sequence[int]) -> tuple[list[Loss | None], list[Buffer]]:
    """Into buffers that stand in a larger memory, of which nothing else may change."""
    size = tier.block_bytes + 2 * GUARD
    memory = np.full(len(numbers) * size, 0xA5, np.uint8)
    rows = memory.reshape(len(numbers), size)
    into = [row[GUARD:-GUARD] for row in rows]
    losses = tier.read(places(numbers), into)
    assert (rows[:, :GUARD] == 0xA5).all()
    assert (rows[:, -GUARD:] == 0xA5).all()
    return losses, into


def holds(tier: Tier, numbers: Sequence[int]) -> bool:
    """Whether all of these are read, and right."""
    losses, found = read(tier, numbers)
    pairs = zip(found, blocks(tier, numbers), strict=True)
    return not any(losses) and all(np.array_equal(ours, wanted) for ours, wanted in pairs)


class Conformance:
    """Of all tiers."""

    def test_reads_what_was_written(self, tier: Tier) -> None:
        assert write(tier, [3, 1, 2]) == [None] * 3
        assert holds(tier, [1, 2, 3])
        assert holds(tier, [2])

    def test_a_write_changes_no_other_block(self, tier: Tier) -> None:
        write(tier, [0, 1, 2, 3])
        new = block_of(100, tier.block_bytes)
        assert tier.write([place(1)], [new]) == [None]
        assert holds(tier, [0, 2, 3])

    def test_the_last_write_of_a_block_counts(self, tier: Tier) -> None:
        write(tier, [7])
        old, new = block_of(7, tier.block_bytes), block_of(8, tier.block_bytes)
        assert tier.write([place(7)], [new]) == [None]
        _, [found] = read(tier, [7])
        assert np.array_equal(found, new)
        assert not np.array_equal(found, old)

    def test_what_was_written_is_a_copy(self, tier: Tier) -> None:
        data = block_of(5, tier.block_bytes).copy()
        tier.write([place(5)], [data])
        data[:] = 0
        assert holds(tier, [5])

    def test_nothing_is_a_copy_too(self, tier: Tier) -> None:
        assert tier.write([], []) == []
        assert tier.read([], []) == []

    def test_dropping_what_is_not_there_is_nothing(self, tier: Tier) -> None:
        write(tier, [1])
        tier.drop([key_of(9)])
        assert holds(tier, [1])

    def test_different_blocks_may_be_written_and_read_at_once(self, tier: Tier) -> None:
        """Each thread has blocks of its own, written over and over and read in between."""
        together = Barrier(THREADS)

        def work(number: int) -> bool:
            mine = range(number * 4, number * 4 + 4)
            together.wait(10)
            right = True
            for round_ in range(ROUNDS):
                data = [block_of(1000 * round_ + n, tier.block_bytes) for n in mine]
                right &= tier.write(places(mine), data) == [None] * 4
                losses, found = read(tier, mine)
                right &= not any(losses) and all(map(np.array_equal, found, data))
            return right

        with ThreadPoolExecutor(THREADS) as threads:
            assert all(threads.map(work, range(THREADS)))

    def test_used_is_within_capacity(self, tier: Tier) -> None:
        for numbers in ([], [0, 1], range(BLOCKS // 2)):
            write(tier, numbers)
            stats = tier.stats()
            assert len(numbers) <= stats.blocks
            assert len(numbers) * tier.block_bytes <= stats.used_bytes <= stats.capacity_bytes


class MemoryConformance(Conformance):
    """Of tiers that lend their slots."""

    def test_the_slots_are_lent_not_copied(self, tier: Tier) -> None:
        write(tier, [4])
        lent = tier.buffer(4)
        assert lent is not None
        assert np.array_equal(lent, block_of(4, tier.block_bytes))
        lent[:] = block_of(5, tier.block_bytes)
        _, [found] = read(tier, [4])
        assert np.array_equal(found, block_of(5, tier.block_bytes))


class RecordConformance(Conformance):
    """Of tiers that go by keys."""

    def test_it_lends_nothing(self, tier: Tier) -> None:
        assert tier.buffer(0) is None

    def test_what_was_never_written_is_missing_and_the_rest_is_read(self, tier: Tier) -> None:
        write(tier, [1, 3])
        losses, found = read(tier, [1, 2, 3])
        assert losses == [None, Loss.MISSING, None]
        assert np.array_equal(found[2], block_of(3, tier.block_bytes))

    def test_what_was_dropped_is_missing(self, tier: Tier) -> None:
        write(tier, [1, 2, 3])
        tier.drop([key_of(1), key_of(3)])
        assert read(tier, [1, 2, 3])[0] == [Loss.MISSING, None, Loss.MISSING]
        assert tier.stats().blocks == 1

    def test_a_write_drops_as_well(self, tier: Tier) -> None:
        write(tier, [1, 2])
        assert write(tier, [3], drops=[1]) == [None]
        assert read(tier, [1])[0] == [Loss.MISSING]
        assert holds(tier, [2, 3])

    def test_what_was_dropped_can_be_written_again(self, tier: Tier) -> None:
        write(tier, [1])
        tier.drop([key_of(1)])
        write(tier, [1])
        assert holds(tier, [1])

    def test_too_much_is_refused_and_takes_nothing_away(self, tier: Tier) -> None:
        most = tier.stats().capacity_bytes // (tier.stats().used_bytes or tier.block_bytes)
        answers: list[Loss | None] = []
        for number in range(2 * most):
            answers += write(tier, [number])
        refused = answers.index(Loss.FULL)
        assert set(answers[refused:]) == {Loss.FULL}
        assert tier.stats().used_bytes <= tier.stats().capacity_bytes
        assert all(holds(tier, [number]) for number in range(refused))
