"""Drives a fleet by hand, with virtual time: runners and copies end in whichever order a test wants."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

from engine.core import CoreConfig
from engine.events import (
    Account,
    Arrived,
    Cancelled,
    Decided,
    Drained,
    Emit,
    Event,
    Instruction,
    Migrated,
    MigrationOver,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Report,
    Run,
    StepDone,
    Timer,
)
from engine.fleet import Fleet, FleetConfig
from engine.plan import Launched
from engine.request import Delta, Finished, Request
from kvstore.copies import DISK, Copy, CopyDone, Drop, Loss, Place, TierDown, TierUp
from tests.engine.driving import VOCABULARY
from tests.fakes import Script, ScriptedRunner, ScriptedStore, hashed

CHECKED_EVENTS = 7
"""The books are looked through after so many events, and at the end."""


class FleetDriver:
    """Feeds events, keeps what came out, and checks the books now and then."""

    tick = 0.001  # seconds that pass before each event

    def __init__(self, config: FleetConfig, script: Script | None = None) -> None:
        self.fleet = Fleet(config, VOCABULARY)
        self._script = script or hashed(98)
        self.runners = [self._runner(each.core) for each in config.replicas]
        self.store = ScriptedStore(*self.runners)
        self.lost: Callable[[Copy, Place], Loss | None] = lambda copy, place: None
        self.now = 0.0
        self.deltas: dict[tuple[str, int], list[Delta]] = {}
        self.finished: dict[tuple[str, int], Finished] = {}
        self.rejected: dict[str, Reject] = {}
        self.accounts: list[Account] = []
        self.decided: list[Decided] = []
        self.migrations: list[MigrationOver] = []
        self.events: list[tuple[float, Event]] = []
        self._steps: list[deque[Launched]] = [deque() for _ in config.replicas]
        self._held: list[Copy] = []  # these wait for a step
        self._done = [0] * len(config.replicas)

    def _runner(self, core: CoreConfig) -> ScriptedRunner:
        scheduler = core.scheduler
        return ScriptedRunner(
            self._script, block_size=scheduler.block_size, max_sequences=scheduler.max_sequences
        )

    # --- events ---------------------------------------------------------------------------------------------------

    def arrive(self, *requests: Request) -> None:
        for each in requests:
            self.feed(Arrived(each))

    def cancel(self, request_id: str) -> None:
        self.feed(Cancelled(request_id))

    def migrate(self, request_id: str, replica: int | None = None) -> None:
        self.feed(Migrated(request_id, replica))

    def drain(self, replica: int, *, draining: bool = True) -> None:
        self.feed(Drained(replica, draining))

    def kill(self, replica: int) -> None:
        """Its steps never end. Copies that were told do, but for those that wait for its steps."""
        self._steps[replica].clear()
        self.feed(ReplicaDown(replica, "a test"))
        held = [copy for copy in self._held if copy.replica == replica]
        self._held = [copy for copy in self._held if copy.replica != replica]
        for copy in held:
            self.feed(CopyDone(copy.id, tuple((i, Loss.DOWN) for i in range(len(copy.sources)))))

    def revive(self, replica: int) -> None:
        self.runners[replica] = self._runner(self.fleet.config.replicas[replica].core)
        self.store.put_device(replica, self.runners[replica])
        self._done[replica] = 0
        self.feed(ReplicaUp(replica))

    def timer(self) -> None:
        self.feed(Timer())

    def tier_up(self) -> None:
        self.feed(TierUp(DISK, ()))

    def tier_down(self, tier: str = DISK) -> None:
        self.feed(TierDown(tier, "a test"))

    def step(self, replica: int) -> bool:
        """Ends the replica's oldest step under way. False when there is none."""
        if not self._steps[replica]:
            return False
        result = self._steps[replica].popleft().collect()
        self._done[replica] = result.step
        for copy in [c for c in self._held if c.replica == replica and c.after <= result.step]:
            self._held.remove(copy)
            self.store.begin(copy)
        self.feed(StepDone(result, replica))
        return True

    def copy(self, which: int = 0) -> bool:
        """Ends a copy under way. False when there is none."""
        if not self.store.under_way:
            return False
        self.feed(self.store.end(which % len(self.store.under_way), self.lost))
        return True

    def anything(self, random: Random) -> bool:
        """Ends some step, or one of the copies, which are quicker. False when there is none."""
        replicas = [number for number, steps in enumerate(self._steps) if steps]
        choices = [partial(self.step, number) for number in replicas]
        if self.store.under_way and (not choices or random.random() < 0.7):
            return self.copy(random.randrange(len(self.store.under_way)))
        return bool(choices) and random.choice(choices)()

    def finish(self, random: Random | None = None, limit: int = 100_000) -> None:
        """Until nothing is left to do; the fleet must then be idle and empty."""
        random = random or Random(0)
        for _ in range(limit):
            if not self.anything(random):
                break
        assert self.fleet.idle, "work is left, but no step is told: the fleet is stuck"
        assert len(self.fleet.ledger) == 0, "somebody is charged still"
        assert all(account.nanoseconds == 0 for account in self.fleet.ledger.accounts)
        assert not len(self.fleet.moves)
        assert not self.fleet.common.tenants.active
        self.fleet.check()

    # --- what came out --------------------------------------------------------------------------------------------

    def tokens(self, request_id: str, choice: int = 0) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas[request_id, choice] for token in delta.token_ids)

    def answer(self, request_id: str, choice: int = 0) -> Delta:
        """All its deltas as one: text, tokens, logprobs, and how it ended."""
        deltas = self.deltas[request_id, choice]
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        return deltas[-1]._replace(
            text="".join(delta.text for delta in deltas),
            token_ids=self.tokens(request_id, choice),
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        )

    def moved(self, *, live: bool | None = None) -> list[MigrationOver]:
        """Migrations that did not fail."""
        return [m for m in self.migrations if not m.failure and live in (None, m.live)]

    def feed(self, event: Event) -> None:
        self.now += self.tick
        self.events.append((self.now, event))
        for replica, instructions in self.fleet.handle(event, self.now):
            for instruction in instructions:
                self._carry_out(instruction, replica)
        if len(self.events) % CHECKED_EVENTS == 0:
            self.fleet.check()

    def _carry_out(self, instruction: Instruction, replica: int) -> None:
        match instruction:
            case Run(plan):
                self._steps[replica].append(self.runners[replica].launch(plan))
            case Emit(request_id, delta):
                self.deltas.setdefault((request_id, delta.choice), []).append(delta)
            case Report(finished):
                self.finished[finished.request, finished.choice] = finished
            case Reject():
                self.rejected[instruction.request_id] = instruction
            case Account():
                self.accounts.append(instruction)
            case Copy():
                if instruction.after > self._done[instruction.replica]:
                    self._held.append(instruction)
                else:
                    self.store.begin(instruction)
            case Drop():
                self.store.drop(instruction)
            case Decided():
                self.decided.append(instruction)
            case MigrationOver():
                self.migrations.append(instruction)


def fleet_config(core: CoreConfig, replicas: int, **policies: str) -> FleetConfig:
    """So many alike, with these policies of the fleet."""
    names = core.scheduler.policies.having(policies)
    return FleetConfig.of(replace(core, scheduler=replace(core.scheduler, policies=names)), replicas)
