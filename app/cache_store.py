"""The disk store without a server, as `sluice cache` sees it. It is opened only if it is sound; nothing is moved aside.

A store in use by a server is not opened here: ask that server (app/cache_server.py).
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

from app.admin_report import summary
from kvstore.block import Key
from kvstore.copies import DISK, Place
from kvstore.disk import DiskTier


class CannotDrop(Exception):
    """Records that were to go are still there."""


class StoreCache:
    """As ServerCache, with the disk as the only tier. Raises what DiskTier.open_existing does."""

    def __init__(self, path: Path, quota_bytes: int) -> None:
        self._path = path
        self._quota_bytes = quota_bytes
        self._tier = DiskTier.open_existing(path, quota_bytes=quota_bytes)

    def stat(self) -> dict[str, Any]:
        """`capacity_*` are None where the configuration has the disk turned off."""
        tier, size = self._tier, self._tier.block_bytes
        capacity = tier.capacity_blocks if self._quota_bytes else None
        files = [file for file in self._path.iterdir() if file.is_file()]
        disk = {
            "up": False,
            "reason": "no server has it open",
            "used_blocks": tier.stats().blocks,
            "capacity_blocks": capacity,
            "used_bytes": tier.stats().blocks * size,
            "capacity_bytes": capacity and capacity * size,
            "file_bytes": sum(file.stat().st_size for file in files),
        }
        return {"path": str(self._path), "block_bytes": size, "tiers": {DISK: disk}, "copies": []}

    def verify(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Also drops what is corrupt, and what can be reached only through it."""
        found = self._tier.verify(progress)
        self._tier.drop([key for key, _ in found.lost])
        if found.lost:
            self._tier.records()  # drops orphans
        return summary(found)

    def prune(self, tier: str, size: int) -> dict[str, Any]:
        """Keeps at most `size` bytes of KV: what was written first leaves first, but children before their parents.

        Raises CannotDrop.
        """
        keep, places = size // self._tier.block_bytes, self._tier.records()
        self._tier.drop(oldest(places, max(0, len(places) - keep)))
        return self._left(len(places), keep)

    def clear(self, tier: str) -> dict[str, Any]:
        """Also forgets what a server has moved aside. Raises CannotDrop."""
        before = self._tier.stats().blocks
        self._tier.clear()
        return self._left(before, 0)

    def close(self) -> None:
        self._tier.close()

    def _left(self, before: int, wanted: int) -> dict[str, Any]:
        left = self._tier.stats().blocks
        if left > wanted:
            why = self._tier.broken or "the disk has no room for the transaction"
            raise CannotDrop(f"{left - wanted:,} blocks of {self._path} could not be dropped: {why}")
        disk = {
            "dropped_blocks": before - left,
            "used_blocks": left,
            "used_bytes": left * self._tier.block_bytes,
        }
        return {"tiers": {DISK: disk}}


def oldest(places: Sequence[Place], count: int) -> list[Key]:
    """The keys of `count` of these blocks, given oldest first: the oldest that has no child left, again and again."""
    age = {place.key: number for number, place in enumerate(places)}
    parents = {place.key: place.parent for place in places}
    children = dict.fromkeys(age, 0)
    for parent in parents.values():
        if parent in children:
            children[parent] += 1
    leaves = [(age[key], key) for key, those in children.items() if not those]
    heapify(leaves)
    chosen: list[Key] = []
    while leaves and len(chosen) < count:
        _, key = heappop(leaves)
        chosen.append(key)
        parent = parents[key]
        if parent in children:
            children[parent] -= 1
            if not children[parent]:
                heappush(leaves, (age[parent], parent))
    return chosen
