"""The tokens of a step go by the order policy, among waiters and prompts under way alike: nothing is lost by it."""

from dataclasses import replace
from itertools import count

import pytest

from engine.events import Instruction, Run
from engine.policy_set import PolicyConfig
from engine.request import Request, ServiceClass
from engine.sequence import Sequence
from policies.decisions import Kind
from policies.order import ORDERS
from tests.engine.driving import UNFORESEEN, Driver, core_config, request

BATCH_TOKENS = 16
LONG = 400  # tokens of a prompt that takes 25 steps alone
SERVICE_TOKENS = 100


class Noting(Driver):
    """A driver that notes who computed how many tokens, step by step."""

    def __init__(self, order: str, *, service_tokens: int = 0, slots: int = 4) -> None:
        parameters: dict[str, dict[str, float]] = {
            **UNFORESEEN,
            "mlq": {"quantum_tokens": 2, "prefill_tokens_per_round": 4},
            "promotion": {"service_tokens": service_tokens},
        }
        policies = PolicyConfig(order=order, parameters=parameters)
        self.steps: list[dict[str, int]] = []
        super().__init__(
            core_config(blocks=600, max_sequences=slots, max_batch_tokens=BATCH_TOKENS, policies=policies)
        )

    def _carry_out(self, instruction: Instruction) -> None:
        super()._carry_out(instruction)
        if isinstance(instruction, Run):
            who = {sequence.slot: sequence for sequence in self.core.scheduler.running}
            rows = instruction.plan.rows
            self.steps.append({who[row.slot].request.id: len(row.tokens) for row in rows})

    def sequence(self, name: str) -> Sequence:
        return self.core.sequences[name][0]


def asked(name: str, length: int, max_tokens: int = 3, *, first: int = 0, priority: int = 0) -> Request:
    made = request(name, [(first + each) % 97 for each in range(length)], max_tokens)
    return replace(made, priority=priority, service=ServiceClass(str(priority), priority))


def behind_a_long_one(order: str, *, max_sequences: int = 4) -> Noting:
    """One with a long prompt is under way when a short and more urgent one arrives."""
    driver = Noting(order, slots=max_sequences)
    driver.arrive(asked("long", LONG, 60, priority=1))
    driver.step()
    driver.arrive(asked("short", 6, first=50))
    return driver


@pytest.mark.parametrize("order", ["priority", "sjf", "mlq", "hybrid"])
def test_who_goes_before_a_prompt_under_way_takes_its_tokens_of_the_next_step_and_no_more(order: str) -> None:
    driver = behind_a_long_one(order)
    driver.step()
    assert driver.steps[-1] == {"long": BATCH_TOKENS - 6, "short": 6}
    driver.finish()
    assert all(sum(step.values()) == BATCH_TOKENS for step in driver.steps[: LONG // BATCH_TOKENS])
    assert driver.core.scheduler.counts.preemptions == 0
    alone = Noting(order)
    alone.arrive(asked("long", LONG, 60, priority=1))
    alone.finish()
    alone.arrive(asked("short", 6, first=50))
    alone.finish()
    assert all(driver.tokens(name) == alone.tokens(name) for name in ("long", "short"))


def test_who_comes_first_goes_first() -> None:
    driver = behind_a_long_one("fcfs")
    driver.finish()
    both = next(number for number, step in enumerate(driver.steps) if "short" in step)
    assert both == LONG // BATCH_TOKENS, "when the long prompt is computed"


def test_several_take_all_of_it_and_decodes_cede_nothing() -> None:
    driver = Noting("sjf", slots=8)
    driver.arrive(asked("decodes", 4, 60))
    driver.step()
    driver.arrive(asked("long", LONG, 60, first=20))
    driver.step()
    driver.step()
    driver.arrive(*(asked(f"short {n}", 6, first=30 + 9 * n) for n in range(3)))
    driver.step()
    assert driver.steps[-1] == {"decodes": 1, "short 0": 6, "short 1": 6, "short 2": 3}
    driver.step()
    assert driver.steps[-1] == {"decodes": 1, "short 0": 1, "short 1": 1, "short 2": 3, "long": 10}
    driver.finish()


def test_one_that_takes_all_leaves_the_prompt_its_place() -> None:
    driver = behind_a_long_one("priority")
    driver.arrive(asked("urgent", 40, first=70, priority=-1))
    driver.step()
    assert driver.steps[-1] == {"urgent": BATCH_TOKENS}
    assert driver.sequence("long").table
    driver.finish()
    assert not driver.core.scheduler.counts.preemptions


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_with_promotion_no_more_prompt_tokens_than_the_bound_pass_a_prompt_under_way(order: str) -> None:
    """Of those that came later, from its arrival until it draws its first token."""
    driver, passed = endless(order, service_tokens=SERVICE_TOKENS)
    assert passed <= SERVICE_TOKENS + 2 * BATCH_TOKENS
    assert driver.sequence("long").output_tokens > 0
    promoted = [each.request_id for each in driver.decided if each.decision.kind is Kind.PROMOTED]
    assert ("long" in promoted) is (order in ("priority", "sjf", "mlq", "hybrid", "fair"))


@pytest.mark.parametrize("order", ["priority", "sjf", "mlq", "hybrid"])
def test_without_promotion_those_that_go_before_it_starve_it(order: str) -> None:
    driver, passed = endless(order, service_tokens=0)
    assert passed > 10 * SERVICE_TOKENS
    assert driver.sequence("long").output_tokens == 0


def endless(order: str, service_tokens: int) -> tuple[Noting, int]:
    """Short ones of other tenants without end, and how many prompt tokens of theirs passed the long one's prompt."""
    driver, numbers, passed = Noting(order, service_tokens=service_tokens, slots=12), count(), 0
    driver.arrive(replace(asked("long", LONG, 90, priority=1), tenant="long"))
    for _ in range(200):
        while driver.core.scheduler.waiting < 6:
            number = next(numbers)
            short = asked(f"short {number}", 15, 1, first=number * 5)
            prompt = (number // 90 % 97, number % 90, *short.prompt)
            driver.arrive(replace(short, prompt=prompt, tenant=f"tenant {number}"))
        driver.step()
        if driver.sequence("long").output_tokens:
            break
        passed += sum(tokens for name, tokens in driver.steps[-1].items() if name != "long" and tokens > 1)
    return driver, passed
