"""One replica in the fleet's books: what routing and rebalancing see of it. Pure.

Figures of those who have a place are looked up when somebody asks, and kept until the replica's core has handled
something; what is charged for those who wait is read off the ledger. Seconds are predicted ones of its device, by its
cost model (policies/cost.py).
"""

from collections import deque
from dataclasses import dataclass

from engine.core import Core
from engine.ledger import Account, Ledger
from engine.sequence import Sequence, State
from policies.cost import StepCost
from policies.forecast import ForecastError, forecast_tokens


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a replica's sequences that have a place, at one moment."""

    used_tokens: int
    decode_rows: int
    decode_context: int
    prompts_seconds: tuple[float, ...]  # of each prompt that is being computed: what is left
    decode_seconds: float  # of all their steps to come
    charged_seconds: float
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

    def restart(self, core: Core) -> None:
        """A fresh core takes the lost one's place, with steps of its own that forecasts are due at."""
        self.core, self.up, self.down_reason = core, True, ""
        self._forecasts.clear()
        self.changed()

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
    def slots_left(self) -> int:
        scheduler = self.core.scheduler
        return scheduler.config.max_sequences - len(scheduler.running) - len(scheduler.loading)

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
    def waiting_seconds(self) -> float:
        """Charged for those who wait."""
        return max(0.0, self.charged_seconds - self.figures.charged_seconds)

    @property
    def backlog_seconds(self) -> float:
        figures = self.figures
        return sum(figures.prompts_seconds) + figures.decode_seconds + self.waiting_seconds

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
            if not sequence.arriving:  # else it is charged to where it is served
                charged += self._ledger.seconds((sequence.request.id, sequence.choice))
            if (left := len(sequence.tokens) - sequence.computed) > 1:
                prompts.append(steps.added_seconds(sequence.computed, left))
        decoding = 0.0
        if taken:
            decoding = rounds / len(taken) * steps.step_seconds(0, 0.0, len(taken), context)
        return Figures(
            used_tokens=scheduler.pool.held * scheduler.config.block_size,
            decode_rows=len(taken),
            decode_context=context,
            prompts_seconds=tuple(prompts),
            decode_seconds=decoding,
            charged_seconds=charged,
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
        """To bring so many positions here, from the topmost tier below the device; without one, to compute them."""
        shelves = self.core.scheduler.residency.shelves
        tier = next((shelf.name for shelf in shelves if shelf.up), "")
        return self.load_or_compute_seconds(tier, 0, tokens)

    def copying_price(self, sequence: Sequence) -> float:
        """What all who run here lose by a copy of a sequence's blocks; weighted."""
        scheduler = self.core.scheduler
        return scheduler.valuation.situation(scheduler.running).copying_price(len(sequence.table))

    def displaced_seconds(self, tokens: int) -> float:
        """What room for so many positions takes: as many cached ones are computed again, as far as hits are usual."""
        scheduler = self.core.scheduler
        reuse = scheduler.counts.prefix_hits / max(1, scheduler.counts.prefix_queries)
        return reuse * scheduler.valuation.costs.steps.added_seconds(0, tokens)

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
