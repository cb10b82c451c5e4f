"""How a waiter comes in, and a preempted one comes back: what tiers have of it is loaded, computed, or both at once.

    reload      LOADING: it holds its slot and all its blocks, and runs in the step after the last has come
    recompute   it runs at once, after what the device has
    split       it runs at once, and computes its head while the rest loads; then it jumps over what has been loaded

Whether it may come in at all is scheduler.py's. Fetches are resumption.py's, prices valuation.py's.
"""

from collections.abc import Callable, Iterable

from engine.events import Resumed
from engine.places import Places
from engine.resumption import Load, Loads, Match, find, lowest_tier
from engine.sequence import Return, Sequence, State
from engine.valuation import Valuation, Work
from kvstore.copies import CopyDone
from kvstore.residency import Residency
from policies.decisions import Alternative, Decision, Kind
from policies.pricing import RECOMPUTE, RELOAD, SPLIT, Situation, Way, loading_seconds, ways
from policies.resume import Resume

PROBE_SECONDS = 0.25
"""A tier that nobody loads from, as it was slow, is tried again so often: it may be quick again."""

PROBE_ROOM = 4
"""Of so many blocks that are available a probe takes one, at most."""

Decide = Callable[[Sequence, Decision], None]


class Intake:
    def __init__(self, places: Places, residency: Residency, valuation: Valuation, decide: Decide) -> None:
        self.resume_policy: Resume
        self.policy_name = ""
        self._places = places
        self._residency = residency
        self._valuation = valuation
        self._decide = decide
        self._loads = Loads(residency)
        self._loaded: list[Load] = []  # complete, not yet started
        self.returned: list[Resumed] = []  # ways back that are over, to be told

    def use(self, policy: Resume, name: str) -> None:
        self.resume_policy, self.policy_name = policy, name
        self._valuation.enabled = tuple(policy.enabled)

    @property
    def saves(self) -> bool:
        """Whether what a preempted sequence has computed is kept below the device."""
        return bool({RELOAD, SPLIT} & set(self._valuation.enabled))

    def match(self, sequence: Sequence) -> Match:
        """What need not be computed of a waiter. Without a way that loads, a preempted one has what the device has."""
        device_only = sequence.snapshot is not None and not self.saves
        match = find(sequence, self._residency, self._places.computing, self._places.block_size, device_only)
        sequence.matched_tokens = match.tokens
        return match

    # --- in -------------------------------------------------------------------------------------------------------

    def take(self, sequence: Sequence, match: Match, outstanding_step: int, now: float) -> Way:
        """Gives it a place. It is RUNNING then, or LOADING; there must be room."""
        way, priced = self._choose(sequence, match)
        self._places.take(sequence, match)
        self._explain(sequence, match, way, priced)
        self._set_out(sequence, match, way, priced, now)
        if way.name == RELOAD and match.entries:
            sequence.state = State.LOADING
            self._places.loading.append(sequence)
            self._places.announce(sequence, match.entries[0][0])
            self._fetch(sequence, match, way, outstanding_step, now)
        else:
            self._run(sequence, match, way)
            if way.name == SPLIT:
                self._fetch(sequence, match, way, outstanding_step, now)
            elif match.entries:
                self._probe(match, outstanding_step, now)
        return way

    def _fetch(self, sequence: Sequence, match: Match, way: Way, outstanding_step: int, now: float) -> None:
        for _, entry in match.entries[way.first_fetched :]:
            self._valuation.fetching(entry.tier, now)
        self._loads.begin(sequence, match, way, outstanding_step)

    def _probe(self, match: Match, outstanding_step: int, now: float) -> None:
        """What is not loaded is copied all the same, to nowhere, if the last copy from its tier is long ago."""
        entry = match.entries[-1][1]
        if now - self._valuation.loaded_at(entry.tier) < PROBE_SECONDS:
            return
        pool = self._places.pool
        room = min(self._residency.config.copy_blocks, pool.available // PROBE_ROOM)
        if not room:
            return
        probed = [each for _, each in match.entries if each.tier == entry.tier][-room:]
        self._valuation.probed(entry.tier, now)
        self._valuation.fetching(entry.tier, now)
        blocks = pool.allocate(len(probed))
        self._residency.fetch(list(zip(probed, blocks, strict=True)), outstanding_step)
        pool.release(blocks)  # the copies hold them

    def _choose(self, sequence: Sequence, match: Match) -> tuple[Way, list[Way]]:
        """How what is below the device comes up, or is computed again; and all the ways that there were."""
        standing = self._valuation.standing(sequence, match)
        if not standing.below_blocks:
            name = RELOAD if match.tokens >= standing.total else RECOMPUTE
            return Way(name, 0, 0.0, 0.0, 0.0), []
        situation = self._valuation.situation(self._places.running)
        enabled = self._valuation.enabled if self.saves else (RELOAD,)  # a newcomer reuses what is there
        priced = ways(standing, sequence.weight, situation, enabled)
        return self.resume_policy(priced), priced

    def _run(self, sequence: Sequence, match: Match, way: Way) -> None:
        """It computes from here on, after what it has on the device."""
        size, device = self._places.block_size, len(match.device_blocks)
        whole = way.name == RELOAD
        sequence.state, sequence.told = State.RUNNING, 0
        sequence.scheduled = sequence.computed = match.tokens if whole else device * size
        sequence.published = match.full if whole else min(match.full, device)
        if way.name == SPLIT:
            sequence.head_end = (device + way.first_fetched) * size
        self._places.no_longer_computing(sequence, *sequence.keys[: sequence.published])
        self._places.announce(sequence, sequence.published)
        self._places.running.append(sequence)

    # --- loads ----------------------------------------------------------------------------------------------------

    def loaded(self, load: Load) -> None:
        """All of it has come: its sequence runs in the next step."""
        self._loaded.append(load)

    def ready(self, now: float) -> Load | None:
        """The next whose blocks have all come: it is RUNNING now."""
        while self._loaded:
            load = self._loaded.pop(0)
            if load.current:
                self._places.loading.remove(load.sequence)
                self._run(load.sequence, load.match, load.way)
                self._arrived(load.sequence, load.match.tokens, now)
                return load
        return None

    def copied(self, done: CopyDone, now: float) -> Sequence | None:
        """A copy has ended. Returns a sequence that must wait again, as what a tier had promised has not come."""
        load = self._loads.copied(done)
        if load is None:
            return None
        sequence = load.sequence
        if sequence.state is State.RUNNING:
            self._rest_has_come(load, now)
            return None
        if not load.whole:
            for index in load.first_arrived:
                self._places.cache(sequence, index)
            return sequence
        for index, _ in load.wanted:
            if index < load.match.full:
                self._places.cache(sequence, index)
        if sequence.preemptions:
            sequence.reloaded_tokens += sum(entry.tokens for _, entry in load.wanted)
        self.loaded(load)
        return None

    def _rest_has_come(self, load: Load, now: float) -> None:
        """Of a split: what has come up to the first gap counts; the head may still be under way."""
        sequence, tokens = load.sequence, 0
        for (index, entry), expected in zip(load.wanted, load.first_arrived, strict=False):
            assert index == expected
            tokens += entry.tokens
        sequence.reloaded_tokens += tokens if sequence.preemptions else 0
        if not load.whole:
            self._lacks(sequence, sum(entry.tokens for _, entry in load.wanted) - tokens)
        sequence.loaded_end = sequence.head_end + tokens
        sequence.loaded_full = min(load.match.full, load.wanted[0][0] + len(load.first_arrived))
        self.join(sequence, now)

    def _lacks(self, sequence: Sequence, tokens: int) -> None:
        """So many did not come: it computes them. A newcomer was told to have them already."""
        sequence.cached_tokens -= tokens if sequence.admissions == 1 else 0
        reason = f"{tokens} tokens that a tier below the device had promised did not come"
        self._decide(sequence, Decision(Kind.LOAD_FAILED, "", RECOMPUTE, reason))

    def join(self, sequence: Sequence, now: float) -> None:
        """Head and rest of a split are both there: it goes on after them."""
        if not sequence.loaded_end or sequence.computed < sequence.head_end:
            return
        for index in range(sequence.published, sequence.loaded_full):
            self._places.cache(sequence, index)
        sequence.published = max(sequence.published, sequence.loaded_full)
        sequence.scheduled = sequence.computed = sequence.loaded_end
        sequence.head_end = sequence.loaded_end = 0
        self._arrived(sequence, sequence.computed, now)

    def touching(self, copies: list[int]) -> list[Sequence]:
        """Who waits for any of these copies."""
        return [load.sequence for load in self._loads.touching(copies)]

    # --- ways back, told and measured -----------------------------------------------------------------------------

    def _explain(self, sequence: Sequence, match: Match, way: Way, priced: list[Way]) -> None:
        size = self._places.block_size
        found = ", ".join(f"{n} {tier}" for tier, n in sorted(match.tokens_by_tier(0, size).items()))
        reason = f"{len(sequence.tokens)} tokens, of which found: {found or 'none'}"
        named = tuple(Alternative(each.name, each.price) for each in priced)
        policy = self.policy_name if priced else ""
        seconds = way.seconds if priced else None
        self._decide(sequence, Decision(Kind.ADMITTED, policy, way.name, reason, seconds, named))

    def _set_out(self, sequence: Sequence, match: Match, way: Way, priced: list[Way], now: float) -> None:
        """A preempted sequence is on its way back: what was predicted is kept, to be compared."""
        if sequence.snapshot is None or not (priced or match.tokens < sequence.snapshot.computed):
            return  # it is new, or finds all it had on the device
        target, standing = sequence.snapshot.computed, self._valuation.standing(sequence, match)
        situation = self._valuation.situation(self._places.running)
        seconds, loading = way.seconds, 0.0
        if not priced:
            seconds = ways(standing, 1.0, situation, (RECOMPUTE,))[0].seconds
        elif way.name == RELOAD:
            loading = loading_seconds(standing, 0, situation)
        tiers = match.tokens_by_tier(way.first_fetched if priced else 0, self._places.block_size)
        sequence.way_back = Return(
            way.name, lowest_tier(tiers), now, target, seconds,
            alternative_seconds=min((each.seconds for each in priced if each is not way), default=None),
            loading_seconds=loading,
            rest_seconds=seconds - situation.joins(loading) - situation.beside_seconds(standing.below_blocks),
        )  # fmt: skip

    def built(self, sequences: Iterable[Sequence], work: Work) -> None:
        """The step is known whole that they come in with, or load beside: so are all who cost it time too."""
        situation: Situation | None = None
        for sequence in sequences:
            if (back := sequence.way_back) is None:
                continue
            if back.way == RECOMPUTE:
                rest = max(0, back.target - sequence.scheduled)
                back.seconds = self._valuation.computing_seconds(work, sequence.scheduled, rest)
            elif back.way == RELOAD and sequence.state is State.LOADING:
                if situation is None:
                    step = self._valuation.seconds(work)
                    situation = self._valuation.situation(self._places.running)._replace(next_seconds=step)
                back.seconds = situation.joins(back.loading_seconds) + back.rest_seconds

    def computed(self, sequence: Sequence, now: float) -> None:
        """Positions of it have been computed."""
        if sequence.head_end:
            self.join(sequence, now)
        if sequence.way_back:
            self._arrived(sequence, sequence.computed, now)

    def _arrived(self, sequence: Sequence, positions: int, now: float) -> None:
        """So many positions are on the device: perhaps all that it had."""
        back = sequence.way_back
        if back is None or positions < back.target:
            return
        sequence.way_back = None
        actual = now - back.since
        regret = None if back.alternative_seconds is None else actual - back.alternative_seconds
        self.returned.append(Resumed(sequence.request.id, back.way, back.tier, back.seconds, actual, regret))
        reason = f"{back.target} positions are back; {back.seconds:.4f} s were predicted"
        self._decide(sequence, Decision(Kind.RESUMED, self.policy_name, back.way, reason, actual))
