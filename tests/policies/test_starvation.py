"""Against adversaries that never stop, on the real core: with promotion no order lets later arrivals pass a waiter
by more service than its docstring says, and without it those that are said to starve do.

Service is counted as the runner is told to compute it, whoever asked: for each spell of each waiter, the tokens
computed for those that arrived after it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from typing import Any

import pytest

from engine.events import Instruction, Run
from engine.policy_set import PolicyConfig
from engine.request import Request, ServiceClass
from policies.order import ORDERS
from tests.engine.driving import UNFORESEEN, Driver, core_config, request

BATCH_TOKENS = 16
SERVICE_TOKENS = 200
BOUND = SERVICE_TOKENS + 2 * BATCH_TOKENS
STEPS = 200
WARM_STEPS = 12  # of those who are there before
VICTIM = "victim"


class Watched(Driver):
    """A driver that notes, for each spell of waiting, the service granted to later arrivals."""

    def __init__(self, order: str, *, promotes: bool, slots: int = 3, blocks: int = 64) -> None:
        parameters: dict[str, Mapping[str, float]] = {
            **UNFORESEEN,
            "mlq": {"quantum_tokens": 2, "prefill_tokens_per_round": 4},
            "promotion": {"service_tokens": SERVICE_TOKENS if promotes else 0},
        }
        policies = PolicyConfig(order=order, parameters=parameters)
        config = core_config(
            blocks=blocks, max_sequences=slots, max_batch_tokens=BATCH_TOKENS, policies=policies
        )
        super().__init__(config)
        self.passed_by: dict[tuple[str, int], int] = {}  # by request and preemptions so far
        self.started: dict[str, int] = {}  # the step in which each first ran

    def _carry_out(self, instruction: Instruction) -> None:
        super()._carry_out(instruction)
        if isinstance(instruction, Run):
            self._count(instruction)

    def _count(self, run: Run) -> None:
        scheduler = self.core.scheduler
        who = {sequence.slot: sequence for sequence in scheduler.running}
        served = [(who[row.slot], len(row.tokens)) for row in run.plan.rows]
        for sequence, _ in served:
            self.started.setdefault(sequence.request.id, run.plan.step)
        for waiter in scheduler.life.line:
            later = sum(tokens for sequence, tokens in served if sequence.number > waiter.number)
            spell = waiter.request.id, waiter.preemptions
            self.passed_by[spell] = self.passed_by.get(spell, 0) + later

    @property
    def worst(self) -> int:
        return max(self.passed_by.values())


@dataclass(frozen=True)
class Adversary:
    """Against one order: who is there before, who is passed by, and who comes without end."""

    order: str
    victim: Request
    next_one: Callable[[int], Request]  # the n-th
    before: tuple[Request, ...] = ()

    def play(self, driver: Watched, waiting: int = 4, ahead: int = 4) -> None:
        """So many others wait at any time, and so many come just before the victim."""
        driver.arrive(*self.before)
        for _ in range(WARM_STEPS if self.before else 0):
            driver.step()
        numbers = count()
        driver.arrive(*(self.next_one(next(numbers)) for _ in range(ahead)), self.victim)
        for _ in range(STEPS):
            while driver.core.scheduler.waiting < waiting:
                driver.arrive(self.next_one(next(numbers)))
            driver.step()


def more(
    number: int,
    length: int = 5,
    max_tokens: int = 3,
    *,
    priority: int = 0,
    tenant: str = "",
    rank: int = 0,
    id: str = "",
) -> Request:
    """A request whose prompt is like no other's."""
    prompt = [1 + (number * 7 + each * 3 + number // 90) % 97 for each in range(length)]
    asked = request(id or f"more {number}", prompt, max_tokens, seed=number)
    return replace(asked, priority=priority, tenant=tenant, service=ServiceClass(str(rank), rank))


HOT = [7] * 12

ADVERSARIES = [
    Adversary("priority", more(89, priority=1, id=VICTIM), more),
    Adversary("sjf", more(89, max_tokens=60, id=VICTIM), more),
    Adversary("mlq", more(89, length=60, id=VICTIM), more),
    Adversary(
        "cache_aware",
        more(89, length=13, id=VICTIM),
        lambda number: request(f"more {number}", [*HOT, 1 + number % 90], 3),
        before=(request("heats the cache", HOT, 3),),
    ),
    Adversary(
        "fair",
        more(89, tenant="served", id=VICTIM),
        lambda number: more(number, tenant=f"new {number}"),
        before=(
            more(1000, max_tokens=100, tenant="idle"),
            more(1001, length=30, max_tokens=100, tenant="served"),
        ),
    ),
    Adversary("hybrid", more(89, rank=1, id=VICTIM), more),
]


def played(adversary: Adversary, *, promotes: bool) -> Watched:
    driver = Watched(adversary.order, promotes=promotes)
    adversary.play(driver)
    return driver


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda each: each.order)
def test_with_promotion_no_more_than_the_bound_is_served_before_any_waiter(adversary: Adversary) -> None:
    driver = played(adversary, promotes=True)
    assert driver.passed_by[VICTIM, 0] > 0, "the adversary never came before its victim"
    assert driver.worst <= BOUND
    assert VICTIM in driver.started
    assert driver.core.scheduler.counts.promotions["service"] > 0


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda each: each.order)
def test_without_promotion_the_same_adversary_starves_it(adversary: Adversary) -> None:
    """As long as the adversary goes on: far beyond the bound, and it has not run."""
    driver = played(adversary, promotes=False)
    assert driver.passed_by[VICTIM, 0] > 2 * BOUND
    assert VICTIM not in driver.started


def test_every_order_that_says_it_starves_is_tried() -> None:
    starving = {name for name, order in ORDERS.items() if "starves" in (order.__doc__ or "")}
    assert starving == {adversary.order for adversary in ADVERSARIES}


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda each: each.order)
def test_fcfs_starves_nobody_whatever_comes(adversary: Adversary) -> None:
    driver = played(replace(adversary, order="fcfs"), promotes=False)
    assert driver.worst == 0
    assert VICTIM in driver.started


def test_a_promoted_waiter_takes_the_room_of_as_many_later_ones_as_it_needs() -> None:
    """Its prompt needs most of the pool, which others hold."""
    adversary = Adversary(
        "priority",
        more(89, length=200, priority=1, id=VICTIM),
        lambda number: more(number, length=20, max_tokens=20),
    )
    driver = Watched("priority", promotes=True, slots=6)
    adversary.play(driver)
    assert driver.core.scheduler.counts.preemptions_by["displaced"] > 1
    assert driver.worst <= BOUND
    assert VICTIM in driver.started


@pytest.mark.parametrize("slots", [1, 3])
def test_a_later_prompt_under_way_does_not_keep_a_promoted_waiter_out(slots: int) -> None:
    long_prompts = Adversary(
        "priority",
        more(89, priority=1, id=VICTIM),
        lambda number: more(number, length=400),
        before=tuple(more(900 + number, max_tokens=30) for number in range(slots)),
    )
    driver = Watched("priority", promotes=True, slots=slots, blocks=600)
    long_prompts.play(driver, ahead=0)
    assert driver.passed_by[VICTIM, 0] > 0
    assert driver.worst <= BOUND
    assert VICTIM in driver.started


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(4))
def test_in_a_crowd_of_all_kinds_the_bound_holds_for_every_spell_of_everybody(order: str, seed: int) -> None:
    """Long and short, urgent and not, of many tenants, more than there is room for."""
    random, numbers = Random(seed), count()
    driver = Watched(order, promotes=True, slots=6, blocks=32)
    for _ in range(STEPS):
        while driver.core.scheduler.waiting < 6:
            length, max_tokens = random.choice([3, 5, 13, 30, 60]), random.choice([1, 3, 10, 40])
            tenant = f"{random.choice('abcd')} {len(driver.finished) // 20}"
            kind: dict[str, Any] = {
                "priority": random.randint(0, 3),
                "rank": random.randint(0, 2),
                "tenant": tenant,
            }
            driver.arrive(more(next(numbers), length, max_tokens, **kind))
        driver.step()
    assert driver.core.scheduler.counts.promotions["service"] > 0
    assert driver.core.scheduler.counts.preemptions > 0
    assert driver.worst <= BOUND


def test_within_a_class_nobody_passes_hybrid_that_comes_later_than_work_divided_by_ageing() -> None:
    """Without promotion: 200 tokens of 0.02 s, at 0.2 a second, are 20 s, and a little for the prompt."""
    long = Adversary("hybrid", more(89, max_tokens=200, id=VICTIM), lambda number: more(number, max_tokens=2))
    driver = played(long, promotes=False)
    driver.finish()
    victim = driver.finished[VICTIM, 0]
    assert victim.admitted is not None
    passing = [
        each.arrived - victim.arrived
        for each in driver.finished.values()
        if each.admitted is not None and each.admitted < victim.admitted and each.arrived > victim.arrived
    ]
    assert 15 < max(passing) <= 20.5
