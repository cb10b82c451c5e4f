"""The simulator: the core's decisions on virtual time, the same each time, taking the time that a profile says."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytest

from engine.checkpoint import CheckpointConfig
from engine.core import CoreConfig
from engine.events import Event, Resumed
from engine.fleet import BalanceConfig, FleetConfig, ReplicaConfig, Told
from engine.plan import Sampling
from engine.policy_set import PolicyConfig
from engine.profile import Between, Profile, ProfileError, Transfer
from engine.recording import line
from engine.request import Request, Stopping
from engine.scheduler import SchedulerConfig
from engine.simulated_lanes import SimulatedLanes
from engine.simulation import EOS, Job, Outcome, Simulation, Step
from engine.step_time import CurveTime
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, DISK, HOST, Copy, Place
from tests.engine.driving import UNFORESEEN

TRANSFERS = {
    route: Transfer(0.001, 1e6)
    for route in ("device>host", "host>device", "host>disk", "device>disk", "disk>host", "disk>device")
}
PROFILE = Profile(
    machine="a test",
    model="none",
    dtype="none",
    source="made up",
    block_size=16,
    block_bytes=1000,
    context=1000,
    kv_blocks=40,
    runs_ahead=False,
    step=CurveTime(dense=((0, 0.010), (100, 0.020)), head=((0, 0.0), (10, 0.010))),
    transfers=TRANSFERS,
)


@dataclass
class Jobs:
    """Requests by number: (arrival, job), and who follows whom."""

    jobs: dict[int, tuple[float, Job]]
    following: dict[int, list[tuple[float, int]]]

    def openings(self) -> Iterable[tuple[float, int]]:
        later = {number for those in self.following.values() for _, number in those}
        return [(at, number) for number, (at, _) in self.jobs.items() if number not in later]

    def job(self, number: int) -> Job:
        return self.jobs[number][1]

    def followers(self, number: int) -> Iterable[tuple[float, int]]:
        return self.following.get(number, ())


def job(
    number: int, prompt: list[int], output: int, *, known: bool = True, answer: tuple[int, ...] = ()
) -> Job:
    stopping = Stopping(output if known else 500, ignore_eos=known)
    return Job(Request(str(number), tuple(prompt), Sampling(seed=number), stopping), output, answer)


def workload(count: int = 24, *, known: bool = True, gap: float = 0.05) -> Jobs:
    """Prompts of 40 tokens, of which each four share two blocks, and answers of 30 to 69."""
    return Jobs(
        {
            n: (gap * n, job(n, [n // 4 + 1] * 32 + [1000 + n] * 8, 30 + n * 7 % 40, known=known))
            for n in range(count)
        },
        {},
    )


def config(
    blocks: int = 40, residency: ResidencyConfig | None = None, resume: str = "reload", **scheduler: Any
) -> CoreConfig:
    return CoreConfig(
        SchedulerConfig(
            16, blocks, 128, 16, residency=residency or ResidencyConfig(),
            policies=PolicyConfig(resume=resume, parameters=UNFORESEEN),
            checkpoint=CheckpointConfig(32, 5.0), **scheduler
        ),
        model_context=1000,
        max_queue=1000,
        eos_token_ids=(EOS,),
    )  # fmt: skip


def run(jobs: Jobs, core: CoreConfig | None = None, profile: Profile = PROFILE, **options: Any) -> Outcome:
    return Simulation(FleetConfig.of(core or config()), profile, jobs, **options).run()


def test_a_lone_request_takes_what_the_profile_says() -> None:
    """A prefill of 40 tokens and four decodes, each with one row that samples."""
    outcome = run(Jobs({0: (2.0, job(0, [1] * 40, 5))}, {}))
    (served,) = outcome.served
    assert served.first_token == pytest.approx(2.0 + 0.014 + 0.001)
    assert served.finished == pytest.approx(2.0 + 0.015 + 4 * (0.0101 + 0.001))
    assert served.longest_gap == pytest.approx(0.0111)
    assert (outcome.steps, outcome.computed_tokens, outcome.sampled_tokens) == (5, 44, 5)
    assert outcome.busy_seconds == pytest.approx(outcome.seconds - 2.0)


def test_what_passes_between_steps_counts_unless_the_next_is_launched_ahead() -> None:
    jobs = Jobs({0: (0.0, job(0, [1] * 40, 100))}, {})
    slow = replace(PROFILE, between=Between(((0, 0.002), (1, 0.003)), idle=0.004))
    alone = run(jobs).seconds
    assert run(jobs, profile=slow).seconds == pytest.approx(alone + 0.004 + 99 * 0.003)
    ahead = replace(config(), max_outstanding=2)
    assert run(jobs, ahead, slow).seconds == pytest.approx(alone + 0.004, abs=0.004)


def test_who_ends_and_who_begins_delays_the_next_launch() -> None:
    """Three prefills in steps of their own; two of these are of who comes beside a step, two end their request."""
    jobs = Jobs(
        {
            0: (0.0, job(0, [1] * 40, 1)),
            1: (0.0, job(1, [2] * 40, 30)),
            2: (0.1, job(2, [3] * 40, 1)),
        },
        {},
    )
    alone = run(jobs).seconds
    slow = replace(PROFILE, between=Between(finished=0.001, admitted=0.01, prefill=0.1))
    delayed = run(jobs, profile=slow).seconds
    assert delayed == pytest.approx(alone + 2 * 0.001 + 2 * 0.01 + 3 * 0.1)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("ahead", [1, 2])
def test_every_request_gets_its_recorded_length_whether_or_not_clients_know_it(
    known: bool, ahead: int
) -> None:
    jobs = workload(known=known)
    outcome = run(jobs, replace(config(), max_outstanding=ahead))
    assert {served.number: served.output_tokens for served in outcome.served} == {
        number: each.output_tokens for number, (_, each) in jobs.jobs.items()
    }
    assert outcome.unfinished == 0


TIERS = ResidencyConfig(host_blocks=60, disk_blocks=400, copy_blocks=4)


PAUSES = Between(((1, 0.001), (4, 0.003)), finished=0.0003, admitted=0.0002, prefill=0.0001, idle=0.0007)


@pytest.mark.parametrize("between", [Between(), PAUSES])
@pytest.mark.parametrize(
    ("residency", "resume"),
    [(None, "recompute"), (ResidencyConfig(host_blocks=400), "reload"), (TIERS, "reload")],
)
def test_the_same_workload_gives_the_same_event_log_byte_for_byte(
    residency: ResidencyConfig | None, resume: str, between: Between
) -> None:
    """Under pressure, with every tier; whoever records it gets what a live engine would."""

    def recorded() -> tuple[bytes, Outcome]:
        lines: list[bytes] = []

        def record(now: float, event: Event, told: list[Told]) -> None:
            lines.append(line(now, event, told))

        core = config(residency=residency, resume=resume)
        return b"\n".join(lines), run(workload(), core, profile, recorder=record)

    profile = replace(PROFILE, between=between)

    (first, outcome), (second, again) = recorded(), recorded()
    assert first == second
    assert outcome == again
    assert len(outcome.digest) == 64
    assert outcome.counts.preemptions > 0
    assert bool(outcome.copied_bytes) == (residency is not None)
    assert (
        outcome.digest != run(workload(gap=0.051), config(residency=residency, resume=resume), profile).digest
    )


def test_reloading_computes_less_again_than_recomputing() -> None:
    again = run(workload(), config(resume="recompute"))
    loaded = run(workload(), config(residency=ResidencyConfig(host_blocks=400)))
    assert again.recomputed_tokens > loaded.recomputed_tokens
    assert loaded.counts.resumptions["reload", "host"] > 0


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("resume", ["reload", "recompute"])
@pytest.mark.parametrize("between", [Between(), Between(copy=0.002, copied_byte=2e-7)])
def test_what_is_predicted_of_a_way_back_comes_true(between: Between, resume: str, runs_ahead: bool) -> None:
    """The median within a tenth, once steps and copies have been seen: by either way, and whether or not a step is told
    while one is under way, or copies keep the next one waiting.
    """
    profile = replace(PROFILE, between=between, runs_ahead=runs_ahead)
    core = config(50, ResidencyConfig(host_blocks=1000), resume, block_bytes=PROFILE.block_bytes)
    core = replace(core, max_outstanding=2 if runs_ahead else 1)
    returns = run(workload(200, gap=0.03), core, profile).returns[5:]
    assert len(returns) > 20
    errors = [abs(each.predicted_seconds / each.actual_seconds - 1) for each in returns]
    assert median(errors) <= 0.1


def test_copies_keep_the_next_step_waiting_where_the_profile_says_so() -> None:
    residency = ResidencyConfig(host_blocks=100)
    quick, slow = (
        run(workload(4), config(residency=residency, block_bytes=1000), replace(PROFILE, between=between))
        for between in (Between(), Between(copy=0.5, copied_byte=1e-6))
    )
    copied = slow.copied_bytes["device>host"]
    assert copied == quick.copied_bytes["device>host"] > 0
    assert slow.seconds > quick.seconds + 0.5 + 1e-6 * copied


def test_equal_prefixes_are_found_and_followers_find_the_answers_before_them() -> None:
    """The first two blocks of three in four; a follow-up finds the prompt and the answer of its predecessor."""
    assert run(workload(), config(blocks=400)).counts.prefix_hits == 24 * 3 // 4 * 32
    answer = tuple(range(300, 324))
    first, then = job(0, [1] * 40, 24, answer=answer), job(1, [1] * 40 + list(answer) + [7] * 10, 3)
    outcome = run(Jobs({0: (0.0, first), 1: (0.0, then)}, {0: [(1.5, 1)]}))
    before, after = outcome.served
    assert before.finished is not None
    assert after.arrived == pytest.approx(before.finished + 1.5)
    assert after.cached_tokens == 48  # three of the four blocks: the last token's KV is never computed


def test_refused_requests_are_noted_and_their_followers_come() -> None:
    jobs = Jobs({0: (0.0, job(0, [1] * 900, 400)), 1: (0.0, job(1, [1] * 40, 3))}, {0: [(1.0, 1)]})
    refused, served = run(jobs).served
    assert (refused.refused, refused.finished) == ("context_length_exceeded", None)
    assert served.arrived == pytest.approx(1.0)


def test_time_may_be_up_before_all_is_done() -> None:
    outcome = run(workload(), until=0.8)
    assert 0 < outcome.seconds <= 0.8
    assert outcome.unfinished > 0


def test_a_fleets_run_ends_with_its_last_event_not_with_the_next_look_at_loads() -> None:
    """Regression: goodput and busy shares were over a time that the period had made longer."""
    alike = (ReplicaConfig(config()),) * 2
    lone = Jobs({0: (0.0, job(0, [1] * 40, 3))}, {})
    ended = [
        Simulation(FleetConfig(alike, BalanceConfig(period_seconds=period)), PROFILE, lone).run().seconds
        for period in (1.0, 60.0)
    ]
    assert ended[0] == ended[1] < 1


def test_ticks_and_steps_say_what_was_running_waiting_and_held() -> None:
    steps: list[Step] = []
    outcome = run(workload(), tick_seconds=0.1, on_step=steps.append)
    assert [tick.time for tick in outcome.ticks] == pytest.approx(
        [0.1 * (n + 1) for n in range(len(outcome.ticks))]
    )
    assert max(tick.waiting for tick in outcome.ticks) > 0
    assert max(step.kv_used_blocks for step in steps) <= 40
    assert sum(step.shape.tokens for step in steps) == outcome.computed_tokens
    assert len(steps) == outcome.steps


def test_copies_wait_for_their_lane() -> None:
    """One thread each way; two read the disk; the writer is alone."""

    def copy(number: int, source: str, target: str) -> Copy:
        return Copy(number, source, target, (Place(b""),) * 4, (Place(b""),) * 4)

    lanes = SimulatedLanes(PROFILE)
    ends = [lanes.submit(copy(n, DEVICE, HOST), 1.0)[0] for n in range(2)]
    assert ends == pytest.approx([1.005, 1.010])
    assert lanes.submit(copy(2, HOST, DEVICE), 1.0)[0] == pytest.approx(1.005)
    reads = [lanes.submit(copy(n, DISK, DEVICE), 1.0) for n in range(3, 6)]
    assert [end for end, _ in reads] == pytest.approx([1.005, 1.005, 1.010])
    assert reads[-1][1].queued_seconds == pytest.approx(0.005)
    assert [lanes.submit(copy(n, HOST, DISK), 1.0)[0] for n in range(6, 8)] == pytest.approx([1.005, 1.010])


def test_decisions_turn_when_a_tier_becomes_20_times_slower_and_turn_back() -> None:
    """By measured cost, within two seconds: loaded, then computed again, then loaded; all but the shortest."""
    found: list[tuple[float, str]] = []

    def record(now: float, event: Event, told: list[Told]) -> None:
        back = [each for _, instructions in told for each in instructions if isinstance(each, Resumed)]
        found.extend((now - each.actual_seconds, each.way) for each in back)

    def slowdown(now: float) -> float:
        return 20.0 if 10.0 <= now < 20.0 else 1.0

    prompts = Jobs(
        {n: (n / 4, job(n, [1000 + n] * 64, 100 + n * 37 % 100, known=False)) for n in range(150)}, {}
    )
    core = config(80, ResidencyConfig(host_blocks=400), "cheapest", block_bytes=1000)
    steeper = replace(PROFILE, step=CurveTime(dense=((0, 0.010), (100, 0.015)), head=((0, 0.0), (10, 0.010))))
    run(prompts, core, steeper, recorder=record, slowdown=slowdown)
    for begin, end, way in ((0.0, 10.0, "reload"), (12.0, 20.0, "recompute"), (22.0, 35.0, "reload")):
        ways = Counter(taken for at, taken in found if begin <= at < end)
        assert ways[way] >= 20
        assert ways[way] > 0.8 * ways.total()


def test_a_tier_whose_routes_were_not_measured_is_refused() -> None:
    with pytest.raises(ProfileError, match="no transfers device>host"):
        run(workload(), config(residency=TIERS), replace(PROFILE, transfers={}))
