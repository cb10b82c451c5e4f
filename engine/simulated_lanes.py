"""Copies in virtual time: the lanes of kvstore/transfer.py as queues of known service times. No bytes, no threads.

Lanes: of each device one into it and one down from it, between memories; of the disk one writer and some readers. A
copy never fails here, and drops cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heapreplace

from engine.profile import Profile
from kvstore.copies import DEVICE, DISK, Copy, CopyDone


@dataclass(slots=True)
class Lane:
    """When each of its threads is free; copies start in the order in which they were told."""

    free: list[float]

    def take(self, now: float, seconds: float) -> float:
        """Queues work that takes so long. Returns when it begins."""
        begins = max(now, self.free[0])
        heapreplace(self.free, begins + seconds)
        return begins


class SimulatedLanes:
    """`slowdown`: how many times what the profile says a copy takes that is told at that moment."""

    def __init__(
        self, profile: Profile, replicas: int = 1, slowdown: Callable[[float], float] | None = None
    ) -> None:
        self.copied_bytes: dict[str, int] = {}  # by route
        self._profile = profile
        self._slowdown = slowdown
        self._up, self._down = ([Lane([0.0]) for _ in range(replicas)] for _ in range(2))
        self._writer = Lane([0.0])
        self._readers = Lane([0.0] * profile.disk_readers)
        heapify(self._readers.free)

    def submit(self, copy: Copy, now: float) -> tuple[float, CopyDone]:
        """When it ends, and its end. Raises ProfileError where its route was not measured."""
        transfer = self._profile.transfer(copy.source, copy.target)
        size = len(copy.sources) * self._profile.block_bytes
        seconds = transfer.latency_seconds + size / transfer.bytes_per_second
        if self._slowdown:
            seconds *= self._slowdown(now)
        begins = self._lane(copy).take(now, seconds)
        route = f"{copy.source}>{copy.target}"
        self.copied_bytes[route] = self.copied_bytes.get(route, 0) + size
        return begins + seconds, CopyDone(copy.id, seconds=seconds, queued_seconds=begins - now)

    def _lane(self, copy: Copy) -> Lane:
        if copy.target == DISK:
            return self._writer
        if copy.source == DISK:
            return self._readers
        return (self._up if copy.target == DEVICE else self._down)[copy.replica]
