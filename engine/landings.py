"""The target's side of migrations: a place for who comes from another replica, and fetches into it. Pure.

It is served at its source meanwhile, so whoever arrives is a twin of a sequence there: LOADING, with a slot and blocks
for all it knew when it was last looked at. When all of it is here it runs with the next step (lifecycle.py), and from
then on it is the sequence. What is copied when, and who of both is it, is migration.py's.
"""

from engine.intake import Intake
from engine.places import Places
from engine.resumption import Load, Loads, Match, find
from engine.sequence import Sequence, State
from engine.valuation import Valuation
from kvstore.copies import CopyDone
from kvstore.residency import Residency
from policies.pricing import RELOAD, Way

WHOLE = Way(RELOAD, 0, 0.0, 0.0, 0.0)
"""All that is below the device is fetched; nobody asked what it takes."""


class Landings:
    def __init__(self, places: Places, residency: Residency, valuation: Valuation, intake: Intake) -> None:
        self._places = places
        self._residency = residency
        self._valuation = valuation
        self._intake = intake
        self._loads = Loads(residency)
        self._outcomes: dict[Sequence, bool] = {}  # of fetches that are over: whether all came

    def match(self, twin: Sequence) -> Match:
        """What this device, and tiers below it, have of the twin."""
        return find(twin, self._residency, self._places.computing, self._places.block_size, device_only=False)

    def reserve(self, twin: Sequence, match: Match) -> bool:
        """A slot, and blocks for all that it knows. False when there is no room."""
        if not (self._places.slots_left and self._places.fits(twin, match)):
            return False
        self._places.take(twin, match)
        twin.state, twin.arriving = State.LOADING, True
        self._places.loading.append(twin)
        return True

    def extend(self, twin: Sequence, match: Match) -> bool:
        """Blocks for what it knows by now, and those of the match that the device has got by itself meanwhile."""
        pool, before = self._places.pool, len(twin.table)
        missing = max(0, self._places.known_blocks(twin) - before)
        held = [found for found in match.blocks[before:] if isinstance(found, int)]
        fresh, idle = missing - len(held), sum(not pool.references(block) for block in held)
        if fresh + idle > pool.available:
            return False
        for index, found in enumerate(match.blocks[:before]):
            if isinstance(found, int) and found != twin.table[index]:
                pool.hold((found,))
                pool.release((twin.table[index],))
                twin.table[index] = found
        pool.hold(held)
        twin.table += [*held, *pool.allocate(fresh)]
        return True

    def fetch(self, twin: Sequence, match: Match, after: int, now: float) -> None:
        """What the match has below the device. `after`: see Copy. `outcome` says when it is over."""
        for _, entry in match.entries:
            self._valuation.fetching(entry.tier, now)
        if match.entries:
            self._loads.begin(twin, match, WHOLE, after)
        else:
            self._outcomes[twin] = True

    def copied(self, done: CopyDone) -> None:
        """A copy has ended, perhaps one of ours."""
        load = self._loads.copied(done)
        if load is None:
            return
        for index in load.first_arrived:
            if index < load.match.full:
                self._places.cache(load.sequence, index)
        self._outcomes[load.sequence] = load.whole

    def outcome(self, twin: Sequence) -> bool | None:
        """Whether all came that was fetched last; None while it is under way. To be asked once."""
        return self._outcomes.pop(twin, None)

    def land(self, twin: Sequence, match: Match) -> None:
        """All of it is here: it runs with the next step."""
        self._intake.loaded(Load(twin, twin.epoch, match, [], WHOLE))

    def give_up(self, twin: Sequence) -> None:
        """It does not come."""
        self._outcomes.pop(twin, None)
        self._places.leave(twin)
        twin.state = State.FINISHED
