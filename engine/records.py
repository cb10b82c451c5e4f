"""What observers are told of the store's work: one record a copy. (Of steps: engine.py's StepRecord.)"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Loss


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """A copy that has ended."""

    source: str
    target: str
    bytes: int  # of the blocks that arrived
    seconds: float  # from the moment a thread took it up
    queued_seconds: float  # before that
    losses: Mapping[Loss, int]  # blocks that did not arrive

    @classmethod
    def of(cls, copy: Copy, done: CopyDone, block_bytes: int) -> "CopyRecord":
        losses = Counter(kind for _, kind in done.lost)
        size = (len(copy.sources) - len(done.lost)) * block_bytes
        return cls(copy.source, copy.target, size, done.seconds, done.queued_seconds, losses)

    @property
    def failed_tier(self) -> str:
        """Where losses of this copy happen: of two tiers the one farther from the device."""
        return max(self.source, self.target, key=(DEVICE, HOST, DISK).index)
