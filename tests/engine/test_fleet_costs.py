"""What steps take, replicas that are alike learn together; and a recording of that replays as it was."""

from dataclasses import replace

from engine.core import Core
from engine.events import Pruned
from engine.fleet import FleetConfig, ReplicaConfig
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, DISK, HOST
from policies.cost import StepCost
from policies.pace import BAND
from tests.engine.driving import core_config, request
from tests.engine.fleet_driving import FleetDriver, fleet_config
from tests.engine.test_fleet import replayed

CORE = core_config(blocks=200, max_sequences=40, residency=ResidencyConfig(host_blocks=400))


def costs(driver: FleetDriver) -> list[StepCost]:
    return [core.scheduler.valuation.costs.steps for core in driver.fleet.cores]


def run_on(driver: FleetDriver, replica: int, steps: int) -> None:
    driver.arrive(*(request(f"{replica}.{n}", [n, *range(9)], max_tokens=steps) for n in range(4)))
    for _ in range(steps // 2):
        driver.step(replica)


def test_like_replicas_learn_together_but_for_what_copies_take() -> None:
    driver = FleetDriver(fleet_config(CORE, 2, routing="round_robin"))
    driver.drain(1)
    run_on(driver, 0, 40)
    first, second = costs(driver)
    assert second.samples == first.samples == 20
    assert second.coefficients == first.coefficients
    cores = driver.fleet.cores
    assert cores[0].scheduler.valuation.costs.copies is not cores[1].scheduler.valuation.costs.copies


def test_unlike_replicas_do_not() -> None:
    """Of another model, or another kind of device."""
    driver = FleetDriver(
        FleetConfig((ReplicaConfig(CORE), ReplicaConfig(replace(CORE, fingerprint="another"))))
    )
    driver.drain(1)
    run_on(driver, 0, 40)
    assert [cost.samples for cost in costs(driver)] == [20, 0]


def test_a_restarted_replica_starts_with_what_its_group_has_learned() -> None:
    driver = FleetDriver(fleet_config(CORE, 2, routing="round_robin"))
    driver.drain(1)
    run_on(driver, 0, 40)
    driver.drain(1, draining=False)
    driver.kill(1)
    driver.revive(1)
    assert costs(driver)[1].samples == 20
    assert costs(driver)[1].pace == 1.0


def test_a_slow_replica_is_placed_on_less_and_the_recording_replays_byte_for_byte() -> None:
    """One takes three times as long as the other; then it is as quick again. It dies, and comes back, besides."""
    config = fleet_config(CORE, 2, routing="hybrid")
    driver = FleetDriver(config)
    driver.arrive(
        *(request(f"r{n}", [n, *range(9)], max_tokens=150, ignore_eos=True) for n in range(8)),
    )
    for _ in range(40):
        for replica in (1, 1, 0):
            driver.step(replica)
    slow, quick = costs(driver)
    assert slow.pace > BAND
    assert quick.pace == 1.0
    assert [member.requests for member in driver.fleet.members] == [4, 4]
    driver.arrive(*(request(f"late {n}", [n, 7, *range(9)], max_tokens=20) for n in range(6)))
    assert driver.fleet.members[0].requests < driver.fleet.members[1].requests
    driver.kill(0)
    driver.revive(0)
    driver.arrive(*(request(f"later {n}", [n, 8, *range(9)], max_tokens=20) for n in range(6)))
    driver.finish()
    assert replayed(config, driver.events) == replayed(config, driver.events)


def test_loads_of_another_device_are_ahead_only_on_the_disk_whose_readers_serve_all() -> None:
    tiers = ResidencyConfig(host_blocks=400, disk_blocks=400)
    driver = FleetDriver(fleet_config(core_config(blocks=200, max_batch_tokens=200, residency=tiers), 2))
    driver.tier_up()
    driver.arrive(request("before", range(80), max_tokens=2))
    driver.finish()
    for tier, others in ((HOST, {}), (DISK, {DISK: 19 * 1000})):
        driver.feed(Pruned(DEVICE, 0))
        if tier == DISK:
            driver.feed(Pruned(HOST, 0))
        driver.arrive(request(f"from {tier}", range(80), max_tokens=2))
        loading, idle = sorted(driver.fleet.cores, key=lambda core: core.idle)
        assert ahead(loading) == {tier: 19 * 1000}
        assert ahead(idle) == others
        driver.finish()


def ahead(core: Core) -> dict[str, int]:
    """Bytes that a load there would be behind, by tier."""
    return {tier: size for tier, size in core.scheduler.valuation.situation(()).ahead_bytes.items() if size}
