"""Fleets in virtual time: the same each time, every request with its length, however many replicas."""

from dataclasses import replace

import pytest

from engine.candidates import Prompt, Wanted, candidate, work_seconds
from engine.events import Arrived, Event
from engine.fleet import BalanceConfig, Fleet, FleetConfig, Told
from engine.profile import Between
from engine.simulation import VOCABULARY, Outcome, Simulation
from kvstore.below import ResidencyConfig
from tests.engine.fleet_driving import fleet_config
from tests.engine.test_simulation import PROFILE, Jobs, config, job, workload

BALANCE = BalanceConfig(period_seconds=0.2, cooldown_seconds=0.5, min_gain=1.0)
"""Eager, so that short runs have migrations."""


def fleet(replicas: int, **policies: str) -> FleetConfig:
    core = config(residency=ResidencyConfig(host_blocks=400))
    return replace(fleet_config(core, replicas, **policies), balance=BALANCE)


def play(jobs: Jobs, fleet_of: FleetConfig) -> Outcome:
    return Simulation(fleet_of, PROFILE, jobs).run()


def lengths(outcome: Outcome) -> dict[int, int]:
    return {served.number: served.output_tokens for served in outcome.served}


def wanted(jobs: Jobs) -> dict[int, int]:
    return {number: job.output_tokens for number, (_, job) in jobs.jobs.items()}


def skewed() -> FleetConfig:
    """All start where they have the least seconds charged, though answers differ; so loads drift apart."""
    return fleet(4, routing="round_robin", rebalancing="load_pairs")


def test_the_same_workload_on_a_fleet_gives_the_same_event_log_with_migrations() -> None:
    first, second = (play(workload(60, gap=0.01), skewed()) for _ in range(2))
    assert any(not each.failure for each in first.migrations), "nobody has moved"
    assert first.digest == second.digest
    assert [m.request_id for m in first.migrations] == [m.request_id for m in second.migrations]


@pytest.mark.parametrize("rebalancing", ["none", "load_pairs"])
@pytest.mark.parametrize("routing", ["hybrid", "round_robin", "cache_aware"])
def test_every_request_gets_its_length_on_whichever_replica(routing: str, rebalancing: str) -> None:
    jobs = workload(40, gap=0.01)
    outcome = play(jobs, fleet(4, routing=routing, rebalancing=rebalancing))
    assert lengths(outcome) == wanted(jobs)
    assert len(outcome.busy_by_replica) == 4
    assert sum(outcome.busy_by_replica) == pytest.approx(outcome.busy_seconds)


def test_what_a_request_waits_for_and_delays_is_seen_where_it_might_go() -> None:
    """Another's prompt counts as far as its own takes; its prefill delays all who are there."""
    machine = Fleet(fleet(2, routing="hybrid"), VOCABULARY)
    keys = machine.cores[0].chain
    long, short = job(1, [7] * 400, 5).request, job(2, [8] * 40, 5).request
    machine.handle(Arrived(long), 0.0)
    member, idle = machine.members if machine.cores[0].sequences else reversed(machine.members)
    size = machine.cores[0].config.scheduler.block_size
    wanted = Wanted(Prompt(len(short.prompt), keys(short)[1][: 39 // size]), 5.0, False, None)
    there, elsewhere = candidate(member, wanted), candidate(idle, wanted)
    own = there.prefill_seconds - there.saved_seconds
    assert there.ahead_seconds == pytest.approx(own)
    assert there.disturbed_seconds > own
    assert (elsewhere.ahead_seconds, elsewhere.disturbed_seconds) == (0.0, 0.0)
    assert work_seconds(member, wanted) == there.work_seconds


def test_choices_that_end_count_though_their_replica_is_told_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is when a move gets further with the same event."""
    slow = replace(PROFILE, between=Between(finished=0.01))
    before = Simulation(skewed(), slow, workload(20)).run()
    handle = Fleet.handle

    def told_more(self: Fleet, event: Event, now: float) -> list[Told]:
        told = handle(self, event, now)
        return [*told, *(each._replace(instructions=[]) for each in told)]

    monkeypatch.setattr(Fleet, "handle", told_more)
    assert Simulation(skewed(), slow, workload(20)).run().digest == before.digest


def test_several_replicas_are_sooner_done_than_one() -> None:
    one, four = (play(workload(40, gap=0.01), fleet(replicas, routing="hybrid")) for replicas in (1, 4))
    assert four.seconds < one.seconds / 2


def test_64_replicas_run() -> None:
    jobs = workload(128, gap=0.002)
    outcome = play(jobs, fleet(64, routing="hybrid", rebalancing="load_pairs"))
    assert lengths(outcome) == wanted(jobs)
    assert all(outcome.busy_by_replica), "a replica had nothing to do"
