"""The books of one tier, under every eviction policy: who may leave, in which order, and that nothing is lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.copies import HOST, Place
from kvstore.shelf import Entry, Shelf
from policies.eviction import EVICTIONS

CAPACITY = 12
SIZE = 16


def key(chain: int, depth: int) -> bytes:
    return b"%d.%d" % (chain, depth)


def place(chain: int, depth: int, tokens: int = SIZE) -> Place:
    return Place(key(chain, depth), -1, key(chain, depth - 1) if depth else b"", depth, tokens)


def enter(shelf: Shelf, chain: int, blocks: int, now: float) -> None:
    """A prompt comes through: what is there is hit, the rest comes in, what there is no room for leaves."""
    for depth in range(blocks):
        if entry := shelf.get(key(chain, depth)):
            shelf.hit(entry, now)
            continue
        if not shelf.room:
            leave(shelf, now, keep=key(chain, depth - 1))
        shelf.written(shelf.add(place(chain, depth), now))
    shelf.offer(shelf.get(key(chain, blocks - 1)))


def leave(shelf: Shelf, now: float, keep: bytes = b"") -> Entry:
    """One goes, as the residency has it: not `keep`, and no parent before its child."""
    while (entry := shelf.pop_candidate(now)) is not None:
        if not shelf.children(entry.key) and entry.key != keep:
            shelf.remove(entry)
            shelf.offer(shelf.get(entry.parent)) if not shelf.children(entry.parent) else None
            shelf.offer(shelf.get(keep))
            return entry
    raise AssertionError("nothing may leave")


def kept(shelf: Shelf, chain: int, blocks: int) -> int:
    return sum(key(chain, depth) in shelf for depth in range(blocks))


class Books(RuleBasedStateMachine):
    """Chains come, are hit, read, pinned and evicted; the policy changes in mid-run."""

    @initialize(name=st.sampled_from(sorted(EVICTIONS)))
    def start(self, name: str) -> None:
        self.shelf = Shelf(HOST, CAPACITY, EVICTIONS[name](CAPACITY), addressed=True)
        self.now = 0.0

    def _some(self, index: int) -> Entry | None:
        entries = self.shelf.entries()
        return entries[index % len(entries)] if entries else None

    def _leaf(self, entry: Entry) -> bool:
        return not self.shelf.children(entry.key)

    def _offer(self, block: bytes) -> None:
        if (entry := self.shelf.get(block)) and self._leaf(entry):
            self.shelf.offer(entry)

    @rule(chain=st.integers(0, 5), depth=st.integers(0, 3), tokens=st.sampled_from([SIZE, SIZE, 5]))
    def add(self, chain: int, depth: int, tokens: int) -> None:
        wanted = place(chain, depth, tokens)
        if self.shelf.room and wanted.key not in self.shelf and (not depth or wanted.parent in self.shelf):
            self.shelf.add(wanted, self.now)

    @rule(index=st.integers(0, 99))
    def write(self, index: int) -> None:
        if (entry := self._some(index)) and entry.writing:
            self.shelf.written(entry)
            self._offer(entry.key)

    @rule(index=st.integers(0, 99), seconds=st.sampled_from([0.0, 0.01, 2.0, 300.0, 1e5]))
    def hit(self, index: int, seconds: float) -> None:
        self.now += seconds
        if entry := self._some(index):
            self.shelf.hit(entry, self.now)

    @rule(index=st.integers(0, 99))
    def touch(self, index: int) -> None:
        if entry := self._some(index):
            self.shelf.touch(entry, self.now)

    @rule(index=st.integers(0, 99))
    def begin_read(self, index: int) -> None:
        if (entry := self._some(index)) and not entry.writing:
            entry.readers += 1

    @rule(index=st.integers(0, 99))
    def end_read(self, index: int) -> None:
        if (entry := self._some(index)) and entry.readers:
            self.shelf.read(entry)
            self._offer(entry.key)

    @rule(index=st.integers(0, 99))
    def pin(self, index: int) -> None:
        if entry := self._some(index):
            self.shelf.pin(entry)

    @rule(index=st.integers(0, 99))
    def unpin(self, index: int) -> None:
        if (entry := self._some(index)) and entry.pins:
            self.shelf.unpin(entry)
            self._offer(entry.key)

    @rule()
    def evict(self) -> None:
        possible = {e.key for e in self.shelf.entries() if e.settled and self._leaf(e)}
        while (entry := self.shelf.pop_candidate(self.now)) is not None:
            assert entry.settled, "a busy or pinned block was to leave"
            if not self._leaf(entry):
                continue
            assert entry.key in possible
            self.shelf.remove(entry)
            self._offer(entry.parent)
            return
        assert not possible, "there was somebody who may leave"

    @rule(index=st.integers(0, 99), saves=st.sampled_from([0.5, 1.0, 40.0]))
    def save_otherwise(self, index: int, saves: float) -> None:
        """What a block saves changes: a copy below has come or gone."""
        self.shelf.saving = lambda entry: saves
        if entry := self._some(index):
            self._offer(entry.key)

    @rule(name=st.sampled_from(sorted(EVICTIONS)))
    def switch(self, name: str) -> None:
        self.shelf.use(EVICTIONS[name](CAPACITY))

    @invariant()
    def balanced(self) -> None:
        self.shelf.check([])

    def teardown(self) -> None:
        """When all copies and pins have ended, everything can leave, children first."""
        for entry in self.shelf.entries():
            entry.writing, entry.readers = False, 0
            while entry.pins:
                self.shelf.unpin(entry)
        for entry in self.shelf.entries():
            self._offer(entry.key)
        while len(self.shelf):
            leave(self.shelf, self.now)
        self.shelf.check([])


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("name", sorted(EVICTIONS))
def test_of_a_chain_used_at_one_moment_the_deepest_leaves_first(name: str) -> None:
    shelf = Shelf(HOST, 8, EVICTIONS[name](8), addressed=True)
    enter(shelf, 0, 8, now=0.0)
    assert [leave(shelf, 1.0).depth for _ in range(8)] == list(range(7, -1, -1))


@pytest.mark.parametrize("name", sorted(EVICTIONS))
def test_a_policy_taken_over_in_mid_run_finds_all_who_may_leave(name: str) -> None:
    shelf = Shelf(HOST, 12, EVICTIONS["lru"](12), addressed=True)
    for chain in range(3):
        enter(shelf, chain, 4, now=float(chain))
    enter(shelf, 0, 4, now=3.0)
    shelf.use(EVICTIONS[name](12))
    shelf.check([])
    gone = [leave(shelf, 4.0) for _ in range(12)]
    assert {entry.key for entry in gone[-4:]} == {key(0, depth) for depth in range(4)}, "used twice, and last"


def scanned(name: str) -> list[int]:
    """Blocks that four chains of four find again, each every 40 s, amid one-shot chains: in each of 66 returns.

    The scan is as long as the tier every 20 s; in the last minute every 5 s.
    """
    shelf = Shelf(HOST, 64, EVICTIONS[name](64), addressed=True)
    found = []
    for moment in range(660):
        if moment % 10 == 0:
            found.append(kept(shelf, moment // 10 % 4, 4))
            enter(shelf, moment // 10 % 4, 4, now=float(moment))
        enter(shelf, 1000 + moment, 3 if moment < 600 else 12, now=float(moment))
    return found


def test_a_scan_turns_lru_over_and_not_cost() -> None:
    assert set(scanned("lru")) == {0}, "gone before it comes back"
    assert set(scanned("cost")[-30:]) == {4}
