"""The fleet's promises in pure form: where requests go, what is charged for them, and who takes over from whom."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from engine.events import Event
from engine.fleet import BalanceConfig, Fleet, FleetConfig, ReplicaConfig
from engine.recording import line
from engine.request import FinishReason, Request
from kvstore.below import ResidencyConfig
from tests.engine.driving import VOCABULARY, core_config, request
from tests.engine.fleet_driving import FleetDriver, fleet_config
from tests.engine.test_migration import TIERS, asked, play, unmigrated

ROOMY = core_config(blocks=200, max_sequences=40, residency=TIERS)


@pytest.mark.parametrize("replicas", [2, 3, 5, 8])
def test_simultaneous_equal_prompts_are_spread_evenly(replicas: int) -> None:
    """64 that share nothing; so many on each that counts differ by one at most."""
    driver = FleetDriver(fleet_config(ROOMY, replicas, routing="least_load"))
    driver.arrive(*(request(f"r{number}", [number, 97 - number, *range(10)]) for number in range(64)))
    counts = [member.requests for member in driver.fleet.members]
    assert sum(counts) == 64
    assert max(counts) - min(counts) <= 1
    driver.finish()


def test_a_mass_disconnect_returns_every_figure_to_zero() -> None:
    driver, random = FleetDriver(fleet_config(ROOMY, 3, routing="least_load")), Random(1)
    requests = asked(60)
    driver.arrive(*requests)
    for _ in range(100):
        driver.anything(random)
    driver.migrate("r1")
    assert all(member.charged_seconds > 0 for member in driver.fleet.members)
    for each in requests:
        driver.cancel(each.id)
    for member in driver.fleet.members:
        assert (member.requests, member.charged_seconds, member.backlog_seconds) == (0, 0.0, 0.0)
        assert (member.forecast_tokens, member.waiting) == (0.0, 0)
    driver.finish(random)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("replicas", [2, 4])
def test_one_replica_dies_and_every_stream_is_right(seed: int, replicas: int) -> None:
    """At a random moment under pressure, with waiters, loads and migrations under way; some come back up."""
    requests = asked(30, seed)
    core = core_config(blocks=60, residency=TIERS)
    driver, random = FleetDriver(fleet_config(core, replicas, routing="least_load")), Random(seed)
    driver.tier_up()

    def trouble() -> None:
        up = [member.number for member in driver.fleet.members if member.up]
        if len(up) > 1 and random.random() < 0.3:
            driver.kill(random.choice(up))
        elif len(up) < replicas and random.random() < 0.3:
            driver.revive(next(member.number for member in driver.fleet.members if not member.up))
        elif running := driver.fleet.requests:
            driver.migrate(random.choice(running))

    play(driver, requests, random, 40, trouble)
    driver.finish(random)
    assert {key: driver.answer(*key) for key in driver.deltas} == unmigrated(requests)
    assert any(over.reason == "failure" for over in driver.migrations)


def test_what_was_saved_of_a_dead_replicas_requests_is_not_computed_again() -> None:
    driver = FleetDriver(fleet_config(core_config(blocks=100, every_tokens=4, residency=TIERS), 2))
    driver.arrive(request("a", range(40), max_tokens=60))
    for _ in range(20):
        driver.step(0)
        while driver.copy():
            pass
    driver.kill(0)
    driver.finish()
    (ended,) = driver.finished.values()
    assert ended.reason is FinishReason.LENGTH
    assert ended.recomputed_tokens < 8, "only what was not in a saved block"


def test_with_the_last_replica_its_requests_end_with_an_error() -> None:
    driver = FleetDriver(fleet_config(ROOMY, 2))
    driver.arrive(request("a", range(10)), request("b", range(20)))
    driver.kill(0)
    driver.kill(1)
    assert {ended.reason for ended in driver.finished.values()} == {FinishReason.ERROR}
    driver.finish()
    driver.arrive(request("c", range(10)))
    assert driver.rejected["c"].code == "no_replica"


def unlike(*sizes: tuple[int, int], **policies: str) -> FleetConfig:
    """Replicas of so many blocks, with so many tokens as limit of their class."""
    core = core_config(residency=TIERS)
    names = core.scheduler.policies.having(policies)
    cores = [
        replace(core, scheduler=replace(core.scheduler, blocks=blocks, policies=names)) for blocks, _ in sizes
    ]
    return FleetConfig(
        tuple(ReplicaConfig(core, limit_tokens=limit) for core, (_, limit) in zip(cores, sizes, strict=True))
    )


def test_a_request_goes_where_it_fits_and_is_refused_where_it_fits_nowhere() -> None:
    driver = FleetDriver(unlike((10, 0), (50, 0), routing="round_robin"))
    driver.arrive(*(request(f"long{number}", range(60), max_tokens=40) for number in range(3)))
    assert [member.placed for member in driver.fleet.members] == [0, 3]
    driver.arrive(request("huge", range(60), max_tokens=150))
    assert driver.rejected["huge"].code == "context_length_exceeded"
    assert "context is 200 tokens" in driver.rejected["huge"].message
    driver.kill(1)
    assert {ended.reason for ended in driver.finished.values()} == {FinishReason.ERROR}
    driver.arrive(request("late", range(60), max_tokens=40))
    assert driver.rejected["late"].code == "no_replica", "the one that could take it is down"
    driver.finish()


def test_one_that_crosses_its_limit_moves_up_exactly_once() -> None:
    """Two classes, limit 30; each of those that grow beyond it moves once, however often loads are compared."""
    config = unlike((60, 30), (200, 0), routing="size_classes", rebalancing="cache_size")
    driver, random = FleetDriver(config), Random(0)
    driver.drain(1)
    driver.arrive(*(request(f"r{n}", [n, *range(9)], max_tokens=60, ignore_eos=True) for n in range(4)))
    driver.drain(1, draining=False)
    before = Counter(core.replica for core in driver.fleet.cores for _ in core.sequences)
    while driver.anything(random):
        driver.timer()
    driver.finish()
    moved = Counter(over.request_id for over in driver.migrations if not over.failure)
    crossing = [over for over in driver.migrations if over.reason == "cache_size" and not over.failure]
    assert before[0] == 4
    assert moved == Counter({f"r{number}": 1 for number in range(4)})
    assert all((over.source, over.target) == (0, 1) for over in crossing)


def test_one_whose_class_is_full_stays_and_is_counted() -> None:
    config = unlike((60, 30), (25, 0), routing="size_classes", rebalancing="cache_size")
    driver, random = FleetDriver(config), Random(0)
    driver.arrive(request("big", range(60), max_tokens=30, ignore_eos=True))
    driver.drain(1)
    driver.arrive(*(request(f"r{n}", [n, *range(9)], max_tokens=60, ignore_eos=True) for n in range(3)))
    driver.drain(1, draining=False)
    while driver.anything(random):
        driver.timer()
    driver.finish()
    assert driver.fleet.stayed > 0


def test_limits_of_size_classes_are_learned() -> None:
    config = unlike((60, 0), (60, 0), routing="size_classes", rebalancing="none")
    config = replace(config, balance=BalanceConfig(limits="auto"))
    driver, random = FleetDriver(config), Random(0)
    for number in range(60):
        driver.arrive(
            request(f"r{number}", [number, *range(8 + number % 30)], max_tokens=20, ignore_eos=True)
        )
        for _ in range(30):
            driver.anything(random)
    driver.finish(random)
    driver.timer()
    small, large = (member.limit_tokens for member in driver.fleet.members)
    assert large == 0
    assert 30 < small < 58


def test_uneven_loads_are_evened_out_and_do_not_go_back_and_forth() -> None:
    config = fleet_config(ROOMY, 2, routing="least_load", rebalancing="load_pairs")
    config = replace(config, balance=BalanceConfig(cooldown_seconds=1e9, min_gain=1.0))
    driver, random = FleetDriver(config), Random(0)
    driver.drain(1)
    driver.arrive(*(request(f"r{n}", [n, *range(9)], max_tokens=100, ignore_eos=True) for n in range(10)))
    driver.drain(1, draining=False)
    while driver.anything(random):
        driver.timer()
    driver.finish()
    moved = Counter(over.request_id for over in driver.migrations if not over.failure)
    assert len(moved) >= 3
    assert set(moved.values()) == {1}


def uneven(residency: ResidencyConfig, slots: int) -> FleetDriver:
    """Four long ones at one replica, and four short ones at the other, that has so many slots."""
    core = core_config(blocks=400, max_sequences=4, residency=residency)
    config = fleet_config(core, 2, rebalancing="load_pairs")
    first, second = config.replicas
    scheduler = replace(second.core.scheduler, max_sequences=slots)
    second = replace(second, core=replace(second.core, scheduler=scheduler))
    driver = FleetDriver(replace(config, replicas=(first, second)))
    members = driver.fleet.members
    for replica, length in ((0, 900), (1, 60)):
        members[1 - replica].draining = True
        prompts = ([replica, number, *range(10)] for number in range(4))
        driver.arrive(*(request(f"{replica}.{p[1]}", p, max_tokens=length, ignore_eos=True) for p in prompts))
        members[1 - replica].draining = False
        for _ in range(4):
            driver.step(replica)
    return driver


def test_nobody_who_runs_is_moved_to_where_no_slot_is_left() -> None:
    for slots, moves in ((4, False), (8, True)):
        driver = uneven(TIERS, slots)
        driver.timer()
        assert (len(driver.fleet.moves) > 0) == moves
        driver.finish()
        assert not any(over.failure for over in driver.migrations)


def test_one_that_could_not_move_is_left_alone_for_a_while() -> None:
    driver = uneven(ResidencyConfig(host_blocks=1), slots=8)
    for _ in range(9):
        driver.now += 1.0
        driver.timer()
        while driver.copy():
            pass
    failed = Counter(over.request_id for over in driver.migrations if over.failure)
    assert failed
    assert set(failed.values()) == {1}
    driver.finish()
    assert {ended.migrations for ended in driver.finished.values()} == {0}


@pytest.mark.parametrize("returning", [False, True])
def test_a_waiter_is_not_taken_away_from_its_prefix(returning: bool) -> None:
    """A move evens loads out, but elsewhere 250 tokens are computed again."""
    core = core_config(blocks=300, max_sequences=1)
    driver = FleetDriver(fleet_config(core, 2, routing="least_load", rebalancing="load_pairs"))
    driver.drain(1)
    prompt = list(range(250))
    driver.arrive(request("before", prompt if returning else [7, *prompt], max_tokens=2))
    driver.finish()
    driver.arrive(request("ahead", [8, *range(700)], max_tokens=190, ignore_eos=True))
    for _ in range(50):
        driver.step(0)
    driver.arrive(request("waiting", [*prompt, 5], max_tokens=2))
    driver.drain(1, draining=False)
    driver.timer()
    assert [over.request_id for over in driver.migrations] == ([] if returning else ["waiting"])
    driver.finish()


@pytest.mark.parametrize("lost", [False, True])
def test_waiters_of_a_replica_that_drains_or_is_lost_are_spread(lost: bool) -> None:
    """Each that has been sent is seen where it is before the next is placed."""
    core = core_config(blocks=200, max_sequences=2)
    driver = FleetDriver(fleet_config(core, 3, routing="predicted_load"))
    members = driver.fleet.members
    many = [request(f"r{number}", range(number, number + 30), max_tokens=200) for number in range(14)]
    for only, requests in ((1, [request("there", range(8), max_tokens=20)]), (0, many)):
        for member in members:
            member.draining = member.number != only
        driver.arrive(*requests)
    for member in members:
        member.draining = False
    if lost:
        driver.kill(0)
    else:
        driver.drain(0)
    assert members[0].requests == 0
    assert abs(members[1].requests - members[2].requests) <= 1
    driver.finish()


def test_sessions_go_where_they_were() -> None:
    driver = FleetDriver(fleet_config(ROOMY, 4, routing="session"))
    for turn in range(3):
        for session in range(8):
            asked_by = request(f"r{session}.{turn}", [session, turn, *range(8)])
            driver.arrive(replace(asked_by, session=f"s{session}"))
        driver.finish()
    placed: dict[str, set[str]] = {}
    for told in driver.decided:
        if told.decision.kind == "placed":
            placed.setdefault(told.request_id.split(".")[0], set()).add(told.decision.chosen)
    assert len(placed) == 8
    assert all(len(replicas) == 1 for replicas in placed.values())


def test_forecasts_are_compared_again_soon_after_a_restart() -> None:
    config = replace(fleet_config(ROOMY, 2), balance=BalanceConfig(horizon_steps=4))
    driver = FleetDriver(config)
    member, compared = driver.fleet.members[0], [0]
    for name in ("before", "after"):
        driver.drain(1)
        driver.arrive(request(name, range(8), max_tokens=40, ignore_eos=True))
        while driver.step(0):
            driver.timer()
        compared.append(member.errors.compared)
        driver.drain(1, draining=False)
        driver.kill(0)
        driver.revive(0)
    assert compared[1] > 30
    assert compared[2] == 2 * compared[1]


def replayed(config: FleetConfig, events: list[tuple[float, Event]]) -> list[bytes]:
    fleet = Fleet(config, VOCABULARY)
    return [line(now, event, fleet.handle(event, now)) for now, event in events]


def test_the_same_events_give_the_same_instructions(tmp_path: Path) -> None:
    config = fleet_config(
        core_config(blocks=60, residency=TIERS), 3, routing="hybrid", rebalancing="load_pairs"
    )
    driver, random = FleetDriver(config), Random(5)
    driver.tier_up()

    def now_and_then() -> None:
        choice = random.randrange(4)
        if choice == 0 and driver.fleet.members[2].up:
            driver.kill(2)
        elif choice == 1 and not driver.fleet.members[2].up:
            driver.revive(2)
        elif choice == 2:
            driver.timer()
        elif driver.fleet.requests:
            driver.migrate(random.choice(driver.fleet.requests))

    play(driver, asked(20, 5), random, 10, now_and_then)
    driver.finish(random)
    assert replayed(config, driver.events) == replayed(config, driver.events)
    assert driver.moved()


def crowd(count: int) -> list[Request]:
    return [request(f"r{number}", [number, *range(12)], max_tokens=12) for number in range(count)]


def test_the_queue_is_the_fleets() -> None:
    core = core_config(blocks=8, max_sequences=1, max_queue=6, residency=ResidencyConfig())
    driver = FleetDriver(fleet_config(core, 2, routing="round_robin"))
    driver.arrive(*crowd(10))
    assert driver.fleet.waiting == 6
    assert [reject.code for reject in driver.rejected.values()] == ["queue_full"] * 2
    driver.finish()


def test_nobody_is_moved_where_it_does_not_fit() -> None:
    driver = FleetDriver(unlike((50, 0), (10, 0), routing="least_load"))
    driver.arrive(request("long", range(60), max_tokens=40))
    driver.step(0)
    driver.migrate("long", 1)
    assert [over.failure for over in driver.migrations] == ["the target is too small for it"]
    driver.finish()
    assert driver.finished["long", 0].migrations == 0
