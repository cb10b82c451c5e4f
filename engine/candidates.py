"""What routing and rebalancing are shown of one request beside one replica: candidates, and who may be moved. Pure.

Of the replica itself: member.py. Seconds are predicted ones of its device, by its cost model (policies/cost.py).
"""

from dataclasses import dataclass
from functools import cached_property

from engine.core import Core
from engine.member import Member, row_seconds
from engine.sequence import Sequence
from kvstore.block import Key
from kvstore.copies import DISK, HOST

NOMINAL_ROWS = 8
"""A decoding sequence is charged its share of a step of so many: what it truly costs depends on who runs beside it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica, of one request that is to be placed. Implements policies.views.CandidateView."""

    number: int
    role: str
    limit_tokens: int
    capacity_tokens: int
    used_tokens: int
    requests: int
    placed: int
    charged_seconds: float
    backlog_seconds: float
    forecast_tokens: float
    waiting: int
    prompt_tokens: int
    size_tokens: float
    urgent: bool
    cached_tokens: int
    prefill_seconds: float
    saved_seconds: float
    decode_seconds: float
    ahead_seconds: float
    behind_seconds: float
    disturbed_seconds: float
    session_home: bool
    work_seconds: float  # what it will be charged here


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of which one at least is to be computed. `keys`: of their full blocks; `below_tokens`: of them, tiers
    below the devices have, in the topmost `tier` that has the first."""

    tokens: int
    keys: list[Key]
    below_tokens: int = 0
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be placed."""

    prompt: Prompt
    expected_tokens: float
    urgent: bool
    session_home: int | None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Of a prompt on one replica: `cached_tokens`, which its device has, save so much of `seconds`."""

    cached_tokens: int
    seconds: float
    saved_seconds: float

    @property
    def own_seconds(self) -> float:
        """What is left to do."""
        return self.seconds - self.saved_seconds


def candidate(member: Member, wanted: Wanted) -> Candidate:
    figures, steps = member.figures, member.core.scheduler.valuation.costs.steps
    prompt, prefill = wanted.prompt, prefill_of(member, wanted.prompt)
    own = prefill.own_seconds
    context = prompt.tokens + wanted.expected_tokens / 2
    beside = figures.decode_rows + 1
    step = steps.step_seconds(0, 0.0, beside, int(figures.decode_context + context))
    return Candidate(
        number=member.number,
        role=member.role,
        limit_tokens=member.limit_tokens,
        capacity_tokens=member.capacity_tokens,
        used_tokens=figures.used_tokens,
        requests=member.requests,
        placed=member.placed,
        charged_seconds=member.charged_seconds,
        backlog_seconds=member.backlog_seconds,
        forecast_tokens=figures.forecast_tokens,
        waiting=member.waiting,
        prompt_tokens=prompt.tokens,
        size_tokens=prompt.tokens + wanted.expected_tokens,
        urgent=wanted.urgent,
        cached_tokens=prefill.cached_tokens,
        prefill_seconds=prefill.seconds,
        saved_seconds=prefill.saved_seconds,
        decode_seconds=wanted.expected_tokens * step,
        ahead_seconds=sum(min(each, own) for each in figures.prompts_seconds) + member.waiting_seconds,
        behind_seconds=own * member.core.scheduler.waiting,
        disturbed_seconds=(own + wanted.expected_tokens * row_seconds(steps, context)) * figures.decode_rows,
        session_home=wanted.session_home == member.number,
        work_seconds=own + decode_share(member, wanted),
    )


def prefill_of(member: Member, prompt: Prompt) -> Prefill:
    """There; what tiers below have is loaded, and the rest computed."""
    core = member.core
    size, steps = core.scheduler.config.block_size, core.scheduler.valuation.costs.steps
    here = min(len(core.scheduler.pool.match(prompt.keys)) * size, prompt.tokens - 1)
    below = prompt.below_tokens
    load = member.load_or_compute_seconds(prompt.tier, 0, below)
    seconds = load + steps.added_seconds(below, prompt.tokens - below)
    saved = load if here >= below else member.load_or_compute_seconds(prompt.tier, 0, here)
    if here > below:
        saved += steps.added_seconds(below, here - below)
    return Prefill(here, seconds, saved)


def decode_share(member: Member, wanted: Wanted) -> float:
    """Of its decode steps, with so many beside it as are nominal."""
    steps = member.core.scheduler.valuation.costs.steps
    context = int(NOMINAL_ROWS * (wanted.prompt.tokens + wanted.expected_tokens / 2))
    return wanted.expected_tokens * steps.step_seconds(0, 0.0, NOMINAL_ROWS, context) / NOMINAL_ROWS


def work_seconds(member: Member, wanted: Wanted) -> float:
    """What a request is charged: as a candidate says, for who needs no more of it."""
    return prefill_of(member, wanted.prompt).own_seconds + decode_share(member, wanted)


def prompt_of(core: Core, tokens: int, keys: list[Key]) -> Prompt:
    """Of so many tokens, whose full blocks have these keys, as the tiers below the devices are now."""
    size = core.config.scheduler.block_size
    keys = keys[: (tokens - 1) // size]
    below, tier = _below_match(core, keys)
    return Prompt(tokens, keys, below * size, tier)


def _below_match(core: Core, keys: list[Key]) -> tuple[int, str]:
    """How many of the first blocks tiers below the devices have, and which has the first of them."""
    shelves = core.scheduler.residency.shelves
    count = 0
    for key in keys:
        if not any(shelf.readable(key) for shelf in shelves if shelf.up):
            break
        count += 1
    if not count:
        return 0, ""
    return count, HOST if shelves.host.readable(keys[0]) else DISK


class Movable:
    """A sequence that may go on elsewhere. Implements policies.rebalancing.MovableView.

    There may be ten thousand, and a policy prices few: seconds are looked up when it asks, and kept.
    """

    def __init__(self, member: Member, sequence: Sequence) -> None:
        self._member = member
        self._sequence = sequence
        self.replica = member.number
        self.moves = sequence.migrations
        self.moved_at = sequence.migrated_at
        self.waits = sequence.slot < 0
        self.crossed = sequence.crossed
        self.tokens = len(sequence.tokens)
        self.choice = sequence.choice

    @property
    def request(self) -> str:
        return self._sequence.request.id

    @property
    def remaining_tokens(self) -> float:
        return self._sequence.expected_remaining_tokens

    @property
    def size_tokens(self) -> float:
        return self.tokens + self.remaining_tokens

    @cached_property
    def load_seconds(self) -> float:
        return self._member.load_seconds(self._sequence)

    @cached_property
    def disturbs_seconds(self) -> float:
        return self._member.disturbs_seconds(self._sequence)

    @cached_property
    def cost_seconds(self) -> float:
        """What it takes elsewhere to have what this device has of it, and to have room for that; weighted. Of one that
        runs, what others lose by the copies, too: on its way out, and on its way in, where about as many are.
        """
        member, sequence = self._member, self._sequence
        others = 0.0
        if not self.waits:
            tokens, seconds = sequence.computed, member.move_seconds(sequence.computed)
            others = 2 * member.copying_price(sequence)
        else:
            core = member.core
            keys = sequence.block_keys(core.config.scheduler.block_size)
            if not core.scheduler.pool.match(keys[:1]):
                return 0.0
            found = prefill_of(member, prompt_of(core, self.tokens, keys))
            tokens, seconds = found.cached_tokens, found.saved_seconds
        return sequence.weight * (seconds + member.displaced_seconds(tokens)) + others
