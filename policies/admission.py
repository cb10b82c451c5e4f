"""Whether those who run will still fit when they have grown, from how long each is predicted to run.

The scheduler asks in `_admit`, beside its own test that the blocks needed now are there. That test alone admits
what must be preempted soon; reserving max_tokens for everybody leaves most of the pool unused.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from policies.prediction import Predictor
from policies.views import SequenceView

ENDS_KEPT = 8192
"""Predicted ends that are remembered, of all replicas; those asked for longest ago go first."""


class Outlook:
    """The most blocks that those who run, and one more, will hold at once, if no one else is admitted.

    Each, given as (tokens to come, blocks held), grows by 1/block_size a step, and gives all of it back when its tokens
    have come. The peak is reached just as some sequence ends, so only those moments are looked at, the longest first:
    O(n log n), and for one more O(log n). Blocks are whole: in truth it may be up to a block a sequence more or less.
    Source: LightLLM's past-future scheduler, Gong et al., ASPLOS'25.
    """

    def __init__(self, remaining_and_held: Iterable[tuple[float, int]], block_size: int) -> None:
        self._block_size = block_size
        self._ends = sorted([(-remaining / block_size, held) for remaining, held in remaining_and_held])
        self._look()

    def _look(self) -> None:
        """What is held as each ends, by it and those longer; the most of these, and with one more that grows along."""
        held, most = 0, 0.0
        self._held, self._most_of_longer = [0], [0.0]
        with_one_more = []
        for count, (growth, blocks) in enumerate(self._ends, 1):  # growth is negative: the longest come first
            held += blocks
            at_its_end = held - count * growth
            most = max(most, at_its_end)
            self._held.append(held)
            self._most_of_longer.append(most)
            with_one_more.append(at_its_end - growth)
        with_one_more.reverse()
        self._most_of_shorter = [*accumulate(with_one_more, max, initial=0.0)]

    def peak_with(self, remaining: float, held: int) -> float:
        """The peak if one more ran, which holds `held` blocks at once. Changes nothing."""
        growth = remaining / self._block_size
        longer = bisect_left(self._ends, (-growth, -1))  # they are there when it ends
        at_its_end = self._held[longer] + held + (longer + 1) * growth
        shorter = len(self._ends) - longer
        while_it_runs = self._most_of_shorter[shorter] + held if shorter else 0.0
        return max(self._most_of_longer[longer], at_its_end, while_it_runs)

    def add(self, remaining: float, held: int) -> None:
        """One more runs. O(n)."""
        insort(self._ends, (-remaining / self._block_size, held))
        self._look()


@dataclass(eq=False)
class Admission:
    """Admits while the predicted peak stays within the pool.

    `risk`: each is taken to run as long as it does with probability 1 − risk. The sum of many is steadier than each
    of them, so 0.5 is not reckless; 0 is max_tokens, and nothing is ever preempted for want of blocks; with 1, the
    default, nothing is foreseen, and whoever fits now is admitted: where a preemption loses nothing, waiting for
    room that may never be needed costs more (docs/simulation.md has figures). `wait_steps`: one who lacks a block
    sits out so many steps, at most, while somebody else is expected to end within them, before a victim is looked
    for.

    Assumes one token a step for all, and lengths that are independent; blocks shared by several sequences count for
    each of them, so give `blocks` as the pool and what is counted more than once. Ties: none. Worst case: all run
    longer than predicted; then victims are preempted, as they would be without it. It never refuses one when nobody
    runs; who waits is first by the order, so it starves nobody that the order does not. Source: see `Outlook`.
    """

    risk: float = 1.0
    wait_steps: int = 4
    # by number and admission, the last asked for last: to be asked again at so many tokens, the end
    _ends: OrderedDict[tuple[int, int], tuple[int, float]] = field(
        default_factory=OrderedDict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.risk <= 1.0:
            raise ValueError("risk must be at least 0 and at most 1")
        if self.wait_steps < 0:
            raise ValueError("wait_steps must not be negative")

    @property
    def foresees(self) -> bool:
        """Whether there is anything to ask: else whoever fits now is admitted."""
        return self.risk < 1.0

    def room(
        self, running: Iterable[SequenceView], predictor: Predictor, block_size: int, blocks: int
    ) -> "Room":
        """What is left of `blocks` for newcomers in this step. Asks the predictor only when it must."""
        return Room(self, list(running), predictor, block_size, blocks)

    def left(self, views: list[SequenceView], predictor: Predictor) -> list[float]:
        """Tokens to come, at this risk. An end stays for an eighth of the way, or until one is admitted anew."""
        left = []
        for view in views:
            admission, so_far = (view.number, view.admissions), view.output_tokens
            again, end = self._ends.pop(admission, (0, 0.0))
            if so_far >= again:
                to_come = predictor.quantile(view, 1.0 - self.risk)
                again, end = so_far + max(1, int(to_come / 8)), so_far + to_come
            self._ends[admission] = again, end
            left.append(end - so_far)
        while len(self._ends) > ENDS_KEPT:
            self._ends.popitem(last=False)
        return left


class Room:
    """One step's answers. As long as all would fit at their max_tokens, nothing is predicted."""

    def __init__(
        self,
        admission: Admission,
        running: list[SequenceView],
        predictor: Predictor,
        block_size: int,
        blocks: int,
    ) -> None:
        self._running, self._held = running, [view.held_blocks for view in running]
        self._admission, self._predictor = admission, predictor
        self._block_size, self._blocks = block_size, blocks
        self._most = sum(map(self._most_of, running, self._held))
        self._outlook: Outlook | None = None

    def fits(self, view: SequenceView, held: int) -> bool:
        """Whether the peak stays within the pool if `view`, holding `held` blocks at once, runs too."""
        if (
            not (self._running and self._admission.foresees)
            or self._most + self._most_of(view, held) <= self._blocks
        ):
            return True
        if self._outlook is None:
            left = self._admission.left(self._running, self._predictor)
            self._outlook = Outlook(zip(left, self._held, strict=True), self._block_size)
        return self._outlook.peak_with(self._left(view), held) <= self._blocks

    def add(self, view: SequenceView, held: int) -> None:
        """It is admitted, with `held` blocks."""
        self._running.append(view)
        self._held.append(held)
        self._most += self._most_of(view, held)
        if self._outlook is not None:
            self._outlook.add(self._left(view), held)

    def _left(self, view: SequenceView) -> float:
        return self._predictor.quantile(view, 1.0 - self._admission.risk)

    def _most_of(self, view: SequenceView, held: int) -> float:
        return held + (view.max_tokens - view.output_tokens) / self._block_size
