"""When a sequence's KV is saved below the device, and which blocks of it: write-behind; a preemption then owes little.

Ahead of it, too: those who are likely to be preempted next have their full blocks saved while they still run, so that
their device blocks are free at once. Not their tails: a tail is another one at the next token.

Where it goes, and whether there is room, is the residency's; these are only offers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.sequence import Sequence
from engine.snapshot import Snapshot
from kvstore.copies import Place
from kvstore.residency import Residency

MOST_BEHIND_SECONDS = 0.1
"""Blocks on their way down are held on the device: nothing is saved ahead of need behind more than that."""


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    every_tokens: int = 128  # in full blocks not saved yet
    every_seconds: float = 5.0
    ahead_steps: int = (
        0  # growth that is foreseen so far: who would give way to it is saved ahead; 0: nobody is
    )


class Checkpoints:
    """`behind_seconds`: until what is on its way down now is there."""

    def __init__(
        self,
        residency: Residency,
        block_size: int,
        config: CheckpointConfig,
        behind_seconds: Callable[[], float],
    ) -> None:
        self._residency = residency
        self._behind_seconds = behind_seconds
        self._block_size = block_size
        self._config = config
        self._every_blocks = -(-config.every_tokens // block_size)

    def grown(self, sequence: Sequence, now: float) -> None:
        """It has new full blocks: saves them when there are enough, or it is long ago."""
        owed = sequence.published - sequence.saved
        if owed >= self._every_blocks or now - sequence.saved_at >= self._config.every_seconds:
            self.save(sequence, now)

    def ahead(self, sequence: Sequence, now: float) -> int:
        """Saves the full blocks of one who is likely to be preempted, if it owes some. Returns how many.

        Only where the share of a tier that snapshots may hold has room for all of it, and with half of the copies that
        may be on their way left to those who cannot wait.
        """
        owed = sequence.published - sequence.saved
        room = self._residency.spilling_room - self._residency.config.spilling_blocks // 2
        if not 0 < owed <= room or self._residency.survival(sequence.published) < 1.0:
            return 0
        before = sequence.saved
        self.save(sequence, now)
        return sequence.saved - before

    def save(self, sequence: Sequence, now: float) -> None:
        """Offers the full blocks that have not been offered yet, if the way down is clear."""
        if self._residency.keeps and self._behind_seconds() <= MOST_BEHIND_SECONDS:
            chain = list(self._full_blocks(sequence, sequence.saved))
            sequence.saved += self._residency.save(chain, now)
            sequence.saved_at = now

    def save_all(self, sequence: Sequence, now: float) -> None:
        """Offers all full blocks again: one that was saved may have been evicted since."""
        self._residency.save(self._full_blocks(sequence, 0), now)

    def save_snapshot(self, sequence: Sequence, snapshot: Snapshot, now: float) -> None:
        """Offers all that the snapshot needs, its tail too; what is safe already is only marked as used."""
        chain = list(self._full_blocks(sequence, 0))
        if (tail := snapshot.tail) and len(chain) == len(snapshot.keys):
            parent = snapshot.keys[-1] if snapshot.keys else b""
            place = Place(tail.key, -1, parent, len(chain), tail.tokens)
            chain.append((sequence.table[len(chain)], place))
        self._residency.save(chain, now)

    def _full_blocks(self, sequence: Sequence, start: int) -> Iterator[tuple[int, Place]]:
        """The published blocks from `start` on, with their device blocks."""
        keys = sequence.keys
        for index in range(start, sequence.published):
            parent = keys[index - 1] if index else b""
            yield sequence.table[index], Place(keys[index], -1, parent, index, self._block_size)
