"""Who goes first: a sort key per sequence, lowest first, and who may take whose place.

The line of waiters is a heap that looks again at what comes up. So the key of a waiter must stay as it is, or grow:
one that falls is noticed late. No order has a clock: linear ageing is a static term, as `work + rate × arrived`
sorts like `work − rate × waited`. Equal keys are settled by the line, by order of arrival.

The tokens of a step go by it as well: where all are given, the last prompt under way cedes what a waiter before it
needs, and loses nothing by it. "Displaces" is about places.

Promotion (promotion.py) is the line's too, and the same for all: a promoted waiter goes before all others. With
promotion by service on, every order here has this *service bound*: while a sequence waits, those that came later
are computed no more than `service_tokens` + 2 × `max_batch_tokens` tokens (promotion.py says why two).
The docstrings say what holds without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Protocol

from policies.views import SequenceView


class Order(Protocol):
    """One whose keys grow with a tenant's service has an attribute `by_tenant = True`: the line then ranks the tenants
    by their first ones, and the others behind these by arrival.
    """

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        """Its key. All keys of one order have the same length."""

    def displaces(self, waiter: SequenceView, runner: SequenceView, /) -> bool:
        """Whether the waiter may take the runner's place. Whether that is worth its cost, the scheduler asks."""


class Patient:
    """An order by which no waiter takes a runner's place."""

    def displaces(self, waiter: SequenceView, runner: SequenceView, /) -> bool:
        return False


@dataclass(frozen=True)
class Fcfs(Patient):
    """First come, first served. A preempted sequence keeps its place, so it goes before all later arrivals.

    Key: static. Never displaces. Service bound, without promotion too: no later arrival is admitted before a
    waiter, but for one whose next block a running sequence is computing: the scheduler passes that over until the
    block is there. Worst case: one long prompt at the head keeps all behind it waiting, room or not. Source: vLLM's
    default order.
    """

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        return (view.number,)


@dataclass(frozen=True)
class Priority:
    """The client's priority, lowest first; then the first that arrived.

    Assumes that clients tell the truth, as nothing makes urgency dear. Key: static. Displaces: a strictly better
    priority. Worst case: a steady load of urgent requests. Service bound: none without promotion: it starves.
    Source: vLLM's `priority` order.
    """

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        return (view.priority, view.arrived)

    def displaces(self, waiter: SequenceView, runner: SequenceView, /) -> bool:
        return waiter.priority < runner.priority


@dataclass(frozen=True)
class Sjf(Patient):
    """The shortest job first, in decode rounds still to come: predicted tokens, and what is to be computed before.

    `prefill_tokens_per_round`: prompt tokens that cost as much as one round of decoding.

    Assumes predictions that rank well; by how much they are wrong does not matter. On a server that takes one at a
    time it then has the least mean latency of all orders that do not preempt. Key: static until the prediction or
    the match is renewed; a better match found meanwhile is seen late. Never displaces. Worst case: a long job
    behind a steady load of short ones. Service bound: none without promotion: it starves. Source: Schrage 1968
    (shortest remaining processing time); for LLMs with predicted lengths, Fu et al., "Efficient LLM Scheduling by
    Learning to Rank", NeurIPS'24.
    """

    prefill_tokens_per_round: float = 128.0

    def __post_init__(self) -> None:
        _require(self.prefill_tokens_per_round > 0, "prefill_tokens_per_round must be positive")

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        return (view.expected_remaining_tokens + still_to_compute(view) / self.prefill_tokens_per_round,)


@dataclass(frozen=True)
class Mlq:
    """Levels with quanta that double: new work enters by its prompt's length, and sinks as it generates.

    Level l gives `quantum_tokens` × 2^l tokens of output, then one goes down; at most `max_demotions` times, and
    never below level `levels` − 1. The entry level skips those whose quantum the prefill alone would use up; it
    counts as prompt ÷ `prefill_tokens_per_round` rounds. Within a level, the first that arrived.

    Assumes nothing of output lengths: what has run long is taken to run longer. Key: static. Displaces: a strictly
    better level. Worst case: many of one length, which sink together and then run by turns; and a long job under a
    steady load of newcomers. Service bound: none without promotion: it starves. Source: FastServe's skip-join
    multi-level feedback queue, Wu et al., "Fast Distributed Inference Serving for Large Language Models", 2023.
    """

    quantum_tokens: int = 32
    prefill_tokens_per_round: int = 128
    max_demotions: int = 4
    levels: int = 8

    def __post_init__(self) -> None:
        _require(self.quantum_tokens > 0, "quantum_tokens must be positive")
        _require(self.prefill_tokens_per_round > 0, "prefill_tokens_per_round must be positive")
        _require(self.max_demotions >= 0, "max_demotions must not be negative")
        _require(self.levels > 0, "levels must be positive")

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        return (self.level(view), view.arrived)

    def displaces(self, waiter: SequenceView, runner: SequenceView, /) -> bool:
        return self.level(waiter) < self.level(runner)

    def level(self, view: SequenceView, /) -> int:
        """0 is the best. By what was asked and what it has generated, never by time."""
        spent = view.output_tokens // self.quantum_tokens
        return self._levels(view.prompt_tokens, spent)

    @cached_property
    def _levels(self) -> Callable[[int, int], int]:
        """By prompt tokens and quanta of level 0 spent; kept, as it is asked of all who run in every step."""
        return lru_cache(maxsize=65536)(self._level)

    def _level(self, prompt_tokens: int, spent: int) -> int:
        entry = self._entry_level(prompt_tokens)
        demotions = ((spent >> entry) + 1).bit_length() - 1  # by quanta of the entry level
        return min(entry + min(demotions, self.max_demotions), self.levels - 1)

    def _entry_level(self, prompt_tokens: int) -> int:
        """The first level whose quantum is no less than the rounds that the prefill takes."""
        rounds = -(-prompt_tokens // self.prefill_tokens_per_round)
        quanta = -(-rounds // self.quantum_tokens)
        return min((quanta - 1).bit_length(), self.levels - 1) if quanta else 0


@dataclass(frozen=True)
class CacheAware(Patient):
    """The largest share of its tokens found in some tier first; then the first that arrived.

    A share, not a length: the tokens that are reused for each that is computed. Assumes that what is cached now may
    be evicted before its turn. Key: rises when a new match finds less, which the line sees in time; when it finds
    more, it falls, which is seen of the first few, as they are looked up anew by turns, and of others late. Never
    displaces. Worst case: a prompt that shares nothing, beside a steady load of those that do. Service bound: none
    without promotion: it starves. Source: SGLang's longest-prefix-match order, Zheng et al., "SGLang: Efficient
    Execution of Structured Language Model Programs", NeurIPS'24.
    """

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        known = view.prompt_tokens + view.output_tokens
        return (still_to_compute(view) / known, view.arrived)


@dataclass(frozen=True)
class Fair(Patient):
    """The tenant that has been served least first; of its own requests, the first that arrived.

    Assumes that a tenant's counter is weighted (prompt × 1, output × 2 in the paper), and lifted to the least one
    among those who wait when it comes back from being idle: else it would be paid for the time in which it asked
    for nothing. Key: only grows. Never displaces. Service bound without promotion: between two tenants that both
    have work waiting, served tokens differ by no more than 2 × max(longest prompt, 2 × tokens of a full batch), so
    of n tenants the other n − 1 get at most as much each before a waiter's turn. Worst case: new tenants without
    end, each of which starts at the least counter: then it starves. Source: virtual token counter, Sheng et al.,
    "Fairness in Serving Large Language Models", OSDI'24.
    """

    by_tenant: ClassVar[bool] = True

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        return (view.tenant_service, view.number)


@dataclass(frozen=True)
class Hybrid:
    """The service class first; within a class the least work left, with credit for cached tokens and time waited.

    Work, in seconds as they would be on a device with these speeds: positions still to be computed ×
    `prefill_seconds` + expected remaining tokens × `decode_seconds` − matched positions × `prefill_seconds` ×
    `cache_credit` (the chance that they would be evicted if it waited longer). Of a preempted sequence what is left
    counts, not what is done; but the part of its length that it has generated makes the rest weigh up to
    1 + `spent_weight` times as much, as a second of delay is felt less over a long answer than over one that may be
    short. Each second waited counts as `ageing` seconds less work. Only the ratios matter for the order.

    Assumes predictions that rank well. Key: static until the prediction or the match is renewed, as with `sjf`.
    Displaces: a strictly worse class; within a class one behind it that has more than `displacement` times its work
    (0: nobody), which the scheduler allows only where all that the runner has can be loaded again
    (engine/victims.py). Service bound without promotion, within a class: whoever arrives more than work ÷ `ageing`
    seconds after a waiter goes behind it. Between classes there is none: the lower one starves. Worst case: that, or
    predictions that rank the long before the short; and long answers stall while newer ones are served. Source:
    ours; its parts are shortest remaining processing time (see `sjf`), an index of weight ÷ work (Smith 1956) with
    the weight 1 ÷ length that latency per token has, longest prefix match (see `cache_aware`) and linear ageing,
    Kleinrock, "Queueing Systems II", 1976.
    """

    prefill_seconds: float = 0.0002  # a token
    decode_seconds: float = 0.02  # a token, within a batch
    cache_credit: float = 0.1
    spent_weight: float = 5.0
    displacement: float = 2.0
    ageing: float = 0.2

    def __post_init__(self) -> None:
        _require(self.prefill_seconds >= 0, "prefill_seconds must not be negative")
        _require(self.decode_seconds >= 0, "decode_seconds must not be negative")
        _require(self.cache_credit >= 0, "cache_credit must not be negative")
        _require(self.spent_weight >= 0, "spent_weight must not be negative")
        _require(self.displacement == 0 or self.displacement >= 1, "displacement must be 0, or at least 1")
        _require(self.ageing >= 0, "ageing must not be negative")

    def __call__(self, view: SequenceView, /) -> tuple[float, ...]:
        return (view.class_rank, self.work_seconds(view) + self.ageing * view.arrived)

    def displaces(self, waiter: SequenceView, runner: SequenceView, /) -> bool:
        if waiter.class_rank != runner.class_rank or not self.displacement:
            return waiter.class_rank < runner.class_rank
        work, other = self.work_seconds(waiter), self.work_seconds(runner)
        before = work + self.ageing * waiter.arrived < other + self.ageing * runner.arrived
        return before and work * self.displacement < other

    def work_seconds(self, view: SequenceView, /) -> float:
        left, spent = view.expected_remaining_tokens, view.output_tokens
        weight = 1.0 + self.spent_weight * spent / (spent + left) if spent else 1.0
        prefill = still_to_compute(view) - self.cache_credit * view.matched_tokens
        return prefill * self.prefill_seconds + left * self.decode_seconds * weight


def still_to_compute(view: SequenceView) -> int:
    """Positions of its known tokens that neither the device nor, as far as was last seen, any tier has."""
    left = view.prompt_tokens + view.output_tokens
    left -= max(view.computed_tokens, view.matched_tokens, view.kept_tokens)
    return left if left > 0 else 0


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


ORDERS: dict[str, Callable[..., Order]] = {
    "fcfs": Fcfs,
    "priority": Priority,
    "sjf": Sjf,
    "mlq": Mlq,
    "cache_aware": CacheAware,
    "fair": Fair,
    "hybrid": Hybrid,
}
