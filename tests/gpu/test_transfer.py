"""The device tier of a card: bytes both ways, from pinned and pageable memory, and through the store's own copies.

How fast it is: `python -m bench.transfers`. Not yet run on a card.
"""

import time
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone
from kvstore.cuda import CudaTier
from kvstore.memory import MemoryTier, host_tier
from kvstore.transfer import Task, Transfers
from tests.kvstore.conformance import places
from tests.kvstore.memory_tier import MemoryRecords

pytestmark = pytest.mark.gpu

BLOCKS = 16
SHAPE = (BLOCKS, 4, 2, 2, 16, 64)  # [blocks, layers, 2, kv_heads, block, head_dim]
WAIT = 30.0


@pytest.fixture
def pool(card: torch.device) -> Tensor:
    """Random bits, as bfloat16 would not compare."""
    bits = torch.randint(
        -(2**15), 2**15, SHAPE, dtype=torch.int16, generator=torch.Generator().manual_seed(1)
    )
    return bits.to(card).view(torch.bfloat16)


@pytest.fixture(params=[True, False], ids=["pinned", "pageable"])
def host(request: pytest.FixtureRequest, pool: Tensor) -> Iterator[MemoryTier]:
    tier = host_tier(BLOCKS, CudaTier(pool).block_bytes, pinned=request.param)
    assert torch.from_numpy(tier.buffer(1)).is_pinned() == request.param, tier.notice
    yield tier
    tier.close()


def bytes_of(pool: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """[blocks, block_bytes], on the host."""
    return pool.view(torch.uint8).view(BLOCKS, -1).cpu().numpy()


def test_a_read_brings_the_blocks_and_no_others(pool: Tensor, host: MemoryTier) -> None:
    assert CudaTier(pool).read(places([5, 0, 15]), [host.buffer(slot) for slot in (1, 2, 3)]) == [None] * 3
    expected = bytes_of(pool)
    for slot, block in ((1, 5), (2, 0), (3, 15)):
        assert np.array_equal(host.buffer(slot), expected[block])
    assert not any(host.buffer(slot).any() for slot in range(BLOCKS) if slot not in (1, 2, 3))


def test_a_write_changes_the_blocks_and_no_others(pool: Tensor, host: MemoryTier) -> None:
    before = bytes_of(pool).copy()
    for slot in (1, 2, 3):
        host.buffer(slot)[:] = slot
    assert CudaTier(pool).write(places([5, 0, 15]), [host.buffer(slot) for slot in (1, 2, 3)]) == [None] * 3
    after = bytes_of(pool)
    for slot, block in ((1, 5), (2, 0), (3, 15)):
        assert (after[block] == slot).all()
    untouched = [block for block in range(BLOCKS) if block not in (5, 0, 15)]
    assert np.array_equal(after[untouched], before[untouched])


def test_a_pool_made_for_inference_can_be_written(card: torch.device) -> None:
    """The runner's is: torch forbids some changes of such tensors elsewhere."""
    with torch.inference_mode():
        pool = torch.zeros(SHAPE, dtype=torch.bfloat16, device=card)
    tier = CudaTier(pool)
    tier.write(places([3]), [np.full(tier.block_bytes, 7, np.uint8)])
    assert (bytes_of(pool)[3] == 7).all()


def test_blocks_make_the_round_through_host_and_records(pool: Tensor, host: MemoryTier) -> None:
    """Device → host → device, and device → records → device through the bounce: each time to other slots."""
    expected, done = bytes_of(pool).copy(), SimpleQueue[CopyDone]()
    errors: list[Exception] = []

    def report(told: Sequence[tuple[Task, CopyDone]]) -> None:
        for _, end in told:
            done.put(end)

    transfers = Transfers(
        {DEVICE: CudaTier(pool), HOST: host},
        report,
        lambda copy, error: errors.append(error),
    )
    transfers.put_tier(DISK, MemoryRecords(DISK, host.block_bytes))
    for id, (below, first) in enumerate(((HOST, 0), (DISK, 8))):
        here, there = places(range(first, first + 4)), places(range(first + 4, first + 8))
        transfers.submit(Copy(2 * id, DEVICE, below, tuple(here), tuple(here)))
        assert done.get(timeout=WAIT).lost == ()
        transfers.submit(Copy(2 * id + 1, below, DEVICE, tuple(here), tuple(there)))
        assert done.get(timeout=WAIT).lost == ()
    assert transfers.close(time.monotonic() + WAIT)
    assert not errors
    after = bytes_of(pool)
    for first in (0, 8):
        assert np.array_equal(after[first : first + 4], expected[first : first + 4])
        assert np.array_equal(after[first + 4 : first + 8], expected[first : first + 4])
