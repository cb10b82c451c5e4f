"""What steps and copies cost on this machine, measured before serving: the samples that a cost model starts with.

Real plans go through the runner, real copies through the tiers' own threads, while the pool is empty. No figures are
fitted here for others (policies/cost.py does, from these samples and from those of serving), and the disk is left out:
its first copies come soon enough, and a record written to be read would have to be taken back.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from engine.plan import Placement, Plan, Row, Runner, Sampling
from engine.runner import BlockTables
from engine.scheduler import SchedulerConfig
from kvstore.copies import DEVICE, HOST, Copy, CopyDone, Place
from kvstore.tier import Tier
from kvstore.transfer import Task, Transfers
from policies.cost import CopySample, StepCost, StepSample

BUDGET_SECONDS = 0.8
"""Of steps. The smallest is taken whatever it costs; others while they are predicted to fit."""

ROUNDS = 4
"""Of the same steps at most. The first pays for cold caches: where there is another it counts for nothing."""

TOUCHED_BYTES = 128 * 2**20
"""Of the pool: what was never written is no memory yet, and reading it costs nothing. Longer contexts share blocks."""

LONG_CONTEXT = 2048

COPY_ROUNDS = 4
"""Of copies of three sizes, both ways."""

Clock = Callable[[], float]


class TabledRunner(Runner, Protocol):
    @property
    def tables(self) -> BlockTables: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """A step of equal rows: each computes `count` positions after `cached`; rows of one position decode."""

    rows: int
    cached: int
    count: int

    @property
    def work(self) -> tuple[int, float, int, int]:
        """As StepSample has it: prefill tokens, attended, decode rows, decode context."""
        if self.count == 1:
            return 0, 0.0, self.rows, self.rows * self.cached
        return self.rows * self.count, self.rows * self.count * (self.cached + self.count / 2), 0, 0


def calibrate(
    runner: TabledRunner,
    scheduler: SchedulerConfig,
    device: Tier,
    host: Tier | None,
    *,
    budget_seconds: float = BUDGET_SECONDS,
    clock: Clock = time.perf_counter,
) -> tuple[StepSample | CopySample, ...]:
    """Measures for about `budget_seconds`, and longer only where the smallest step takes longer.

    Nobody may hold a block or a slot of the pool or of `host`: what was in them is overwritten with no matter what.
    """
    full_blocks = runner.tables.array.shape[1] - 1  # the last may reach beyond the model's context
    context = full_blocks * scheduler.block_size
    if not context:
        return ()
    blocks = min(scheduler.blocks, max(1, TOUCHED_BYTES // device.block_bytes))
    _touch(device, blocks)
    steps = _Steps(runner, scheduler.block_size, blocks)
    samples = steps.measured(shapes(scheduler, context), clock() + budget_seconds, clock)
    return (*samples, *(_copies(device, host, blocks, scheduler.residency.copy_blocks) if host else ()))


def shapes(scheduler: SchedulerConfig, context: int) -> list[Shape]:
    """From small to large: decoding and prompt chunks, near the beginning and far from it."""
    far = min(context // 2, LONG_CONTEXT)
    wanted = [Shape(rows, cached, 1) for cached in (far // 8, far) for rows in (1, 8, 32)]
    wanted += [Shape(1, cached, count) for cached in (0, far) for count in (16, 64, 256, 1024)]
    return [
        shape
        for shape in dict.fromkeys(wanted)
        if shape.rows <= scheduler.max_sequences
        and shape.rows * shape.count <= scheduler.max_batch_tokens
        and shape.cached + shape.count <= context
    ]


def _touch(device: Tier, blocks: int) -> None:
    nothing = np.zeros(device.block_bytes, dtype=np.uint8)
    device.write([Place(b"", slot) for slot in range(blocks)], [nothing] * blocks)


@dataclass(frozen=True, slots=True)
class _Steps:
    runner: TabledRunner
    block_size: int
    blocks: int  # of the pool, that rows may use

    def measured(self, shapes: list[Shape], until: float, clock: Clock) -> Iterator[StepSample]:
        """Round after round, while half of the time left has room for another."""
        cost, taken = StepCost(), defaultdict[Shape, list[StepSample]](list)
        for _ in range(ROUNDS):
            for shape in shapes:
                if cost.samples == 0 or cost.step_seconds(*shape.work) <= (until - clock()) / 2:
                    sample = self._measure(shape)
                    cost.observe(sample)
                    taken[shape].append(sample)
        for samples in taken.values():
            yield from samples[1:] or samples

    def _measure(self, shape: Shape) -> StepSample:
        slots = range(shape.rows)
        placements = tuple(Placement(slot, Sampling()) for slot in slots)
        plan = Plan(0, placements, tuple(self._row(slot, shape) for slot in slots))
        return StepSample(*shape.work, self.runner.launch(plan).collect().seconds)

    def _row(self, slot: int, shape: Shape) -> Row:
        """On blocks of its own, as far as there are."""
        length = -(-(shape.cached + shape.count) // self.block_size)
        blocks = tuple((slot * length + index) % self.blocks for index in range(length))
        return Row(slot, shape.cached, (0,) * shape.count, 0, blocks, samples=True)


def _copies(device: Tier, host: Tier, blocks: int, copy_blocks: int) -> Iterator[CopySample]:
    """Between the device and the host, of one block, some, and as many as a copy has; one at a time.

    Through `blocks` slots of both in turn, so that the processor's caches have not seen them lately.
    """
    ended = SimpleQueue[CopyDone]()

    def report(told: Sequence[tuple[Task, CopyDone]]) -> None:
        for _, done in told:
            ended.put(done)

    slots = min(blocks, host.stats().capacity_bytes // host.block_bytes)
    most = min(slots, copy_blocks)
    transfers = Transfers({DEVICE: device, HOST: host}, report, lambda copy, error: None)
    try:
        first = 0
        for size in [1, -(-most // 4), most] * COPY_ROUNDS if most else ():
            for source, target in ((DEVICE, HOST), (HOST, DEVICE)):
                places = tuple(Place(b"", (first + index) % slots) for index in range(size))
                first += size
                copy = Copy(0, source, target, places, places)
                (transfers.carry_out if transfers.is_brief(copy) else transfers.submit)(copy)
                done = ended.get()
                arrived = (size - len(done.lost)) * device.block_bytes
                yield CopySample(source, target, arrived, done.seconds, done.queued_seconds)
    finally:
        transfers.close(time.monotonic() + 1.0)
