"""The conformance suite on each tier, and what is particular to tiers that are memory. The disk's own: test_disk.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import memory
from kvstore.copies import DEVICE, DISK, HOST
from kvstore.memory import MemoryTier, fitting_blocks, host_tier, pool_tier
from kvstore.tier import Tier, TierUnusable
from tests.kvstore.conformance import BLOCKS, MemoryConformance, RecordConformance, place
from tests.kvstore.disk_rig import block_of, open_tier
from tests.kvstore.memory_tier import MemoryRecords


class TestHost(MemoryConformance):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = host_tier(BLOCKS, 4096, pinned=False)
        yield tier
        tier.close()


class TestPool(MemoryConformance):
    """The pool of a runner on the CPU: [blocks, layers, 2, kv_heads, block, head_dim]."""

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = pool_tier(torch.zeros(BLOCKS, 3, 2, 2, 16, 8, dtype=torch.bfloat16))
        yield tier
        tier.close()


class TestRecords(RecordConformance):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = MemoryRecords("memory", 4096)
        yield tier
        tier.close()


class TestDisk(RecordConformance):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = open_tier(tmp_path, quota_bytes=14 * 2**20)
        yield tier
        tier.close()


def test_the_pool_tier_is_the_pool() -> None:
    pool = torch.arange(4 * 2 * 8, dtype=torch.float32).view(4, 2, 8)
    tier = pool_tier(pool)
    assert (tier.name, tier.block_bytes) == (DEVICE, 64)
    assert tier.buffer(2).tobytes() == pool[2].numpy().tobytes()
    pool[2] = 7
    assert tier.buffer(2).tobytes() == pool[2].numpy().tobytes()


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 4096, 49_153])
def test_a_copy_between_memories_touches_its_slots_alone(block_bytes: int) -> None:
    """Slots in any order, of any size."""
    host, device = (
        host_tier(8, block_bytes, pinned=False),
        MemoryTier(DEVICE, np.zeros((6, block_bytes), np.uint8)),
    )
    for slot in range(8):
        host.buffer(slot)[:] = block_of(slot, block_bytes) | 1
    host.copy_to(device, [place(7), place(0), place(3)], [place(1), place(5), place(2)])
    for source, target in ((7, 1), (0, 5), (3, 2)):
        assert np.array_equal(device.buffer(target), host.buffer(source))
    assert not any(device.buffer(slot).any() for slot in (0, 3, 4))


@pytest.mark.parametrize(("source", "target"), [(8, 0), (0, 6), (-1, 0), (0, -1)])
def test_a_slot_that_is_not_there_is_our_bug(source: int, target: int) -> None:
    host, device = (MemoryTier(name, np.zeros((n, 16), np.uint8)) for name, n in ((HOST, 8), (DEVICE, 6)))
    with pytest.raises(AssertionError, match="no such slot"):
        host.copy_to(device, [place(source)], [place(target)])


def test_warming_up_compiles_what_copies() -> None:
    memory.warm_up()
    compiled: Any = memory._copy_slots
    assert compiled.signatures


def test_an_arena_that_cannot_be_allocated_makes_the_tier_unusable() -> None:
    with pytest.raises(TierUnusable, match=r"kvstore\.host\.bytes: .* cannot be allocated .*; lower it"):
        host_tier(2**40, 2**20, pinned=False)


class FakeCuda:
    """The part of CUDA's runtime that pins memory."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.pinned: dict[int, int] = {}  # address -> bytes

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.status:
            self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_an_arena_that_cannot_be_pinned_is_used_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCuda(status=2))
    tier = host_tier(3, 512, pinned=True)
    assert "could not be pinned" in tier.notice
    assert "ulimit -l" in tier.notice
    tier.write([place(1)], [block_of(1, 512)])
    assert np.array_equal(tier.buffer(1), block_of(1, 512))
    tier.close()


def test_an_arena_is_pinned_in_place_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(status=0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    tier = host_tier(3, 512, pinned=True)
    assert not tier.notice
    assert cuda.pinned == {tier.buffer(0).ctypes.data: 3 * 512}
    tier.close()
    assert not cuda.pinned
    tier.close()  # nothing is unpinned twice: that would raise
    assert not cuda.pinned


def test_an_arena_that_fits_is_as_large_as_wanted() -> None:
    assert fitting_blocks(10_500, 1000, 30_000, 0.5) == (10, "")


def test_an_arena_that_does_not_fit_is_reduced_and_says_so() -> None:
    blocks, reason = fitting_blocks(20_000, 1000, 30_000, 0.5)
    assert blocks == 15
    assert (
        reason
        == "kvstore.host.bytes = 20,000 is more than 50% of the 30,000 bytes free: the host tier gets 15,000"
    )


def test_an_arena_may_be_turned_off_or_have_no_room() -> None:
    assert fitting_blocks(0, 1000, 30_000, 0.5) == (0, "")
    assert fitting_blocks(1000, 1000, 1500, 0.5)[0] == 0


def test_the_tiers_have_their_names(tmp_path: Path) -> None:
    host, disk = host_tier(1, 8, pinned=False), open_tier(tmp_path)
    assert (host.name, disk.name) == (HOST, DISK)
    disk.close()
