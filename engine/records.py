"""What observers are told of the store's work: one record a copy. (Of steps: engine.py's StepRecord.)"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.copies import Copy, CopyDone


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """A copy that has ended."""

    source: str
    target: str
    blocks: int  # that arrived
    seconds: float  # from the moment a thread took it up
    queued_seconds: float  # before that
    losses: Mapping[str, int]  # blocks that did not arrive, by kind

    @classmethod
    def of(cls, copy: Copy, done: CopyDone) -> "CopyRecord":
        losses = Counter(kind.value for _, kind in done.lost)
        blocks = len(copy.sources) - len(done.lost)
        return cls(copy.source, copy.target, blocks, done.seconds, done.queued_seconds, losses)
