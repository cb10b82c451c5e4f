"""The pure core: `handle(event, now)` → instructions. It alone changes sequences and slots (design §3).

No torch, no await, no clock, no I/O: the same events give the same instructions, byte for byte. What a step computes
is decided in scheduler.py, what becomes of a sequence in lifecycle.py; here tokens become text, ends and accounts.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine.common import Common
from engine.draft import Scheduled
from engine.events import (
    Account,
    Arrived,
    Cancelled,
    Damaged,
    Emit,
    Event,
    Instruction,
    PoliciesChanged,
    Preempted,
    Pruned,
    Reject,
    Report,
    Reprioritised,
    Run,
    StepDone,
)
from engine.plan import Logprob, Plan, StepResult
from engine.request import Delta, FinishReason, Request
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence, State
from engine.snapshot import Snapshot
from engine.text import OutputText
from kvstore.block import Key, extend_keys, root_key
from kvstore.copies import DEVICE, CopyDone, TierDown, TierUp


@dataclass(frozen=True, slots=True)
class CoreConfig:
    scheduler: SchedulerConfig
    model_context: int  # tokens the model can attend to
    max_queue: int  # sequences that may wait
    max_outstanding: int = 1  # steps launched and not collected: 2 lets a CUDA device run ahead
    eos_token_ids: tuple[int, ...] = ()
    fingerprint: str = ""  # of all that changes KV bytes, for block keys; replicas of one are alike

    @property
    def context(self) -> int:
        """The effective context: a request never needs more than the pool has (design §4.8)."""
        return min(self.model_context, self.scheduler.blocks * self.scheduler.block_size)


@dataclass(slots=True)
class Outstanding:
    """A step under way: its rows' sequences, each with the epoch it was in when the step was planned."""

    scheduled: Scheduled
    epochs: list[int]
    told: float
    seconds: float  # predicted, from when it begins


class Core:
    """One replica's. `vocabulary`: the bytes of each token id, empty for special tokens.

    `common`: what it shares with others, among which it is number `replica`; None: it is alone.
    """

    def __init__(
        self,
        config: CoreConfig,
        vocabulary: tuple[bytes, ...],
        common: Common | None = None,
        replica: int = 0,
    ) -> None:
        self.config = config
        self.replica = replica
        self.common = common or Common(config.scheduler.policies, config.scheduler.residency)
        self.scheduler = Scheduler(
            config.scheduler, self.common, replica, self.common.steps[config.fingerprint]
        )
        self._life = self.scheduler.life
        self.sequences: dict[str, list[Sequence]] = {}  # unfinished ones, by request
        self._vocabulary = vocabulary
        self._outstanding: deque[Outstanding] = deque()
        self._steps = 0
        self._step_ended = float("-inf")
        self.dead = False  # its device is given up: it computes nothing more
        self.ended: list[tuple[Sequence, bool]] = []  # since somebody looked; whether by themselves

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Changes the state by one event at time `now` (seconds, never falling). A next step comes first."""
        news: list[Instruction] = []
        match event:
            case StepDone(result):
                news = self._step_done(result, now)
            case Arrived(request):
                news = self._arrived(request, self.chain(request), now)
            case Cancelled(request_id):
                news = self._cancelled(request_id, now)
            case Preempted(request_id):
                self._preempted(request_id, now)
            case Reprioritised(request_id, priority, service):
                for sequence in self.sequences.get(request_id, ()):
                    self._life.reprioritise(sequence, priority, service)
            case Pruned(tier, blocks):
                self._pruned(tier, blocks, now)
            case Damaged(tier, keys):
                self.scheduler.residency.damaged(tier, keys)
            case CopyDone():
                self._life.copied(event, now)
            case TierDown(tier):
                self._life.tier_down(tier, now)
            case TierUp():
                self.scheduler.residency.tier_up(event, now)
            case PoliciesChanged(names):
                self.scheduler.use(dict(names))
        return self.go_on(now, news)

    def go_on(self, now: float, news: Iterable[Instruction] = ()) -> list[Instruction]:
        """What is to be done after its sequences have changed. A next step comes first, then the `news`."""
        steps = list(self._next_steps(now))
        return [*steps, *news, *self.scheduler.residency.take(now), *self.scheduler.take_news()]

    # --- requests come and go -------------------------------------------------------------------------------------

    def chain(self, request: Request) -> tuple[Key, list[Key]]:
        """The parent of its first block's key, and the keys of its prompt's full blocks: the same at all replicas."""
        root, keys = root_key(self.config.fingerprint, request.salt), list[Key]()
        extend_keys(keys, root, request.prompt, self.config.scheduler.block_size)
        return root, keys

    def arrive(self, request: Request, chain: tuple[Key, list[Key]], now: float) -> list[Instruction]:
        """As Arrived, for who knows its `chain` already."""
        return self.go_on(now, self._arrived(request, chain, now))

    def _arrived(self, request: Request, chain: tuple[Key, list[Key]], now: float) -> list[Instruction]:
        if refusal := self._refusal(request):
            return [refusal]
        root, keys = chain
        self.sequences[request.id] = [
            self._new_sequence(request, choice, root, list(keys), now) for choice in range(request.n)
        ]
        for sequence in self.sequences[request.id]:
            self._life.arrive(sequence, now)
        return []

    def _refusal(self, request: Request) -> Reject | None:
        assert request.id not in self.sequences, f"request id {request.id} is in use"
        assert request.prompt
        assert min(request.stopping.max_tokens, request.n) >= 1
        if len(request.prompt) + request.stopping.max_tokens > self.config.context:
            return self.too_long(request)
        if self.scheduler.waiting + request.n > self.config.max_queue:
            message = f"The queue is full: {self.scheduler.waiting} requests are waiting. Try again later."
            return Reject(request.id, "queue_full", message, None)
        return None

    def too_long(self, request: Request) -> Reject:
        """What is told of a request that the context has no room for."""
        wanted = len(request.prompt) + request.stopping.max_tokens
        message = (
            f"This server's context is {self.config.context} tokens, but {wanted} were asked for: "
            f"{len(request.prompt)} in the prompt and {request.stopping.max_tokens} to generate. "
            "Shorten the prompt or lower max_tokens."
        )
        return Reject(request.id, "context_length_exceeded", message, "messages")

    def _new_sequence(
        self, request: Request, choice: int, root: Key, keys: list[Key], now: float
    ) -> Sequence:
        stopping = request.stopping
        enders = stopping.stop_token_ids + (() if stopping.ignore_eos else self.config.eos_token_ids)
        return Sequence(
            request=request,
            number=next(self.common.arrivals),
            sampling=replace(
                request.sampling,
                choice=choice,
                suppressed=enders if stopping.min_tokens else (),
                suppressed_until=len(request.prompt) + stopping.min_tokens,
            ),
            text=OutputText(self._vocabulary, stopping.stop, stopping.include_stop_str),
            root=root,
            keys=keys,
            arrived=now,
            tokens=list(request.prompt),
            prompt_tokens=len(request.prompt),
        )

    def _cancelled(self, request_id: str, now: float) -> list[Instruction]:
        sequences = list(self.sequences.get(request_id, ()))
        return [i for sequence in sequences for i in self._end(sequence, FinishReason.CANCELLED, now)]

    def _preempted(self, request_id: str, now: float) -> None:
        for sequence in self.sequences.get(request_id, ()):
            if sequence.state is State.RUNNING:
                self._life.preempt_as_asked(sequence, now)

    def _pruned(self, tier: str, blocks: int, now: float) -> None:
        if tier == DEVICE:
            self.scheduler.pool.clear_cache()
        elif blocks:
            self.scheduler.residency.prune(tier, blocks, now)
        else:
            self.scheduler.residency.clear(tier)

    # --- steps ----------------------------------------------------------------------------------------------------

    def _next_steps(self, now: float) -> Iterable[Run]:
        while len(self._outstanding) < self.config.max_outstanding and not self.dead:
            scheduled = self.scheduler.schedule(now, self.outstanding_step, self._ahead_seconds(now))
            if scheduled is None:
                return
            epochs = [sequence.epoch for sequence in scheduled.sequences]
            seconds = self.scheduler.valuation.seconds(scheduled.work)
            self._outstanding.append(Outstanding(scheduled, epochs, now, seconds))
            self._steps += 1
            yield Run(Plan(self._steps, tuple(scheduled.placements), tuple(scheduled.rows)))

    def _ahead_seconds(self, now: float) -> float:
        """Until the steps under way are expected to be over."""
        if not self._outstanding:
            return 0.0
        begun = max(self._outstanding[0].told, self._step_ended)
        return max(0.0, sum(step.seconds for step in self._outstanding) - (now - begun))

    def _step_done(self, result: StepResult, now: float) -> list[Instruction]:
        """Commits a step row by row. Rows of sequences that lost their place meanwhile are void."""
        step = self._outstanding.popleft()
        self.scheduler.valuation.step_done(step.scheduled.work, now - max(step.told, self._step_ended))
        self._step_ended = now
        news: list[Instruction] = []
        kept, computed = 0, self._life.computed
        drawn = zip(result.tokens, result.logprobs, strict=True)
        rows, sequences = step.scheduled.rows, step.scheduled.sequences
        for row, sequence, epoch in zip(rows, sequences, step.epochs, strict=True):
            token, logprob = next(drawn) if row.samples else (None, None)
            if sequence.epoch != epoch:
                continue
            if token is not None:
                sequence.tokens.append(token)
                sequence.pending -= 1
                kept += 1
            computed(sequence, row.start + len(row.tokens), now)
            if token is not None:
                self._drawn(sequence, token, logprob, now, news)
        assert next(drawn, None) is None, "more tokens drawn than rows sampled"
        return [_account(step.scheduled, result, kept), *news]

    def _drawn(
        self, sequence: Sequence, token: int, logprob: Logprob | None, now: float, news: list[Instruction]
    ) -> None:
        """One more token of a sequence: its text, and whether it is the last. Adds what is told of it to `news`."""
        stopping, output_tokens = sequence.request.stopping, len(sequence.tokens) - sequence.prompt_tokens
        sequence.token_times.append(now)
        self._life.drawn(sequence, output_tokens)
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if token in stopping.stop_token_ids or (
            token in self.config.eos_token_ids and not stopping.ignore_eos
        ):
            reason, text = FinishReason.STOP, sequence.text.finish()
            stop_reason = token if token in stopping.stop_token_ids else None
        else:
            text, stop_reason = sequence.text.push(token, output_tokens > stopping.min_tokens)
            if stop_reason is not None:
                reason = FinishReason.STOP
            elif output_tokens == sequence.max_tokens:
                reason, text = FinishReason.LENGTH, text + sequence.text.finish()
        logprobs = () if logprob is None else (logprob,)
        delta = Delta(sequence.choice, text, (token,), logprobs, reason, stop_reason)
        news.append(Emit(sequence.request.id, delta))
        if reason is not None:
            news += self._retire(sequence, reason, now)

    def _end(self, sequence: Sequence, reason: FinishReason, now: float) -> list[Instruction]:
        """Ends a sequence from outside, between tokens."""
        delta = Delta(sequence.choice, sequence.text.finish(), (), (), reason)
        return [Emit(sequence.request.id, delta), *self._retire(sequence, reason, now)]

    def _retire(self, sequence: Sequence, reason: FinishReason, now: float) -> list[Instruction]:
        by_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
        self._life.retire(sequence, now, by_itself=by_itself)
        self._forget(sequence)
        self.ended.append((sequence, by_itself))
        return [Report(sequence.accounts(reason, now, self.replica))]

    def _forget(self, sequence: Sequence) -> None:
        siblings = self.sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self.sequences[sequence.request.id]

    # --- sequences go on elsewhere, and come from there ------------------------------------------------------------

    @property
    def steps_told(self) -> int:
        """Since the start."""
        return self._steps

    @property
    def outstanding_step(self) -> int:
        """The last step told, if it is not done: its rows may still write to blocks given up since. Else 0."""
        return self._steps if self._outstanding else 0

    @property
    def stands_still(self) -> bool:
        """Somebody waits, and no step is under way: a block that another replica saves may be what is waited for."""
        return not self._outstanding and self.scheduler.waiting > 0

    def depart(self, sequence: Sequence, now: float) -> Snapshot:
        """A sequence is to go on elsewhere, from this."""
        snapshot = self._life.depart(sequence, now)
        self._forget(sequence)
        return snapshot

    def preview(self, request: Request) -> Sequence:
        """A request as a sequence that nobody serves, for predictions about it."""
        text = OutputText(self._vocabulary, (), False)
        prompt = request.prompt
        return Sequence(request, 0, request.sampling, text, b"", 0.0, list(prompt), len(prompt))

    def fail(self, sequence: Sequence, now: float) -> list[Instruction]:
        """It cannot go on anywhere."""
        return self._end(sequence, FinishReason.ERROR, now)

    def take_landed(self) -> list[Sequence]:
        """Twins that run since somebody looked."""
        if not self._life.landed:
            return []
        landed, self._life.landed = self._life.landed, []
        return landed

    def twin(self, sequence: Sequence, snapshot: Snapshot) -> Sequence:
        """A sequence of another replica's as it would go on here from a snapshot. Nobody knows it yet."""
        twin = Sequence.of(snapshot, sequence.number, sequence.root, self._vocabulary)
        twin.migrated_at, twin.crossed = sequence.migrated_at, sequence.crossed
        twin.waiting_since, twin.promoted = sequence.waiting_since, sequence.promoted
        twin.resume_seconds = sequence.resume_seconds
        return twin

    def waited_tokens(self, sequence: Sequence) -> int | None:
        """Served to anybody here since it began to wait; None: it runs."""
        return self._life.waited_tokens(sequence)

    def adopt(self, twin: Sequence, waited_tokens: int | None, now: float) -> None:
        """It waits here from now on, as one that has waited so much service elsewhere; None: it begins to wait."""
        self.settle(twin)
        if waited_tokens is None:
            self._life.arrive(twin, now)
        else:
            self._life.wait_on(twin, waited_tokens)

    def settle(self, twin: Sequence) -> None:
        """It is one of ours."""
        self.sequences.setdefault(twin.request.id, []).append(twin)

    def give_up(self) -> None:
        """Its device is lost, and with it the steps under way; sequences are there still, to `depart`."""
        self.dead = True
        self._outstanding.clear()

    # --- invariants -----------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nobody is served. Copies may still be under way: see Residency.quiet."""
        return not self.sequences and not self._outstanding

    def check(self) -> None:
        """Asserts that the books balance; when idle, that nothing is left (design §4.4)."""
        self.scheduler.check()
        if self.idle and self.scheduler.residency.quiet and not self.scheduler.loading:
            assert self.scheduler.pool.held == 0, f"{self.scheduler.pool.held} blocks leaked"
            assert not (self.common.below.alone and self.scheduler.residency.pinned), "pins leaked"


def _account(scheduled: Scheduled, result: StepResult, kept: int) -> Account:
    return Account(
        step=result.step,
        rows=len(scheduled.rows),
        prefill_tokens=scheduled.work.prefill_tokens,
        decode_tokens=scheduled.work.decode_rows,
        recomputed_tokens=scheduled.recomputed_tokens,
        sampled_tokens=kept,
        seconds=result.seconds,
        gil_seconds=result.gil_seconds,
    )
