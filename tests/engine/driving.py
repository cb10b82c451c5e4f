"""Drives a core by hand, with virtual time: the shell's part of the contract in thirty lines."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.checkpoint import CheckpointConfig
from engine.common import Common
from engine.core import Core, CoreConfig
from engine.events import (
    Account,
    Arrived,
    Cancelled,
    Decided,
    Emit,
    Event,
    Instruction,
    PoliciesChanged,
    PolicyFailed,
    Preempted,
    Pruned,
    Reject,
    Report,
    Reprioritised,
    Resumed,
    Run,
    StepDone,
)
from engine.plan import Launched, Sampling
from engine.policy_set import Catalog, PolicyConfig
from engine.request import Delta, Finished, FinishReason, Request, ServiceClass, Stopping
from engine.scheduler import SchedulerConfig
from kvstore.below import ResidencyConfig
from kvstore.copies import DISK, Copy, CopyDone, Drop, Loss, Place, TierDown, TierUp
from policies.cost import CopySample, StepSample
from tests.fakes import Script, ScriptedRunner, ScriptedStore, hashed

VOCABULARY = tuple(bytes([65 + i % 26]) for i in range(100))
EOS = 99

UNFORESEEN: dict[str, dict[str, float]] = {"admission": {"risk": 1.0, "wait_steps": 0}}
"""Parameters by which whoever fits now is admitted, and blocks that are missing are taken at once: pressure."""


def core_config(
    blocks: int = 64,
    block_size: int = 4,
    max_batch_tokens: int = 16,
    max_sequences: int = 8,
    model_context: int = 1000,
    max_queue: int = 1000,
    max_outstanding: int = 1,
    resume: str = "reload",
    policies: PolicyConfig | None = None,
    residency: ResidencyConfig | None = None,
    every_tokens: int = 8,
    every_seconds: float = 1000.0,
    ahead_steps: int = 0,
) -> CoreConfig:
    """`residency`: None is a device without tiers below it. `policies` go before `resume`."""
    return CoreConfig(
        scheduler=SchedulerConfig(
            block_size,
            blocks,
            max_batch_tokens,
            max_sequences,
            policies=policies or PolicyConfig(resume=resume, parameters=UNFORESEEN),
            block_bytes=1000,
            residency=residency or ResidencyConfig(),
            checkpoint=CheckpointConfig(every_tokens, every_seconds, ahead_steps),
        ),
        model_context=model_context,
        max_queue=max_queue,
        max_outstanding=max_outstanding,
        eos_token_ids=(EOS,),
    )


def request(
    id: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    seed: int = 0,
    n: int = 1,
    min_tokens: int = 0,
    stop: tuple[str, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    salt: str = "",
    logprobs: int | None = None,
) -> Request:
    stopping = Stopping(max_tokens, min_tokens, stop, stop_token_ids, ignore_eos)
    sampling = Sampling(seed=seed, logprobs=logprobs, presence_penalty=0.5)  # so that fakes check the history
    return Request(id, tuple(prompt), sampling, stopping, n=n, salt=salt)


def core_of(config: CoreConfig, catalog: Catalog | None = None) -> Core:
    return Core(config, VOCABULARY, Common(config.scheduler.policies, config.scheduler.residency, catalog))


class Driver:
    """Feeds events, runs steps in order, keeps what came out, and checks the books after every event.

    Copies end when `copy` says so, or before the next step when `prompt_copies`.
    """

    prompt_copies = True
    tick = 1.0  # seconds that pass before each event; steps and copies take what they say besides

    def __init__(
        self,
        config: CoreConfig,
        script: Script | None = None,
        *,
        calibration: tuple[StepSample | CopySample, ...] = (),
        catalog: Catalog | None = None,
    ) -> None:
        config = replace(config, scheduler=replace(config.scheduler, calibration=calibration))
        self.core = core_of(config, catalog)
        self.runner = ScriptedRunner(
            script or hashed(98),
            block_size=config.scheduler.block_size,
            max_sequences=config.scheduler.max_sequences,
        )
        self.store = ScriptedStore(self.runner)
        self.lost: Callable[[Copy, Place], Loss | None] = lambda copy, place: None
        self.now = 0.0
        self.deltas: dict[tuple[str, int], list[Delta]] = {}
        self.finished: dict[tuple[str, int], Finished] = {}
        self.rejected: dict[str, Reject] = {}
        self.accounts: list[Account] = []
        self.decided: list[Decided] = []
        self.resumed: list[Resumed] = []
        self.failed: list[PolicyFailed] = []
        self._under_way: deque[Launched] = deque()

    def arrive(self, *requests: Request) -> None:
        for each in requests:
            self._feed(Arrived(each))

    def cancel(self, request_id: str) -> None:
        self._feed(Cancelled(request_id))

    def preempt(self, request_id: str) -> None:
        self._feed(Preempted(request_id))

    def reprioritise(self, request_id: str, priority: int, service: ServiceClass) -> None:
        self._feed(Reprioritised(request_id, priority, service))

    def prune(self, tier: str, blocks: int = 0) -> None:
        self._feed(Pruned(tier, blocks))

    def use_policies(self, **names: str) -> None:
        self._feed(PoliciesChanged(tuple(names.items())))

    def tier_up(self, tier: str = DISK, records: tuple[Place, ...] = ()) -> None:
        self._feed(TierUp(tier, records))

    def tier_down(self, tier: str = DISK) -> None:
        self._feed(TierDown(tier, "a test"))

    def copy(self, which: int = 0) -> bool:
        """Ends a copy under way. False when there is none."""
        if not self.store.under_way:
            return False
        self._feed(self.store.end(which % len(self.store.under_way), self.lost))
        return True

    def copies(self) -> None:
        """Ends all copies, and those that follow from them."""
        while self.copy():
            pass

    def step(self) -> bool:
        """Ends the oldest step under way. False when there is none."""
        if self.prompt_copies:
            self.copies()
        if not self._under_way:
            return False
        self._feed(StepDone(self._under_way.popleft().collect()))
        return True

    def finish(self, limit: int = 20_000) -> None:
        """Steps until nothing is left to do; the core must then be idle and empty."""
        for _ in range(limit):
            if not (self.step() or self.copy()):
                break
        assert self.core.idle, "work is left, but no step is told: the core is stuck"
        self.core.check()

    def tokens(self, request_id: str, choice: int = 0) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas[request_id, choice] for token in delta.token_ids)

    def text(self, request_id: str, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[request_id, choice])

    def reason(self, request_id: str, choice: int = 0) -> FinishReason | None:
        return self.deltas[request_id, choice][-1].finish_reason

    def _feed(self, event: Event) -> None:
        self.now += self.tick + _seconds(event)
        for instruction in self.core.handle(event, self.now):
            self._carry_out(instruction)
        self.core.check()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Run(plan):
                self._under_way.append(self.runner.launch(plan))
            case Emit(request_id, delta):
                self.deltas.setdefault((request_id, delta.choice), []).append(delta)
            case Report(finished):
                self.finished[finished.request, finished.choice] = finished
            case Reject():
                self.rejected[instruction.request_id] = instruction
            case Account():
                self.accounts.append(instruction)
            case Copy():
                self.store.begin(instruction)
            case Drop():
                self.store.drop(instruction)
            case Decided():
                self.decided.append(instruction)
            case Resumed():
                self.resumed.append(instruction)
            case PolicyFailed():
                self.failed.append(instruction)


def _seconds(event: Event) -> float:
    """What an event says to have taken."""
    match event:
        case StepDone(result):
            return result.seconds
        case CopyDone():
            return event.seconds
        case _:
            return 0.0
