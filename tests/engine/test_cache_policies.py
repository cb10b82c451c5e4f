"""Evictions and placements that are plug-ins decide, never harm an answer when they fail, and are switched live."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.policy_set import Catalog, PolicyConfig
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, DISK, HOST
from tests.engine.driving import UNFORESEEN, Driver, core_config, request
from tests.engine.test_tiers import PROMPT, routes, run


def oldest_stays(block: Any) -> tuple[float, ...]:
    return (-block.used, -block.depth)


def never(block: Any, leaving: bool) -> bool:
    return False


def raises(*asked: Any) -> Any:
    raise RuntimeError("a plug-in's bug")


def driver(host: int = 30, disk: int = 0, plugins: Any = None, **names: str) -> Driver:
    config = core_config(
        residency=ResidencyConfig(host_blocks=host, disk_blocks=disk, transaction_blocks=4),
        policies=PolicyConfig(parameters=UNFORESEEN).having(names),
    )
    made = Driver(config, catalog=Catalog(plugins))
    if disk:
        made.tier_up()
    return made


def scan(made: Driver, first: int = 0) -> None:
    run(made, *(request(f"r{first + i}", [first + i] * 41, max_tokens=4) for i in range(10)))


def found(made: Driver, name: str = "again") -> int:
    """Tokens that the tiers below the device have of PROMPT."""
    made.prune(DEVICE)
    run(made, request(name, PROMPT, max_tokens=4))
    return made.finished[name, 0].cached_tokens


def test_a_plug_in_says_which_block_leaves() -> None:
    made = driver(plugins={"eviction": {"my:own": oldest_stays}}, eviction="my:own")
    run(made, request("a", PROMPT, max_tokens=4))
    scan(made)
    assert found(made) == 40, "lru keeps nothing of it"
    assert not made.failed


def test_a_plug_in_says_what_goes_to_disk() -> None:
    made = driver(64, 64, plugins={"placement": {"my:own": never}}, placement="my:own")
    scan(made)
    assert routes(made)[DEVICE, HOST] > 0
    assert routes(made)[HOST, DISK] == 0
    assert not made.failed


@pytest.mark.parametrize(
    "plugin",
    [raises, lambda block: "first", lambda block: (float("nan"),), lambda block: None],
    ids=["raises", "text", "nan", "none"],
)
def test_an_eviction_that_fails_is_told_and_lru_decides(plugin: Callable[..., Any]) -> None:
    plain = driver(eviction="lru")
    broken = driver(plugins={"eviction": {"my:own": plugin}}, eviction="my:own")
    for made in (plain, broken):
        run(made, request("a", PROMPT, max_tokens=4))
        scan(made)
        run(made, request("r9b", [9] * 41, max_tokens=4))
    kept = [[e.key for e in made.core.scheduler.residency.host.entries()] for made in (plain, broken)]
    assert kept[0] == kept[1]
    assert {(failed.family, failed.name) for failed in broken.failed} == {("eviction", "my:own")}


@pytest.mark.parametrize("plugin", [raises, lambda block, leaving: 1], ids=["raises", "number"])
def test_a_placement_that_fails_is_told_and_everything_is_written_through(
    plugin: Callable[..., Any],
) -> None:
    made = driver(64, 64, plugins={"placement": {"my:own": plugin}}, placement="my:own")
    run(made, request("a", PROMPT, max_tokens=4))
    assert routes(made)[HOST, DISK] == 11
    assert {(failed.family, failed.name) for failed in made.failed} == {("placement", "my:own")}


def test_from_a_switch_on_the_other_eviction_decides() -> None:
    """What lru would have dropped stays: its blocks are there when the switch comes."""
    made = driver(plugins={"eviction": {"my:own": oldest_stays}}, eviction="lru")
    run(made, request("a", PROMPT, max_tokens=4))
    made.use_policies(eviction="my:own")
    scan(made)
    assert found(made) == 40
    made.use_policies(eviction="lru")
    scan(made, 20)
    assert found(made, "anew") == 0


def test_from_a_switch_on_the_other_placement_decides() -> None:
    made = driver(64, 64, plugins={"placement": {"my:own": never}}, placement="my:own")
    run(made, request("a", PROMPT, max_tokens=4))
    made.use_policies(placement="write_through")
    run(made, request("b", [7] * 41, max_tokens=4))
    assert routes(made)[HOST, DISK] == 11


def test_cost_goes_on_learning_when_others_change() -> None:
    made = driver(eviction="cost")
    run(made, request("a", PROMPT, max_tokens=4))
    before = made.core.scheduler.residency.host._eviction
    made.use_policies(victim="fewest_output", placement="selective")
    assert made.core.scheduler.residency.host._eviction is before
    made.use_policies(eviction="cost")
    assert made.core.scheduler.residency.host._eviction is before
