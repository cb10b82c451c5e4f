"""Tiers that are memory the CPU can address: the host arena, and the device's pool where the device is a CPU.

A slot's bytes are lent, not copied: a transfer is one tier reading into, or writing from, the other's slots.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from kvstore.block import Key
from kvstore.copies import DEVICE, HOST, Loss, Place
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
        self._written: set[int] = set()

    def buffer(self, slot: int) -> Buffer:
        lent: Buffer = self._blocks[slot]
        return lent

    def copy_to(self, target: "MemoryTier", sources: Sequence[Place], targets: Sequence[Place]) -> None:
        """Copies between two memories, in one call that never holds the interpreter's lock."""
        slots = np.array([[place.slot for place in places] for places in (sources, targets)], dtype=np.int64)
        _copy_slots(self._blocks, slots[0], target._blocks, slots[1])
        target._written.update(place.slot for place in targets)

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
        self._written.update(place.slot for place in places)
        return [None] * len(places)

    def drop(self, keys: Sequence[Key]) -> None:
        """Nothing: a slot is free when the residency says so."""

    def stats(self) -> TierStats:
        """Slots that were written once count as used: the memory is taken from the start anyway."""
        used = len(self._written)
        return TierStats(used * self.block_bytes, self._blocks.nbytes, used)

    def close(self) -> None:
        """Nothing to release: the arena goes with its last user."""


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy_slots(
    source: NDArray[np.uint8], those: NDArray[np.int64], target: NDArray[np.uint8], there: NDArray[np.int64]
) -> None:
    for index in range(len(those)):
        target[there[index]] = source[those[index]]


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

    Where it cannot be pinned it is pageable, and its `notice` says so. Raises TierUnusable: it cannot be allocated.
    """
    notice = ""
    try:
        arena = torch.zeros((blocks, block_bytes), dtype=torch.uint8)
        if pinned:
            arena, notice = _pinned(arena)
    except (RuntimeError, MemoryError) as error:
        wanted = blocks * block_bytes
        raise TierUnusable(
            f"kvstore.host.bytes: {wanted:,} bytes cannot be allocated ({error}); lower it"
        ) from error
    tier = MemoryTier(HOST, arena.fill_(0).numpy())
    tier.notice = notice
    return tier


def _pinned(arena: Tensor) -> tuple[Tensor, str]:
    try:
        return arena.pin_memory(), ""
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return arena, f"the host tier could not be pinned, so copies are slower: {reason} (see ulimit -l)"


def fitting_blocks(wanted_bytes: int, block_bytes: int, free_bytes: int, share: float) -> tuple[int, str]:
    """Blocks of an arena of `wanted_bytes`, at most `share` of what is free; why it is fewer, or ""."""
    allowed = min(wanted_bytes, int(free_bytes * share))
    if allowed == wanted_bytes:
        return wanted_bytes // block_bytes, ""
    return allowed // block_bytes, (
        f"kvstore.host.bytes = {wanted_bytes:,} is more than {share:.0%} of the {free_bytes:,} bytes free: "
        f"the host tier gets {allowed:,}"
    )
