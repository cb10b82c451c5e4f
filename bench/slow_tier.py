"""A tier that takes the time it is told to: a link of so many bytes a second, which may change in mid-run.

A copy really takes that long on the thread that carries it out, as it would from a slow device: the engine measures
it, waits for it, and learns from it. The bytes are the tier's that is wrapped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.block import Key
from kvstore.copies import Loss, Place
from kvstore.tier import Buffer, Tier, TierStats


@dataclass(slots=True)
class Link:
    """May be changed at any time, from any thread: copies that begin later take the new time."""

    latency_seconds: float  # of each copy
    bytes_per_second: float
    slowdown: float = 1.0  # times all of it

    def seconds(self, size: int) -> float:
        return self.slowdown * (self.latency_seconds + size / self.bytes_per_second)


class SlowTier:
    """`tier` behind a link. It lends no slots, so every copy goes through `read` or `write`."""

    notice = ""

    def __init__(self, tier: Tier, link: Link) -> None:
        self.name, self.block_bytes = tier.name, tier.block_bytes
        self._tier, self._link = tier, link

    def buffer(self, slot: int) -> Buffer | None:
        return None

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        begun = time.perf_counter()
        losses = self._tier.read(places, into)
        self._rest(begun, len(places))
        return losses

    def write(
        self, places: Sequence[Place], data: Sequence[Buffer], drops: Sequence[Key] = ()
    ) -> list[Loss | None]:
        begun = time.perf_counter()
        losses = self._tier.write(places, data, drops)
        self._rest(begun, len(places))
        return losses

    def _rest(self, begun: float, blocks: int) -> None:
        """Of the time that the link takes, what copying has not taken."""
        left = begun + self._link.seconds(blocks * self.block_bytes) - time.perf_counter()
        time.sleep(max(0.0, left))

    def drop(self, keys: Sequence[Key]) -> None:
        self._tier.drop(keys)

    def stats(self) -> TierStats:
        return self._tier.stats()

    def close(self) -> None:
        self._tier.close()
