"""Tiers that are memory the CPU can address: the host arena, and the device's pool where the device is a CPU.

A slot's bytes are lent, not copied: a transfer is one tier reading into, or writing from, the other's slots.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.block import Key
from kvstore.copies import DEVICE, HOST, Loss, Place
from kvstore.native import compiled, memcpy
from kvstore.tier import Buffer, TierStats, TierUnusable


class MemoryTier:
    """Slots 0 … n - 1 over `blocks`, [n, block_bytes] of uint8, which stays the caller's."""

    def __init__(self, name: str, blocks: NDArray[np.uint8]) -> None:
        assert blocks.ndim == 2
        assert blocks.flags.c_contiguous
        self.name = name
        self.block_bytes = int(blocks.shape[1])
        self.notice = ""
        self._blocks = blocks
        self._release: Callable[[], None] = _nothing

    def buffer(self, slot: int) -> Buffer:
        lent: Buffer = self._blocks[slot]
        return lent

    def copy_to(self, target: "MemoryTier", sources: Sequence[Place], targets: Sequence[Place]) -> None:
        """Copies between two memories, in one call that never holds the interpreter's lock."""
        assert self.block_bytes == target.block_bytes
        copied = _copy_slots(self._blocks, _slots(sources), target._blocks, _slots(targets))
        assert copied, "no such slot"

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        for place, buffer in zip(places, into, strict=True):
            np.copyto(buffer, self._blocks[place.slot])  # lets go of the interpreter's lock
        return [None] * len(places)

    def write(
        self, places: Sequence[Place], data: Sequence[Buffer], drops: Sequence[Key] = ()
    ) -> list[Loss | None]:
        assert not drops, "who goes by slots is told nothing of keys"
        for place, buffer in zip(places, data, strict=True):
            np.copyto(self._blocks[place.slot], buffer)
        return [None] * len(places)

    def drop(self, keys: Sequence[Key]) -> None:
        """Nothing: a slot is free when the residency says so."""

    def stats(self) -> TierStats:
        """All of it: the memory is taken from the start, whichever slots have been written."""
        return TierStats(self._blocks.nbytes, self._blocks.nbytes, len(self._blocks))

    def close(self) -> None:
        """Unpins what was pinned; the memory itself goes with its last user. Another `close` is none."""
        self._release()
        self._release = _nothing


def _nothing() -> None:
    pass


def _slots(places: Sequence[Place]) -> NDArray[np.int64]:
    return np.array([place.slot for place in places], dtype=np.int64)


@compiled
def _copy_slots(
    source: NDArray[np.uint8], those: NDArray[np.int64], target: NDArray[np.uint8], there: NDArray[np.int64]
) -> bool:
    """False, and nothing is copied: a slot is in none of them, which memcpy would not notice."""
    size = source.shape[1]
    for index in range(len(those)):
        if not (0 <= those[index] < len(source) and 0 <= there[index] < len(target)):
            return False
    for index in range(len(those)):
        memcpy(target.ctypes.data + there[index] * size, source.ctypes.data + those[index] * size, size)
    return True


def warm_up() -> None:
    """Compiles what the first copy would wait for, or loads it from the cache."""
    blocks, slots = np.zeros((1, 8), dtype=np.uint8), np.zeros(1, dtype=np.int64)
    _copy_slots(blocks, slots, blocks.copy(), slots)


def pool_tier(pool: Tensor) -> MemoryTier:
    """The device tier of a pool [blocks, …] in the CPU's memory (engine/runner.py). Nothing is copied."""
    assert pool.device.type == "cpu"
    return MemoryTier(DEVICE, pool.view(torch.uint8).view(len(pool), -1).numpy())


def host_tier(blocks: int, block_bytes: int, *, pinned: bool) -> MemoryTier:
    """An arena of `blocks` slots, touched so that the memory is really there, and pinned for a CUDA device.

    Where it cannot be pinned it is pageable, and its `notice` says so. What copies between memories is compiled then.
    Raises TierUnusable: it cannot be allocated.
    """
    try:
        arena = torch.empty((blocks, block_bytes), dtype=torch.uint8).fill_(0)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        wanted = f"kvstore.host.bytes: {blocks * block_bytes:,} bytes cannot be allocated"
        raise TierUnusable(f"{wanted} ({reason}); lower it") from error
    warm_up()
    tier = MemoryTier(HOST, arena.numpy())
    if pinned:
        _pin(tier, arena)
    return tier


def _pin(tier: MemoryTier, arena: Tensor) -> None:
    """In place: torch's own pinned memory would be a second arena, its size rounded up to a power of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's omission
    if status := int(runtime.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0)):
        tier.notice = (
            f"the host tier could not be pinned, so copies are slower: CUDA error {status} (see ulimit -l)"
        )
        _forget_cuda_error()
    else:
        tier._release = lambda: _unpin(runtime, arena)


def _unpin(runtime: Any, arena: Tensor) -> None:
    runtime.cudaHostUnregister(arena.data_ptr())


def _forget_cuda_error() -> None:
    """The runtime keeps a failed call's error for the next launch to stumble over: here is one that may."""
    with suppress(RuntimeError, AssertionError):  # the latter from a torch without CUDA
        torch.zeros(1, device="cuda")


def fitting_blocks(wanted_bytes: int, block_bytes: int, free_bytes: int, share: float) -> tuple[int, str]:
    """Blocks of an arena of `wanted_bytes`, at most `share` of what is free; why it is fewer, or ""."""
    allowed = min(wanted_bytes, int(free_bytes * share))
    if allowed == wanted_bytes:
        return wanted_bytes // block_bytes, ""
    return allowed // block_bytes, (
        f"kvstore.host.bytes = {wanted_bytes:,} is more than {share:.0%} of the {free_bytes:,} bytes free: "
        f"the host tier gets {allowed:,}"
    )
