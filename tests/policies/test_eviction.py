"""Which block leaves first: the built-in policies keep what their docstrings promise, and a tier of them hits."""

from dataclasses import dataclass
from random import Random

import pytest

from bench.prefix_cache import Prompt, belady, policy_cache, unlimited
from policies.eviction import EVICTIONS, FAMILIES, MOST_USES, TAIL, Cost, lfu, lru


@dataclass
class Block:
    """Implements policies.views.BlockView."""

    key: bytes = b"a"
    used: float = 0.0
    hits: int = 0
    depth: int = 0
    partial: bool = False
    saves_seconds: float = 1.0
    past: int = 0


def mixed(seed: int = 0, seconds: int = 1500) -> list[Prompt]:
    """One-shot prompts, chats whose every turn is a longer prompt, and a system prompt before all of them."""
    choose = Random(seed)
    fresh = iter(range(1, 10**9))
    due: list[tuple[float, tuple[int, ...], int]] = []
    for second in range(seconds):
        due.append((second + choose.random(), (0, *(next(fresh) for _ in range(choose.randint(2, 9)))), 0))
        if choose.random() < 0.25:
            due.append((second + choose.random(), (0, next(fresh), next(fresh)), choose.randint(2, 6)))
    prompts = []
    while due:
        due.sort()
        at, blocks, turns = due.pop(0)
        prompts.append(Prompt(at, blocks, 512 * len(blocks)))
        if turns:
            due.append((at + choose.uniform(10, 40), (*blocks, next(fresh)), turns - 1))
    return prompts


def hits(name: str, prompts: list[Prompt], capacity: int) -> int:
    cache = policy_cache(EVICTIONS[name](capacity), capacity, max(len(prompt.blocks) for prompt in prompts))
    return sum(map(cache, prompts))


@pytest.mark.parametrize("capacity", [25, 50, 100, 200, 400])
def test_cost_is_never_below_lru_and_lfu_nor_above_belady(capacity: int) -> None:
    prompts = mixed()
    cost = hits("cost", prompts, capacity)
    assert cost >= max(hits("lru", prompts, capacity), hits("lfu", prompts, capacity))
    assert cost <= sum(map(belady(prompts, capacity), prompts)) <= sum(map(unlimited(), prompts))


def test_cost_decides_alike_every_time() -> None:
    prompts = mixed(1, 300)
    caches = [policy_cache(Cost(60), 60, 20) for _ in range(2)]
    assert [caches[0](prompt) for prompt in prompts] == [caches[1](prompt) for prompt in prompts]


def test_before_anything_is_learned_what_was_used_lately_is_worth_most() -> None:
    policy = Cost(10)
    worths = [policy.worth(Block(), now) for now in (0.0, 1.0, 10.0, 100.0, 1000.0)]
    assert worths == sorted(worths, reverse=True)
    assert worths[-1] < worths[0]


def test_what_saves_more_is_worth_more_and_stands_elsewhere() -> None:
    policy = Cost(10)
    dear, cheap = Block(saves_seconds=8.0), Block(saves_seconds=1.0)
    assert policy.worth(dear, 5.0) == 8 * policy.worth(cheap, 5.0)
    assert policy.group(dear) != policy.group(cheap)


def test_worth_rises_until_the_next_use_is_due_and_falls_after() -> None:
    """Blocks that come back after 60 s, a third of them: at 40 s one is worth more than at 0 s, and at 200 s least."""
    policy = Cost(1000)
    for number in range(900):
        block = Block(b"%d" % number, used=float(number))
        block.past = policy.added(block, block.used)
        if number % 3 == 0:
            policy.hit(block, block.used + 60)
    young, due, late = (policy.worth(Block(used=1000.0), 1000.0 + age) for age in (0, 40, 200))
    assert due > young > late


def test_a_block_that_left_is_known_when_it_returns() -> None:
    policy = Cost(1)
    block = Block()
    block.past = policy.added(block, 0.0)
    policy.left(block)
    back = Block(used=20.0)
    assert policy.added(back, 20.0) == policy.hit(block, 20.0) != block.past


def test_no_more_than_eight_blocks_are_remembered_for_each_that_the_tier_holds() -> None:
    policy = Cost(1)
    for number in range(20):
        policy.left(Block(b"%d" % number))
    fresh = policy.added(Block(b"new"), 1.0)
    assert policy.added(Block(b"11"), 1.0) == fresh, "forgotten"
    assert policy.added(Block(b"12"), 1.0) != fresh, "remembered"


def test_a_snapshots_tail_is_a_kind_of_its_own_and_not_remembered() -> None:
    policy = Cost(10)
    tail = Block(partial=True)
    tail.past = policy.added(tail, 0.0)
    assert tail.past == TAIL
    policy.left(tail)
    assert policy.added(Block(), 9.0) == policy.added(Block(b"other"), 9.0)


def test_a_blocks_kind_tells_its_uses_and_its_last_gap_and_outlives_its_leaving() -> None:
    policy = Cost(10)
    block = Block()
    block.past = once = policy.added(block, 0.0)
    soon, late = policy.hit(block, 10.0), policy.hit(block, 100.0)
    assert len({once, soon, late}) == 3
    block.past = soon
    policy.left(block)
    assert policy.added(Block(used=10.0), 10.0) not in {once, soon, late}, "used twice again"
    assert FAMILIES[once] + 1 == FAMILIES[soon] == FAMILIES[late]


def test_kinds_stay_within_their_family() -> None:
    policy = Cost(10)
    block = Block()
    assert FAMILIES[policy.adopted(block)] == 0
    for uses, seconds in enumerate((-1.0, 0.0, 16.0, 300.0, 1e9, 1e9), start=1):
        block.past = policy.hit(block, seconds)
        assert FAMILIES[block.past] == min(uses, MOST_USES)
    assert FAMILIES[policy.adopted(Block(hits=9))] == MOST_USES


def test_every_policy_says_what_it_is_for() -> None:
    for policy in (lru, lfu, Cost):
        assert "Source:" in (policy.__doc__ or "")
