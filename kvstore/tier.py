"""The protocol of a tier: a place that keeps blocks' bytes. Conformance: tests/kvstore/conformance.py.

A tier moves bytes and knows nothing of why. Which slot holds which block, who may be evicted, what is being copied:
that is residency.py and its parts, which alone decide. So a tier is never asked to read what it was not given, but it
must survive it: records vanish, disks fill, bits flip. It answers with a Loss, and never with wrong bytes.

Tiers that are memory (device on a CPU, host) lend their slots as buffers, and a copy is then one tier reading into, or
writing from, the other's buffer. Tiers that are not (disk, remote, a CUDA device) are copied through them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.block import Key
from kvstore.copies import Loss, Place

Buffer = NDArray[np.uint8]
"""The bytes of one block: contiguous, [block_bytes]."""


@dataclass(frozen=True, slots=True)
class TierStats:
    used_bytes: int
    capacity_bytes: int
    blocks: int  # records; of memory, which is taken from the start, all slots


class Tier(Protocol):
    """All methods but `buffer` and `stats` may block: they are called on transfer threads only.

    `read` and `write` may be called at the same time from several threads, never for the same block.
    """

    @property
    def name(self) -> str: ...

    @property
    def block_bytes(self) -> int: ...

    def buffer(self, slot: int) -> Buffer | None:
        """The slot itself, where it is memory that the CPU can address; else None. Not a copy."""

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        """Copies blocks out. One entry a place: None, or why its buffer's content must not be used."""

    def write(
        self, places: Sequence[Place], data: Sequence[Buffer], drops: Sequence[Key] = ()
    ) -> list[Loss | None]:
        """Copies blocks in, and forgets `drops`, all in one transaction where the tier has such. As `read`."""

    def drop(self, keys: Sequence[Key]) -> None:
        """Forgets records; unknown keys are none."""

    def stats(self) -> TierStats:
        """Now, from any thread, at once."""

    def close(self) -> None:
        """Releases files and memory. Nothing may be called after it."""


class TierUnusable(Exception):
    """The tier cannot be opened; the message says why and what to do. The server goes on without it."""
