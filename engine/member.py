"""One replica in the fleet's books: what routing and rebalancing see of it. Pure.

Figures are looked up when somebody asks, and kept until the replica's core has handled something. Seconds are predicted
ones of its device, by its own cost model (policies/cost.py).
"""

from collections import deque
from dataclasses import dataclass

from engine.core import Core
from engine.ledger import Account, Ledger
from engine.sequence import Sequence, State
from kvstore.block import Key
from kvstore.copies import DISK, HOST
from policies.cost import StepCost
from policies.forecast import ForecastError, forecast_tokens

NOMINAL_ROWS = 8
"""A decoding sequence is charged its share of a step of so many: what it truly costs depends on who runs beside it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a replica's sequences, at one moment."""

    used_tokens: int
    decode_rows: int
    decode_context: int
    prompts_seconds: tuple[float, ...]  # of each prompt that is being computed: what is left
    waiting_seconds: float  # charged for those who wait
    backlog_seconds: float
    forecast_tokens: float


class Member:
    """Implements policies.views.ReplicaView and policies.rebalancing.LoadView."""

    def __init__(
        self, number: int, core: Core, ledger: Ledger, *, role: str, limit_tokens: int, horizon_steps: int
    ) -> None:
        self.number = number
        self.core = core
        self.role = role
        self.limit_tokens = limit_tokens
        self.up = True
        self.down_reason = ""
        self.draining = False
        self._ledger = ledger
        self._horizon_steps = horizon_steps
        self._figures: Figures | None = None
        self.errors = ForecastError()
        # forecasts that are not due: the step, the positions, and whose they will be
        self._forecasts: deque[tuple[int, float, list[Sequence]]] = deque()

    def changed(self) -> None:
        """Its core has handled something."""
        self._figures = None

    # --- what policies see ----------------------------------------------------------------------------------------

    @property
    def accepting(self) -> bool:
        return self.up and not self.draining

    @property
    def capacity_tokens(self) -> int:
        scheduler = self.core.scheduler
        return scheduler.pool.blocks * scheduler.config.block_size

    @property
    def used_tokens(self) -> int:
        return self.figures.used_tokens

    @property
    def requests(self) -> int:
        return self._account.sequences

    @property
    def placed(self) -> int:
        return self._account.placed

    @property
    def charged_seconds(self) -> float:
        return self._account.seconds

    @property
    def backlog_seconds(self) -> float:
        return self.figures.backlog_seconds

    @property
    def forecast_tokens(self) -> float:
        return self.figures.forecast_tokens

    @property
    def waiting(self) -> int:
        """Who came since the last step does not count: there may be room."""
        scheduler = self.core.scheduler
        return min(scheduler.left_waiting, scheduler.waiting)

    @property
    def _account(self) -> Account:
        return self._ledger.accounts[self.number]

    def compare_forecasts(self) -> None:
        """To be called once in a while: forecasts that are due are compared with what is, and a new one is made."""
        steps = self.core.steps_told
        while self._forecasts and self._forecasts[0][0] <= steps:
            due, tokens, sequences = self._forecasts.popleft()
            here = [sequence for sequence in sequences if sequence.state is State.RUNNING]
            self.errors.predicted(due, tokens)
            self.errors.observed(due, sum(len(sequence.tokens) for sequence in here))
        due = steps + self._horizon_steps
        if not self._forecasts or self._forecasts[-1][0] < due:
            self._forecasts.append((due, self.forecast_tokens, list(self.core.scheduler.running)))

    # --- figures --------------------------------------------------------------------------------------------------

    @property
    def figures(self) -> Figures:
        if self._figures is None:
            self._figures = self._look()
        return self._figures

    def _look(self) -> Figures:
        scheduler = self.core.scheduler
        taken = [*scheduler.running, *scheduler.loading]
        steps = scheduler.valuation.costs.steps
        context, rounds, charged = 0, 0.0, 0.0
        prompts: list[float] = []
        for sequence in taken:
            context += sequence.computed
            rounds += sequence.expected_remaining_tokens
            charged += self._ledger.seconds((sequence.request.id, sequence.choice))
            if (left := len(sequence.tokens) - sequence.computed) > 1:
                prompts.append(steps.added_seconds(sequence.computed, left))
        decoding = 0.0
        if taken:
            decoding = rounds / len(taken) * steps.step_seconds(0, 0.0, len(taken), context)
        waiting = max(0.0, self.charged_seconds - charged)
        return Figures(
            used_tokens=scheduler.pool.held * scheduler.config.block_size,
            decode_rows=len(taken),
            decode_context=context,
            prompts_seconds=tuple(prompts),
            waiting_seconds=waiting,
            backlog_seconds=sum(prompts) + decoding + waiting,
            forecast_tokens=forecast_tokens(taken, self.core.common.policies.prediction, self._horizon_steps),
        )

    def load_seconds(self, sequence: Sequence) -> float:
        """What the backlog falls by when a sequence leaves."""
        if sequence.slot < 0:
            return self._ledger.seconds((sequence.request.id, sequence.choice))
        steps, figures = self.core.scheduler.valuation.costs.steps, self.figures
        left = len(sequence.tokens) - sequence.computed
        prompt = steps.added_seconds(sequence.computed, left) if left > 1 else 0.0
        rows = max(1, figures.decode_rows)
        step = steps.step_seconds(0, 0.0, rows, figures.decode_context)
        return prompt + sequence.expected_remaining_tokens * step / rows

    def disturbs_seconds(self, sequence: Sequence) -> float:
        """What a sequence delays each that is where it is: its prompt, and its rows in their steps."""
        steps = self.core.scheduler.valuation.costs.steps
        left = len(sequence.tokens) - sequence.computed
        prompt = steps.added_seconds(sequence.computed, left) if left > 1 else 0.0
        return prompt + sequence.expected_remaining_tokens * row_seconds(steps, len(sequence.tokens))

    def move_seconds(self, tokens: int) -> float:
        """To bring so many positions here, from the topmost tier below the device; without one, to compute them.

        They take the room of as many that are cached, which are then computed again as far as hits are usual.
        """
        scheduler = self.core.scheduler
        tier = next((shelf.name for shelf in scheduler.residency.shelves if shelf.up), "")
        counts = scheduler.counts
        reuse = counts.prefix_hits / max(1, counts.prefix_queries)
        lost = reuse * scheduler.valuation.costs.steps.added_seconds(0, tokens)
        return self.load_or_compute_seconds(tier, 0, tokens) + lost

    def load_or_compute_seconds(self, tier: str, start: int, end: int) -> float:
        """Of positions start … end - 1, from that tier; "": to compute them."""
        if end <= start:
            return 0.0
        scheduler = self.core.scheduler
        costs, size = scheduler.valuation.costs, scheduler.config.block_size
        if not tier:
            return costs.steps.added_seconds(start, end - start)
        block_bytes = max(1, scheduler.config.block_bytes)
        copy_bytes = scheduler.residency.config.copy_blocks * block_bytes
        return costs.copies.reload_seconds(tier, -(-(end - start) // size) * block_bytes, copy_bytes)


def row_seconds(steps: StepCost, context: float) -> float:
    """What a decoding row adds to a step."""
    return steps.step_seconds(0, 0.0, 1, int(context)) - steps.step_seconds(0, 0.0, 0, 0)


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
    disturbed_seconds: float
    session_home: bool
    work_seconds: float  # what it will be charged here


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be placed. `keys`: of the full blocks of its tokens; `below_tokens`: of them, tiers below the
    devices have, in the topmost `tier` that has the first."""

    tokens: int
    keys: list[Key]
    expected_tokens: float
    urgent: bool
    session_home: int | None
    below_tokens: int
    tier: str


def candidate(member: Member, wanted: Wanted) -> Candidate:
    core, figures = member.core, member.figures
    size = core.scheduler.config.block_size
    steps = core.scheduler.valuation.costs.steps
    here = min(len(core.scheduler.pool.match(wanted.keys)) * size, wanted.tokens - 1)
    below = wanted.below_tokens
    load = member.load_or_compute_seconds(wanted.tier, 0, below)
    prefill = load + steps.added_seconds(below, wanted.tokens - below)
    saved = load if here >= below else member.load_or_compute_seconds(wanted.tier, 0, here)
    if here > below:
        saved += steps.added_seconds(below, here - below)
    own = prefill - saved
    context = wanted.tokens + wanted.expected_tokens / 2
    beside = figures.decode_rows + 1
    step = steps.step_seconds(0, 0.0, beside, int(figures.decode_context + context))
    nominal = steps.step_seconds(0, 0.0, NOMINAL_ROWS, int(NOMINAL_ROWS * context)) / NOMINAL_ROWS
    return Candidate(
        number=member.number,
        role=member.role,
        limit_tokens=member.limit_tokens,
        capacity_tokens=member.capacity_tokens,
        used_tokens=figures.used_tokens,
        requests=member.requests,
        placed=member.placed,
        charged_seconds=member.charged_seconds,
        backlog_seconds=figures.backlog_seconds,
        forecast_tokens=figures.forecast_tokens,
        waiting=member.waiting,
        prompt_tokens=wanted.tokens,
        size_tokens=wanted.tokens + wanted.expected_tokens,
        urgent=wanted.urgent,
        cached_tokens=here,
        prefill_seconds=prefill,
        saved_seconds=saved,
        decode_seconds=wanted.expected_tokens * step,
        ahead_seconds=sum(min(each, own) for each in figures.prompts_seconds) + figures.waiting_seconds,
        disturbed_seconds=(own + wanted.expected_tokens * row_seconds(steps, context))
        * (figures.decode_rows + member.waiting),
        session_home=wanted.session_home == member.number,
        work_seconds=own + wanted.expected_tokens * nominal,
    )


def below_match(core: Core, keys: list[Key]) -> tuple[int, str]:
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


@dataclass(frozen=True, slots=True)
class Movable:
    """A sequence that may go on elsewhere. Implements policies.rebalancing.MovableView."""

    request: str
    choice: int
    replica: int
    load_seconds: float
    disturbs_seconds: float
    tokens: int
    size_tokens: float
    remaining_tokens: float
    cost_seconds: float
    moves: int
    moved_at: float
    waits: bool
    crossed: bool


def movable(member: Member, sequence: Sequence) -> Movable:
    return Movable(
        request=sequence.request.id,
        choice=sequence.choice,
        replica=member.number,
        load_seconds=member.load_seconds(sequence),
        disturbs_seconds=member.disturbs_seconds(sequence),
        tokens=len(sequence.tokens),
        size_tokens=len(sequence.tokens) + sequence.expected_remaining_tokens,
        remaining_tokens=sequence.expected_remaining_tokens,
        cost_seconds=sequence.weight * member.move_seconds(max(sequence.computed, sequence.kept_tokens)),
        moves=sequence.migrations,
        moved_at=sequence.migrated_at,
        waits=sequence.slot < 0,
        crossed=sequence.crossed,
    )
