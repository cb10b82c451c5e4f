"""What observers are told of finished work: one record a step, one a copy; and of a plug-in that fails in a run."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from engine.events import Account
from engine.scheduler import Scheduler
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Loss


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """A copy that has ended."""

    source: str
    target: str
    bytes: int  # of the blocks that arrived
    seconds: float  # from the moment a thread took it up
    queued_seconds: float  # before that
    losses: Mapping[Loss, int]  # blocks that did not arrive
    replica: int = 0

    @classmethod
    def of(cls, copy: Copy, done: CopyDone, block_bytes: int) -> "CopyRecord":
        losses = Counter(kind for _, kind in done.lost)
        size = (len(copy.sources) - len(done.lost)) * block_bytes
        return cls(copy.source, copy.target, size, done.seconds, done.queued_seconds, losses, copy.replica)

    @property
    def failed_tier(self) -> str:
        """Where losses of this copy happen: of two tiers the one farther from the device."""
        return max(self.source, self.target, key=(DEVICE, HOST, DISK).index)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A finished step and the state it left, for observers. Counts are since the previous record.

    Without rows: a replica is lost, and this is what it had counted for steps that did not end.
    """

    replica: int
    step: int
    rows: int
    prefill_tokens: int
    decode_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    sampled_tokens: int
    prompt_tokens: int  # of requests first admitted
    preemptions: int
    preemptions_by: Mapping[str, int]  # by the victim policy, or "displaced", "operator"
    promotions: Mapping[str, int]  # by reason
    resumptions: Mapping[tuple[str, str], int]  # by way, and the lowest tier that they took from
    saved_ahead_blocks: int  # of those who were likely to be preempted
    prefix_queries: int  # tokens looked up in all tiers
    prefix_hits: int  # tokens found there
    hit_tokens: Mapping[str, int]  # by tier, at every admission
    dropped_blocks: int  # not saved below the device: no room, or too much on its way
    running: int
    waiting: int
    kv_used_blocks: int
    kv_blocks: int
    seconds: float
    gil_seconds: float


class StepAccounts:
    """What each step adds to a scheduler's counts."""

    def __init__(self, scheduler: Scheduler, replica: int = 0) -> None:
        self._scheduler = scheduler
        self._replica = replica
        self._counted = scheduler.counts.copy()  # as told so far

    def record(self, account: Account) -> StepRecord:
        scheduler, before, now = self._scheduler, self._counted, self._scheduler.counts
        self._counted = now.copy()
        return StepRecord(
            replica=self._replica,
            step=account.step,
            rows=account.rows,
            prefill_tokens=account.prefill_tokens,
            decode_tokens=account.decode_tokens,
            computed_tokens=account.prefill_tokens + account.decode_tokens,
            recomputed_tokens=account.recomputed_tokens,
            sampled_tokens=account.sampled_tokens,
            prompt_tokens=now.prompt_tokens - before.prompt_tokens,
            preemptions=now.preemptions - before.preemptions,
            preemptions_by=now.preemptions_by - before.preemptions_by,
            promotions=now.promotions - before.promotions,
            resumptions=now.resumptions - before.resumptions,
            saved_ahead_blocks=now.saved_ahead_blocks - before.saved_ahead_blocks,
            prefix_queries=now.prefix_queries - before.prefix_queries,
            prefix_hits=now.prefix_hits - before.prefix_hits,
            hit_tokens=now.hit_tokens - before.hit_tokens,
            dropped_blocks=scheduler.residency.take_dropped(),
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            kv_used_blocks=scheduler.pool.held,
            kv_blocks=scheduler.pool.blocks,
            seconds=account.seconds,
            gil_seconds=account.gil_seconds,
        )


@dataclass(slots=True)
class Failing:
    """A plug-in that failed, and the plainest policy decided: what it did first, and how often it failed."""

    first: str
    times: int = 0
