"""What it costs that a sequence gives its blocks up and comes back, by each way there is. Pure arithmetic.

The one `price` that both choose by: which way a waiter comes back (policies/resume.py), and which running sequence is
to give up its blocks (policies/preemption.py). Seconds come from a cost model (policies/cost.py).

    price = delay of this sequence × its weight + device seconds × the weights of those running

Recompute takes the device from everyone who runs; a reload mostly delays the one that waits for it: until the first
step that begins when all of it is there. The delay ends with its next token. Who computes draws that with the last
position; who has been loaded has yet to run. What copies take from the steps beside them counts as device seconds.

Whom to preempt is asked of all who run, so the terms of a price are named tuples (engine/plan.py has why).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import ceil
from typing import NamedTuple, Protocol

RELOAD = "reload"
RECOMPUTE = "recompute"
SPLIT = "split"


class StepCosts(Protocol):
    """Seconds of steps, as a cost model predicts them: policies/cost.py has the one that is fitted."""

    def added_seconds(self, cached: int, count: int) -> float:
        """What these positions add to steps that run anyway."""

    def beside_seconds(self, copies: int, copied_bytes: int) -> float:
        """What copies add to the step that they are begun with."""


class CopyCosts(Protocol):
    """Seconds of copies between tiers."""

    def seconds(self, source: str, target: str, size: int) -> float:
        """Of one copy of `size` bytes, from the moment a thread takes it up."""

    def reload_seconds(self, source: str, size: int, copy_bytes: int, ahead_bytes: int = 0) -> float:
        """To the device, in copies of `copy_bytes`, behind what is queued there already."""


class Situation(NamedTuple):
    """What goes on beside the sequence that is priced."""

    steps: StepCosts
    copies: CopyCosts
    block_tokens: int
    block_bytes: int
    copy_bytes: int  # most of one copy
    chunk: int  # tokens that a step has for it
    decode_rows: int
    decode_context: int
    step_seconds: float  # of a step in which these rows alone are computed
    prompts_seconds: float  # what prompts under way add to the steps to come: it shares those with them
    running_weight: float  # of all that run beside it
    ahead_bytes: Mapping[str, int]  # by tier: what is queued to come from there
    ahead_seconds: float  # of a step under way already, before the one that is being made
    next_seconds: float  # of the one that is being made, prompts of others in it; 0: nobody runs

    def joins(self, loaded: float) -> float:
        """Seconds until one whose blocks are all there after `loaded` seconds runs: steps are made as others end."""
        if not self.next_seconds:
            return loaded
        ended = self.ahead_seconds or self.next_seconds
        if loaded > ended and self.ahead_seconds:
            ended += self.next_seconds
        return ended + max(0, ceil((loaded - ended) / self.step_seconds)) * self.step_seconds

    def beside_seconds(self, blocks: int) -> float:
        """What others lose by a copy of so many blocks, from or to the device."""
        size = blocks * self.block_bytes
        if not (size and self.next_seconds):
            return 0.0
        return self.steps.beside_seconds(-(-size // self.copy_bytes), size)

    def copying_price(self, blocks: int) -> float:
        """That, weighted by all who run."""
        return self.beside_seconds(blocks) * self.running_weight

    @property
    def token_seconds(self) -> float:
        """From joining to a token: of the step joined, and of the one that was made before if it runs only then."""
        return self.step_seconds + (self.next_seconds if self.ahead_seconds else 0.0)


class Standing(NamedTuple):
    """Where a sequence's KV is, or will be when it comes back. Positions count from the beginning of its tokens."""

    device_tokens: int  # on the device already, or still
    below: tuple[tuple[str, int], ...]  # what follows these: (tier, blocks), in order
    below_tokens: int  # positions in those blocks
    total: int  # positions that it must have to go on

    @property
    def below_blocks(self) -> int:
        return sum(blocks for _, blocks in self.below)

    @property
    def reloadable(self) -> int:
        """Positions that need not be computed."""
        return self.device_tokens + self.below_tokens


class Way(NamedTuple):
    """A way back. Of the blocks below the device those from `first_fetched` on are loaded, the rest are computed."""

    name: str
    first_fetched: int
    seconds: float  # until all positions are there, and it runs
    device_seconds: float  # of computing, and by copies beside steps: taken from everyone
    price: float  # weighted seconds


def ways(standing: Standing, weight: float, situation: Situation, enabled: Sequence[str]) -> list[Way]:
    """The enabled ways that are possible, at least one: recompute is what is left when nothing can be loaded."""
    found = []
    if RELOAD in enabled and standing.below_blocks:
        found.append(reload(standing, weight, situation))
    if SPLIT in enabled and standing.below_blocks > 1:
        found.append(split(standing, weight, situation))
    if RECOMPUTE in enabled or not found:
        found.append(recompute(standing, weight, situation))
    return found


def recompute(standing: Standing, weight: float, situation: Situation) -> Way:
    seconds, device = _computing_beside(standing.device_tokens, standing.total, situation)
    return Way(RECOMPUTE, standing.below_blocks, seconds, device, _price(seconds, device, weight, situation))


def reload(standing: Standing, weight: float, situation: Situation) -> Way:
    """Loads all there is, then computes what no tier has."""
    rest, device = _computing(standing.reloadable, standing.total, situation)
    beside = situation.beside_seconds(standing.below_blocks)
    seconds = situation.joins(loading_seconds(standing, 0, situation)) + beside + rest
    device += beside
    return Way(RELOAD, 0, seconds, device, _loaded_price(seconds, device, rest, weight, situation))


def split(standing: Standing, weight: float, situation: Situation) -> Way:
    """Computes the head while the rest loads, from the block on where both end together; at least a block each."""

    def computing_ends_last(blocks: int) -> bool:
        return _head(standing, blocks, situation)[0] >= loading_seconds(standing, blocks, situation)

    # computing grows with the head, loading falls; where loading is quick, the first block is enough
    head, most = 1, standing.below_blocks - 1
    if head < most and not computing_ends_last(head):
        head = 2 + bisect_left(range(2, most), True, key=computing_ends_last)
    return min(
        (_split_at(standing, blocks, weight, situation) for blocks in {max(1, head - 1), head}),
        key=lambda way: (way.price, way.first_fetched),
    )


def _split_at(standing: Standing, blocks: int, weight: float, situation: Situation) -> Way:
    head, head_device = _head(standing, blocks, situation)
    rest, rest_device = _computing(standing.reloadable, standing.total, situation)
    beside = situation.beside_seconds(standing.below_blocks - blocks)
    seconds = max(head, situation.joins(loading_seconds(standing, blocks, situation))) + beside + rest
    device = head_device + rest_device + beside
    return Way(SPLIT, blocks, seconds, device, _loaded_price(seconds, device, rest, weight, situation))


def _head(standing: Standing, blocks: int, situation: Situation) -> tuple[float, float]:
    end = standing.device_tokens + blocks * situation.block_tokens
    return _computing_beside(standing.device_tokens, end, situation)


def _computing_beside(start: int, end: int, situation: Situation) -> tuple[float, float]:
    """As `_computing`, from now on: after the steps under way, and with prompts under way in its own."""
    seconds, device = _computing(start, end, situation)
    return (situation.ahead_seconds + seconds + situation.prompts_seconds if device else seconds), device


def _computing(start: int, end: int, situation: Situation) -> tuple[float, float]:
    """(seconds until positions start … end are computed among those that run, device seconds that they add)."""
    count = end - start
    if count <= 0:
        return 0.0, 0.0
    added = situation.steps.added_seconds(start, count)
    return -(-count // situation.chunk) * situation.step_seconds + added, added


def loading_seconds(standing: Standing, skipped: int, situation: Situation) -> float:
    """Seconds until all blocks but the first `skipped` are there. Each tier has its own queue, beside the others'."""
    sizes: dict[str, int] = {}
    for tier, blocks in standing.below:
        if skipped < blocks:
            sizes[tier] = sizes.get(tier, 0) + (blocks - skipped) * situation.block_bytes
            skipped = 0
        else:
            skipped -= blocks
    longest = 0.0
    for tier, size in sizes.items():
        if size:
            ahead = situation.ahead_bytes.get(tier, 0)
            longest = max(longest, situation.copies.reload_seconds(tier, size, situation.copy_bytes, ahead))
    return longest


def _price(seconds: float, device_seconds: float, weight: float, situation: Situation) -> float:
    return seconds * weight + device_seconds * situation.running_weight


def _loaded_price(
    seconds: float, device_seconds: float, rest: float, weight: float, situation: Situation
) -> float:
    """`rest`: seconds of what it computes after the load, with its next token; 0: that takes a step of its own."""
    token = 0.0 if rest else situation.token_seconds
    return _price(seconds + token, device_seconds, weight, situation)


# --- giving up ------------------------------------------------------------------------------------------------------


class Stake(NamedTuple):
    """What a running sequence has at stake, should it be the victim."""

    standing: Standing  # as it will be when it comes back
    frees: int  # blocks that only it holds: what the others get
    unsaved_blocks: int  # to be written down before they are free
    saving_seconds: float  # until they are; 0 where there are none
    survival: float  # chance that what is saved is still there then, 0 … 1
    preemptions: int  # it has suffered before


def way_back(stake: Stake, weight: float, situation: Situation, enabled: Sequence[str]) -> Way:
    """The cheapest. The price of one that loads has the saving in it; who is computed again is not saved.

    Where all of it is loaded by the next step, nothing is gained by a split: it is not looked at.
    """
    if RELOAD in enabled and SPLIT in enabled:
        loading = loading_seconds(stake.standing, 0, situation)
        if situation.joins(loading) == situation.joins(0.0):
            enabled = [name for name in enabled if name != SPLIT]
    saving = _price(stake.saving_seconds, situation.beside_seconds(stake.unsaved_blocks), weight, situation)
    found = ways(stake.standing, weight, situation, enabled)
    saved = (way if way.name == RECOMPUTE else way._replace(price=way.price + saving) for way in found)
    return min(saved, key=lambda way: way.price)


def price(stake: Stake, weight: float, situation: Situation, enabled: Sequence[str]) -> float:
    """Weighted seconds per block freed; infinite where none is. Each preemption suffered raises it, so thrash ends.

    Ways that load count as far as what is saved survives; where it does not, all is computed again.
    """
    if not stake.frees:
        return float("inf")
    best = way_back(stake, weight, situation, enabled).price
    if stake.survival < 1.0:
        lost = recompute(stake.standing, weight, situation).price
        best = min(lost, stake.survival * best + (1.0 - stake.survival) * lost)
    return best * (1 + stake.preemptions) / stake.frees
