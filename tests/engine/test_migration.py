"""Live migration: whoever migrates, and whatever fails, a stream is what it would have been, and nothing is left."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from engine.checkpoint import Checkpoints
from engine.events import Preempted, Reprioritised
from engine.fleet import BalanceConfig, FleetConfig, ReplicaConfig
from engine.ledger import Ledger
from engine.migration import Migration, Stage
from engine.moves import REASONS, Move, Moves
from engine.policy_set import PolicyConfig
from engine.request import Delta, Request, ServiceClass
from engine.sequence import State
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, HOST, Copy, Loss, Place
from policies.decisions import Kind
from tests.engine.driving import UNFORESEEN, core_config, request
from tests.engine.fleet_driving import FleetDriver, fleet_config
from tests.engine.test_step_work import counted

TIERS = ResidencyConfig(host_blocks=400, disk_blocks=400, transaction_blocks=4, copy_blocks=4)


def asked(count: int, seed: int = 0) -> list[Request]:
    """Penalties in all; stop strings, logprobs and several choices in some."""
    random = Random(seed)
    return [
        request(
            f"r{number}",
            [random.randrange(98) for _ in range(random.randrange(1, 40))],
            max_tokens=random.randrange(30, 160),
            seed=random.randrange(1000),
            stop=("XQ", "ZZ") if number % 3 == 0 else (),
            logprobs=0 if number % 2 else None,
            n=2 if number % 5 == 0 else 1,
        )
        for number in range(count)
    ]


def unmigrated(requests: list[Request]) -> dict[tuple[str, int], Delta]:
    driver = FleetDriver(fleet_config(core_config(blocks=200), 1))
    for each in requests:
        driver.arrive(each)
    driver.finish()
    return {key: driver.answer(*key) for key in driver.deltas}


def play(
    driver: FleetDriver, requests: list[Request], random: Random, every: int, now_and_then: Callable[[], None]
) -> None:
    """They come at random moments; `now_and_then`, once in about so many events, something else happens."""
    coming = list(requests)
    while coming or driver.fleet.requests:
        if coming and random.random() < 0.2:
            driver.arrive(coming.pop())
        elif random.randrange(every) == 0:
            now_and_then()
        elif not driver.anything(random) and not coming:
            break


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("below", [TIERS, ResidencyConfig(disk_blocks=400, transaction_blocks=4)])
def test_streams_that_migrate_at_random_moments_are_what_they_would_have_been(
    seed: int, below: ResidencyConfig
) -> None:
    requests = asked(24, seed)
    driver, random = FleetDriver(fleet_config(core_config(blocks=120, residency=below), 3)), Random(seed)
    driver.tier_up()

    def migrate() -> None:
        running = [
            (sequence.request.id, core.replica)
            for core in driver.fleet.cores
            for sequence in core.scheduler.running
        ]
        if running:
            request_id, here = random.choice(running)
            driver.migrate(request_id, (here + random.randrange(1, 3)) % 3)

    play(driver, requests, random, 8, migrate)
    driver.finish(random)
    expected = unmigrated(requests)
    assert {key: driver.answer(*key) for key in driver.deltas} == expected
    assert len(driver.moved(live=True)) > 30
    assert sum(finished.migrations for finished in driver.finished.values()) == len(driver.moved())


def test_a_sequence_migrates_live_with_a_pause_of_its_tails_copy() -> None:
    """Two steps at most that it is not in: one that ends at the source, and the one under way at the target."""
    driver = FleetDriver(fleet_config(core_config(blocks=120, residency=TIERS), 2))
    driver.arrive(request("a", range(30), max_tokens=60), request("b", range(50, 70), max_tokens=60))
    for _ in range(10):
        driver.step(0)
        driver.step(1)
    driver.migrate("a", 1)
    recomputed = sum(account.recomputed_tokens for account in driver.accounts)
    driver.finish()
    (over,) = driver.migrations
    assert (over.source, over.target, over.live, over.failure) == (0, 1, True, "")
    assert over.pause.steps <= 2
    assert over.pause.steps - over.pause.transfer_steps <= 1
    assert sum(account.recomputed_tokens for account in driver.accounts) == recomputed == 0
    assert driver.finished["a", 0].migrations == 1


def under_way(stage: Stage, replicas: int = 2, **core: Any) -> tuple[FleetDriver, Migration]:
    """ "a" has got so far on its way from replica 0 to replica 1."""
    driver = FleetDriver(fleet_config(core_config(blocks=200, residency=TIERS, **core), replicas))
    driver.drain(1)
    driver.arrive(request("a", range(30), max_tokens=300, ignore_eos=True))
    for _ in range(8):
        driver.step(0)
    driver.drain(1, draining=False)
    driver.migrate("a", 1)
    ((migration, _),) = driver.fleet.moves._under_way
    while migration.stage is not stage:
        assert driver.copy() or driver.step(0)
    return driver, migration


@pytest.mark.parametrize("stage", [Stage.COPYING, Stage.FETCHING, Stage.LEAVING, Stage.LANDING])
def test_a_priority_that_is_given_on_the_way_is_kept(stage: Stage) -> None:
    driver, _ = under_way(stage)
    driver.feed(Reprioritised("a", -5, ServiceClass("urgent")))
    while not driver.moved():
        assert driver.copy() or driver.step(0)
    (moved,) = driver.fleet.sequences_of("a")
    assert (moved.priority, moved.class_name) == (-5, "urgent")
    driver.finish()


def test_one_that_is_on_its_way_does_not_wait() -> None:
    """Nor does it fill a queue where nobody waits."""
    driver, _ = under_way(Stage.FETCHING, max_queue=1)
    assert driver.fleet.cores[1].scheduler.loading
    assert driver.fleet.waiting == 0
    driver.arrive(request("b", range(8)))
    assert not driver.rejected
    driver.finish()


def test_what_is_charged_for_one_on_its_way_is_not_taken_off_the_targets_waiters() -> None:
    driver, _ = under_way(Stage.FETCHING, max_sequences=1)
    driver.drain(0)
    driver.arrive(*(request(f"q{number}", range(number, number + 8), max_tokens=20) for number in range(2)))
    driver.drain(0, draining=False)
    target = driver.fleet.members[1]
    assert len(target.core.scheduler.life.line) == 2
    assert target.waiting_seconds == target.charged_seconds > 0.0
    driver.finish()


def test_what_a_sequence_leaves_behind_gives_way_before_what_is_older() -> None:
    """The target has it."""
    driver = FleetDriver(fleet_config(core_config(blocks=40, residency=TIERS), 2))
    driver.drain(1)
    older, moves = list(range(50, 80)), list(range(30))
    driver.arrive(request("older", older, max_tokens=2))
    driver.finish()
    driver.arrive(request("moves", moves, max_tokens=60, ignore_eos=True))
    for _ in range(10):
        driver.step(0)
    driver.drain(1, draining=False)
    driver.migrate("moves", 1)
    driver.finish()
    driver.drain(1)
    driver.arrive(request("fresh", range(100, 218), max_tokens=4))
    driver.finish()
    here = driver.fleet.cores[0]
    cached = [len(here.scheduler.pool.match(here.chain(request("", prompt))[1])) for prompt in (older, moves)]
    assert cached[0] == len(older) // 4 > cached[1]


def test_without_a_tier_below_it_is_computed_again_at_the_target() -> None:
    requests = asked(6)
    driver = FleetDriver(fleet_config(core_config(blocks=60), 2))
    driver.arrive(*requests)
    for _ in range(12):
        driver.step(0)
        driver.step(1)
    for each in requests:
        driver.migrate(each.id)
    driver.finish()
    assert driver.moved(live=False)
    assert sum(account.recomputed_tokens for account in driver.accounts) > 0
    assert {key: driver.answer(*key) for key in driver.deltas} == unmigrated(requests)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("trouble", ["abort", "full", "corrupt", "killed", "down"])
def test_whatever_goes_wrong_on_the_way_streams_are_right_and_nothing_is_left(
    trouble: str, seed: int
) -> None:
    requests = asked(20, seed)
    blocks = 50 if trouble == "full" else 120
    driver = FleetDriver(fleet_config(core_config(blocks=blocks, residency=TIERS), 3))
    random = Random(seed)
    driver.tier_up()
    cancelled: set[str] = set()
    killed: list[int] = []  # not without end: each takes from its requests what was not saved
    if trouble == "corrupt":

        def lost(copy: Copy, place: Place) -> Loss | None:
            corrupt = copy.source != DEVICE and random.random() < 0.2
            return Loss.CORRUPT if corrupt else None

        driver.lost = lost

    def now_and_then() -> None:
        moving = [migration for migration, _ in driver.fleet.moves._under_way]
        if trouble == "abort" and moving and random.random() < 0.5:
            cancelled.add(moving[0].sequence.request.id)
            driver.cancel(moving[0].sequence.request.id)
            return
        if trouble == "killed" and moving and len(killed) < 12 and random.random() < 0.3:
            target = moving[0].target.replica
            killed.append(target)
            driver.kill(target)
            driver.revive(target)
            return
        if trouble == "down" and moving and random.random() < 0.3:
            driver.tier_down(HOST)
            return
        running = [s.request.id for core in driver.fleet.cores for s in core.scheduler.running]
        if running:
            driver.migrate(random.choice(running), random.randrange(3))

    play(driver, requests, random, 6, now_and_then)
    driver.finish(random)
    expected = unmigrated(requests)
    answers = {key: driver.answer(*key) for key in driver.deltas}
    for key, answer in expected.items():
        if key[0] not in cancelled:
            assert answers[key] == answer
    failures = {migration.failure for migration in driver.migrations if migration.failure}
    assert failures or trouble == "down", "nothing went wrong on the way"


def test_while_the_way_down_is_full_of_others_blocks_none_is_offered_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = core_config(blocks=200, residency=replace(TIERS, spilling_blocks=2), every_tokens=1000)
    driver = FleetDriver(fleet_config(core, 2))
    driver.drain(1)
    driver.arrive(*(request(name, range(30), max_tokens=60, ignore_eos=True, salt=name) for name in "ab"))
    for _ in range(8):
        driver.step(0)
    driver.drain(1, draining=False)
    for name in "ab":
        driver.migrate(name, 1)
    calls = counted(monkeypatch, Checkpoints, "save_all")
    for _ in range(20):
        driver.step(0)
    assert calls["save_all"] == 0
    driver.finish()
    assert calls["save_all"] > 0
    assert len(driver.moved(live=True)) == 2


def test_a_waiter_goes_at_once() -> None:
    driver = FleetDriver(fleet_config(core_config(blocks=20, max_sequences=1, residency=TIERS), 2))
    driver.arrive(*(request(f"r{number}", range(number, number + 20), max_tokens=20) for number in range(6)))
    waiter = next(s for core in driver.fleet.cores for s in core.scheduler.life.line)
    source = next(core.replica for core in driver.fleet.cores if waiter.request.id in core.sequences)
    driver.migrate(waiter.request.id, 1 - source)
    assert [(m.request_id, m.live, m.failure) for m in driver.migrations] == [(waiter.request.id, False, "")]
    driver.finish()


@pytest.mark.parametrize("lost", [False, True])
def test_that_it_has_moved_is_told_before_it_is_admitted_there(lost: bool) -> None:
    driver = FleetDriver(fleet_config(core_config(), 2))
    driver.arrive(request("a", range(10), max_tokens=20))
    driver.step(0)
    if lost:
        driver.kill(0)
    else:
        driver.migrate("a", 1)
    kinds = [each.decision.kind for each in driver.decided]
    assert kinds == [Kind.PLACED, Kind.ADMITTED, Kind.MIGRATED, Kind.ADMITTED]
    driver.finish()


def test_a_wait_goes_on_where_the_waiter_goes() -> None:
    """By what has been served since it began, there and here, it is promoted; and its seconds count once."""
    policies = PolicyConfig(order="sjf", parameters={**UNFORESEEN, "promotion": {"service_tokens": 60}})
    core = core_config(max_sequences=1, policies=policies)
    driver = FleetDriver(fleet_config(core, 2))

    def arrive(replica: int, *names: str) -> None:
        driver.fleet.members[1 - replica].draining = True
        driver.arrive(*(request(name, range(8), max_tokens=100, ignore_eos=True) for name in names))
        driver.fleet.members[1 - replica].draining = False

    def step(replica: int, times: int) -> None:
        for _ in range(times):
            assert driver.step(replica)

    arrive(1, "runs there", "longer")
    arrive(0, "runs here", "waits")
    step(0, 40)
    step(1, 20)
    (longer,) = driver.fleet.sequences_of("longer")
    driver.migrate("waits", 1)
    assert [(each.target, each.failure) for each in driver.migrations] == [(1, "")]
    step(1, 25)
    (waits,) = driver.fleet.sequences_of("waits")
    assert waits in driver.fleet.cores[1].sequences["waits"]
    assert (waits.promoted, longer.promoted) == ("service", "")
    driver.migrate("waits", 0)
    (waits,) = driver.fleet.sequences_of("waits")
    assert (waits.promoted, waits.promotions) == ("service", 1)
    driver.finish()
    ended = driver.finished["waits", 0]
    assert ended.admitted is not None
    assert ended.queued_seconds == pytest.approx(ended.admitted - ended.arrived)


def test_a_drained_replica_hands_on_all_it_has_and_takes_again_when_it_may() -> None:
    requests = asked(12)
    driver = FleetDriver(fleet_config(core_config(blocks=120, residency=TIERS), 3))
    driver.arrive(*requests)
    for _ in range(4):
        driver.step(1)
    driver.drain(1)
    late = [request(f"late{number}", range(5)) for number in range(6)]
    for each in late:
        driver.arrive(each)
    assert driver.fleet.members[1].placed == 4 or driver.fleet.members[1].placed < 8
    random = Random(0)
    while driver.fleet.cores[1].sequences:
        assert driver.anything(random)
    assert driver.fleet.requests, "others go on"
    driver.drain(1, draining=False)
    before = driver.fleet.members[1].placed
    driver.arrive(*(request(f"later{number}", range(5)) for number in range(6)))
    assert driver.fleet.members[1].placed > before
    driver.finish(random)
    assert {key: driver.answer(*key) for key in driver.deltas if key[0].startswith("r")} == unmigrated(
        requests
    )


def test_moves_that_wait_for_their_turn_do_not_begin_to_where_a_drain_has_begun() -> None:
    driver = FleetDriver(fleet_config(core_config(blocks=200, max_sequences=16, residency=TIERS), 2))
    driver.drain(1)
    driver.arrive(*(request(f"r{n}", range(n, n + 8), max_tokens=400, ignore_eos=True) for n in range(8)))
    for _ in range(8):
        driver.step(0)
    driver.drain(1, draining=False)
    for number in range(8):
        driver.migrate(f"r{number}", 1)
    driver.drain(1)
    assert [over.failure for over in driver.migrations] == ["the target drains"] * 8
    driver.finish()
    assert {ended.replica for ended in driver.finished.values()} == {0}


class Counted(str):
    """A request id that counts how often it is looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        Counted.looked_up += 1
        return super().__hash__()


def test_to_want_many_moves_takes_as_much_for_each_as_to_want_few() -> None:
    moves = Moves([], Ledger(1), 4, lambda sequence, here: None)
    moves.want(Move(Counted(f"r{number}"), 0, None, "drain") for number in range(1000))
    assert len(moves) == 1000
    assert Counted.looked_up <= 5 * 1000


def test_an_operators_move_takes_the_turn_of_one_that_a_policy_wants() -> None:
    moves = Moves([], Ledger(1), 4, lambda sequence, here: None)
    load, operator, drain = (
        Move("r", 0, 1, "load"),
        Move("r", 0, 2, "operator"),
        Move("r", 0, None, "drain"),
    )
    again = Move("r", 0, 3, "operator")
    for move, waits in ((load, load), (operator, operator), (drain, operator), (again, again)):
        moves.want([move])
        assert list(moves._wanted.values()) == [waits]


def test_an_operators_move_of_who_is_on_its_way_elsewhere_follows_when_it_is_there() -> None:
    driver = FleetDriver(fleet_config(core_config(blocks=200, residency=TIERS), 3))
    driver.arrive(request("a", range(30), max_tokens=60, ignore_eos=True))
    for _ in range(8):
        driver.step(0)
    driver.migrate("a", 1)
    driver.migrate("a", 2)
    driver.migrate("a")
    assert len(driver.fleet.moves._under_way) == 1
    driver.finish()
    assert [(over.target, over.failure) for over in driver.migrations] == [(1, ""), (2, "")]
    assert driver.finished["a", 0].replica == 2


def test_who_was_on_its_way_from_a_drained_replica_to_one_that_dies_goes_on_elsewhere() -> None:
    driver, _ = under_way(Stage.FETCHING, replicas=3)
    driver.drain(0)
    driver.kill(1)
    driver.finish()
    assert [(over.target, over.reason) for over in driver.moved()] == [(2, "drain")]
    assert driver.finished["a", 0].replica == 2


def unlike(*replicas: ReplicaConfig, **policies: str) -> FleetConfig:
    first, *others = replicas
    names = fleet_config(first.core, 1, **policies).replicas[0].core
    return FleetConfig((replace(first, core=names), *others))


def test_a_replica_that_could_never_hold_it_gets_no_sequence() -> None:
    """Whether it runs or waits: there it would wait for ever."""
    sizes = (core_config(blocks=60, max_sequences=1), core_config(blocks=20))
    driver = FleetDriver(unlike(*map(ReplicaConfig, sizes)))
    for name in ("runs", "waits"):
        driver.arrive(request(name, range(20), max_tokens=100))
        driver.migrate(name, 1)
        driver.migrate(name)
    over = [(m.request_id, m.reason, m.failure) for m in driver.migrations]
    assert over == [
        (name, "operator", failure)
        for name in ("runs", "waits")
        for failure in ("the target is too small for it", "no other replica takes it")
    ]
    driver.finish()
    assert driver.finished["waits", 0].replica == 0
    assert {each.decision.kind for each in driver.decided} >= {Kind.STAYED}
    assert {each.decision.policy for each in driver.decided if each.decision.kind is Kind.STAYED} == {""}


def test_who_has_outgrown_its_replica_moves_up_once_and_the_reason_says_so() -> None:
    core = core_config(blocks=60, residency=TIERS)
    replicas = (
        ReplicaConfig(core, limit_tokens=20),
        ReplicaConfig(core, limit_tokens=40),
        ReplicaConfig(core),
    )
    driver = FleetDriver(unlike(*replicas, rebalancing="cache_size"))
    driver.arrive(request("a", range(10), max_tokens=100))
    random = Random(0)
    while driver.fleet.requests:
        driver.timer()
        driver.anything(random)
    (moved,) = driver.moved()
    assert (moved.source, moved.target, moved.reason) == (0, 2, "size")
    assert moved.detail.endswith("tokens, above 20")
    assert all(each.reason in REASONS for each in driver.migrations)
    driver.finish()


def test_a_move_to_even_loads_out_says_so() -> None:
    core = core_config(blocks=200, residency=TIERS, max_sequences=16)
    config = unlike(ReplicaConfig(core), ReplicaConfig(core), routing="session", rebalancing="load_pairs")
    driver = FleetDriver(replace(config, balance=BalanceConfig(min_gain=1.0)))
    for number in range(8):
        session = replace(request(f"r{number}", range(number, number + 20), max_tokens=60), session="s")
        driver.arrive(session)
    random = Random(0)
    while driver.fleet.requests:
        driver.timer()
        driver.anything(random)
    assert {each.reason for each in driver.moved()} == {"load"}
    decided = [each.decision for each in driver.decided if each.decision.kind is Kind.MIGRATED]
    assert {each.policy for each in decided} == {"load_pairs"}
    driver.finish()


def test_a_waiter_goes_on_when_what_another_replica_saves_of_it_is_there() -> None:
    """It moved while the tail of its snapshot was being written: nothing else happens where it waits."""
    core = core_config(blocks=100, every_tokens=4, residency=TIERS)
    driver = FleetDriver(fleet_config(core, 2, routing="round_robin"))
    driver.arrive(request("a", range(10), max_tokens=20, ignore_eos=True))
    for _ in range(6):
        driver.step(0)
        while driver.copy():
            pass
    driver.feed(Preempted("a"))
    driver.migrate("a", 1)
    waiter = driver.fleet.sequences_of("a")[0]
    assert waiter.state is State.WAITING
    assert waiter in driver.fleet.cores[1].sequences["a"]
    driver.finish()
    assert len(driver.tokens("a")) == 20
