"""The smallest tier of records: a dict. It proves that the protocol needs no more."""

from collections.abc import Sequence

import numpy as np

from kvstore.block import Key
from kvstore.copies import Loss, Place
from kvstore.tier import Buffer, TierStats


class MemoryRecords:
    def __init__(self, name: str, block_bytes: int, capacity: int = 64) -> None:
        self.name, self.block_bytes = name, block_bytes
        self._capacity = capacity
        self._records: dict[Key, Buffer] = {}

    def buffer(self, slot: int) -> Buffer | None:
        return None

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        found = [self._records.get(place.key) for place in places]
        for buffer, record in zip(into, found, strict=True):
            if record is not None:
                np.copyto(buffer, record)
        return [Loss.MISSING if record is None else None for record in found]

    def write(
        self, places: Sequence[Place], data: Sequence[Buffer], drops: Sequence[Key] = ()
    ) -> list[Loss | None]:
        self.drop(drops)
        if len(self._records.keys() | {place.key for place in places}) > self._capacity:
            return [Loss.FULL] * len(places)
        self._records |= {place.key: buffer.copy() for place, buffer in zip(places, data, strict=True)}
        return [None] * len(places)

    def drop(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._records.pop(key, None)

    def stats(self) -> TierStats:
        blocks, size = len(self._records), self.block_bytes
        return TierStats(blocks * size, self._capacity * size, blocks)

    def close(self) -> None: ...
