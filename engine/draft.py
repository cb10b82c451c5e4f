"""The step being made: who gets how many tokens, and the rows of it that a runner is told.

Who gets them is decided in scheduler.py; what a row means is plan.py's.
"""

from dataclasses import dataclass, field

from engine.plan import PENDING, Placement, Row
from engine.sequence import Sequence
from engine.valuation import Work, work_of
from policies.admission import Room


@dataclass(slots=True)
class Draft:
    """The step being made: who gets how many tokens, and what is left of the budget."""

    budget: int
    shares: dict[Sequence, int] = field(default_factory=dict)
    placed: list[Sequence] = field(default_factory=list)  # those that are new on the device
    loading: list[Sequence] = field(default_factory=list)  # those whose blocks come up beside the step
    closed: bool = False  # to newcomers, promoted ones too: somebody was preempted for want of blocks
    leaving: int = 0  # device blocks that will soon be out, while those who run are given their tokens
    room: Room | None = None  # what is foreseen of the pool; None: not asked yet, or no longer true

    def give(self, sequence: Sequence, count: int) -> None:
        self.shares[sequence] = count
        self.budget -= count

    def give_all(self, shares: dict[Sequence, int]) -> None:
        """The first of the step."""
        assert not self.shares
        self.shares = shares
        self.budget -= sum(shares.values())

    def cede(self, sequence: Sequence, count: int) -> None:
        """Up to `count` of its tokens are somebody else's."""
        left = self.shares[sequence] - count
        if left > 0:
            self.shares[sequence] = left
            self.budget += count
        else:
            self.take_back(sequence)

    def take_back(self, sequence: Sequence) -> None:
        self.budget += self.shares.pop(sequence, 0)
        if sequence in self.placed:
            self.placed.remove(sequence)


@dataclass(slots=True)
class Scheduled:
    """The next step's rows, with the sequences they belong to, in the same order."""

    placements: list[Placement]
    rows: list[Row]
    sequences: list[Sequence]
    recomputed_tokens: int
    work: Work


def build(draft: Draft) -> Scheduled:
    """The step, whose positions count as scheduled from here on."""
    placements = [_placement(sequence) for sequence in draft.placed]
    recomputed = sum(
        _advance_recomputed(sequence, count)
        for sequence, count in draft.shares.items()
        if sequence.scheduled < sequence.computed_before
    )
    rows = [_row(sequence, count) for sequence, count in draft.shares.items()]
    return Scheduled(placements, rows, list(draft.shares), recomputed, work_of(rows))


def _placement(sequence: Sequence) -> Placement:
    """Its history goes along where a draw depends on it: a cached prefix, or KV that came back, is in no row."""
    if not sequence.sampling.penalises:
        return Placement(sequence.slot, sequence.sampling)
    return Placement(sequence.slot, sequence.sampling, tuple(sequence.tokens), sequence.prompt_tokens)


def _advance_recomputed(sequence: Sequence, count: int) -> int:
    """Of its next positions, how many were computed once before."""
    again = min(sequence.computed_before, sequence.scheduled + count) - sequence.scheduled
    sequence.recomputed_tokens += again
    return again


def _row(sequence: Sequence, count: int) -> Row:
    """Hands out `count` positions: from here on they count as scheduled, and the token drawn as pending."""
    start, told, held = sequence.scheduled, sequence.told, len(sequence.table)
    samples = not sequence.head_end and start + count == len(sequence.tokens) + sequence.pending
    blocks = tuple(sequence.table[told:]) if told < held else ()
    if count == 1 and start < len(sequence.tokens):
        tokens: tuple[int, ...] = (sequence.tokens[start],)  # nearly all
    else:
        tokens = tuple(sequence.tokens[start : start + count]) or (PENDING,)
        sequence.served_before += count
    row = Row(sequence.slot, start, tokens, told, blocks, samples)
    sequence.told = held
    sequence.scheduled = start + count
    sequence.pending += samples
    return row
