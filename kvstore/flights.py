"""Copies under way, and the device blocks that they hold beside the sequences. Pure.

Each has its ends here until its CopyDone: a device block by number, or an entry of a shelf. Which blocks are copied is
residency.py's; that an entry is read or written is counted in the entry itself (shelf.py).
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from kvstore.block import Key
from kvstore.copies import DEVICE, Copy, Place
from kvstore.device import DevicePool
from kvstore.shelf import Entry

End = int | Entry
"""A device block, or an entry of a shelf."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A copy under way, with its ends."""

    copy: Copy
    sources: tuple[End, ...]
    targets: tuple[End, ...]

    @property
    def ends(self) -> Iterator[End]:
        yield from self.sources
        yield from self.targets


class Flights:
    """Of one replica. `held`: device blocks that copies hold, how often. `ids`: new numbers for copies."""

    def __init__(self, pool: DevicePool, ids: Iterator[int], replica: int) -> None:
        self.held: Counter[int] = Counter()
        self.spilling = 0  # device blocks on their way down
        self._pool = pool
        self._under_way: dict[int, InFlight] = {}
        self._spills: list[tuple[int, Entry]] = []  # held already, not yet told
        self._ids = ids
        self._replica = replica

    def __len__(self) -> int:
        """Copies under way."""
        return len(self._under_way)

    def __contains__(self, copy_id: int) -> bool:
        return copy_id in self._under_way

    @property
    def quiet(self) -> bool:
        """Whether nothing is on its way, nor waits for it."""
        return not (self._under_way or self._spills)

    # --- a copy's beginning and end -------------------------------------------------------------------------------

    def hold(self, block: int) -> None:
        self._pool.hold((block,))
        self.held[block] += 1

    def let_go(self, block: int) -> None:
        self._pool.release((block,))
        self.held[block] -= 1
        if not self.held[block]:
            del self.held[block]

    def spill(self, block: int, entry: Entry) -> None:
        """Holds a device block that is to be copied into an entry: `take_spills` has it next."""
        self.hold(block)
        self.spilling += 1
        self._spills.append((block, entry))

    @property
    def untold_spills(self) -> int:
        """Device blocks that `take_spills` has next."""
        return len(self._spills)

    def take_spills(self) -> list[tuple[int, Entry]]:
        spills, self._spills = self._spills, []
        return spills

    def begin(
        self,
        source: str,
        target: str,
        pairs: Sequence[tuple[End, End]],
        *,
        drops: tuple[Key, ...] = (),
        after: int = 0,
    ) -> Copy:
        """A copy of the first of each pair to the second. The caller has marked both. `drops`, `after`: see Copy."""
        sources = tuple(_place(one, other) for one, other in pairs)
        targets = tuple(_place(other, one) for one, other in pairs)
        copy = Copy(next(self._ids), source, target, sources, targets, drops, after, self._replica)
        ends = tuple(one for one, _ in pairs), tuple(other for _, other in pairs)
        self._under_way[copy.id] = InFlight(copy, *ends)
        return copy

    def end(self, copy_id: int) -> InFlight:
        """It is under way no more. Its ends are the caller's to free."""
        flight = self._under_way.pop(copy_id)
        if flight.copy.source == DEVICE:
            self.spilling -= len(flight.sources)
        return flight

    # --- look-ups -------------------------------------------------------------------------------------------------

    def holders(self, block: int) -> int:
        """How many sequences hold a device block: copies are left out."""
        return self._pool.references(block) - self.held.get(block, 0)

    def bytes_up(self, block_bytes: int) -> dict[str, int]:
        """Bytes on their way to the device, or waiting for it, by the tier that they come from."""
        sizes: dict[str, int] = {}
        for flight in self._under_way.values():
            copy = flight.copy
            if copy.target == DEVICE:
                sizes[copy.source] = sizes.get(copy.source, 0) + len(copy.sources) * block_bytes
        return sizes

    def leaving(self, up: Collection[str]) -> int:
        """Device blocks that are free as soon as copies have ended: copies that touch only the tiers that are `up`."""
        if not self.held:
            return 0
        stuck = {
            end
            for flight in self._under_way.values()
            if not (flight.copy.source in up and flight.copy.target in up)
            for end in flight.ends
        }
        references = self._pool.references
        return sum(references(block) == count and block not in stuck for block, count in self.held.items())

    def touching(self, tier: str) -> list[int]:
        """The copies that have an end in a tier."""
        return [
            id for id, flight in self._under_way.items() if tier in (flight.copy.source, flight.copy.target)
        ]

    def touched(self, tier: str) -> list[Entry]:
        """The entries of a tier that copies touch, or are about to."""
        ends: list[End] = [end for flight in self._under_way.values() for end in flight.ends]
        ends += [entry for _, entry in self._spills]
        return [end for end in ends if isinstance(end, Entry) and end.tier == tier]

    # --- invariants -----------------------------------------------------------------------------------------------

    @property
    def reading(self) -> Counter[Entry]:
        """How many copies read each entry."""
        return Counter(
            end for flight in self._under_way.values() for end in flight.sources if isinstance(end, Entry)
        )

    @property
    def writing(self) -> Counter[Entry]:
        """How many copies, told or about to be, write each entry."""
        ends = [end for flight in self._under_way.values() for end in flight.targets]
        return Counter(
            [*(end for end in ends if isinstance(end, Entry)), *(entry for _, entry in self._spills)]
        )

    def check(self) -> None:
        """Asserts that copies and held blocks agree."""
        held = Counter(block for block, _ in self._spills)
        for flight in self._under_way.values():
            held.update(end for end in flight.ends if isinstance(end, int))
        assert held == self.held, "copies and held blocks differ"


def _place(end: End, other: End) -> Place:
    """Where an end is, for the store. Of a device block, the other end knows the rest."""
    if isinstance(end, Entry):
        return end.place
    assert isinstance(other, Entry), "nothing is copied from device to device"
    return Place(other.key, end, other.parent, other.depth, other.tokens)
