"""What the core and the store say to each other: copies and drops go out, their outcomes come back. Plain data.

The core decides which block goes where and owns the slots (residency.py); the store moves bytes (store.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from kvstore.block import Key

DEVICE = "device"
HOST = "host"
DISK = "disk"


class Loss(StrEnum):
    """Why a block did not arrive. The answer stays right: what is lost is computed again."""

    MISSING = "missing"  # the source has no such record
    CORRUPT = "corrupt"  # its checksum, size, key or fingerprint is not what it should be
    IO = "io"  # the system refused
    FULL = "full"  # no room: the quota, or the file system under it
    DOWN = "down"  # the tier is not in use just now


@dataclass(slots=True)
class Place:
    """A block, and where it is or is to be. Tiers that are memory go by `slot`, the others by `key`.

    Nobody changes one. It is not frozen as three are made for every block that is copied, and a frozen one takes three
    times as long to make.
    """

    key: Key
    slot: int = -1  # of a tier that is memory; -1 elsewhere
    parent: Key = (
        b""  # what the tier keeps for a restart: the key before it in its chain (b"": it is the first) …
    )
    depth: int = 0  # … how many blocks stand before it …
    tokens: int = 0  # … and how many of its positions are computed: block_size, or less for a snapshot's tail


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy blocks from one tier to another; `sources[i]` to `targets[i]`, the same block.

    `drops` leave the target before it, in the same transaction: the target's quota never sees both. Until its CopyDone
    the core keeps the slots at both ends for this copy alone. A copy that writes the device waits for the end of
    step `after`, which may still write there (0: none does). `replica`: whose device, and whose step.
    """

    id: int
    source: str
    target: str
    sources: tuple[Place, ...]
    targets: tuple[Place, ...]
    drops: tuple[Key, ...] = ()
    after: int = 0
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget these records of a tier that is not memory. No answer comes: nobody relies on it."""

    tier: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class CopyDone:
    """A copy has ended, and touches no slot any more. `lost`: (index into its blocks, why) of those that failed."""

    id: int
    lost: tuple[tuple[int, Loss], ...] = ()
    seconds: float = 0.0  # from the moment a thread took it up
    queued_seconds: float = 0.0  # from submission until then


@dataclass(frozen=True, slots=True)
class TierDown:
    """A tier is out of use. Copies under way still end with a CopyDone, however late."""

    tier: str
    reason: str


@dataclass(frozen=True, slots=True)
class TierUp:
    """A tier is in use (again), holding just these records, parents before children.

    Many come in parts, so that no event takes long: nothing is in use, nor known, before the one without `more`.
    """

    tier: str
    records: tuple[Place, ...]
    capacity_blocks: int | None = None  # None: as configured
    transaction_blocks: int | None = None  # most of one write; None: as configured
    more: bool = False

    def parts(self, most: int) -> Iterator["TierUp"]:
        """The same news in events of at most so many records, one at least; the last one ends it."""
        for start in range(0, max(1, len(self.records)), most):
            end = start + most
            yield replace(self, records=self.records[start:end], more=end < len(self.records))
