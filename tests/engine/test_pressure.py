"""A pool of 0.3 × demand: 64 requests of the real model finish with the tokens and the KV of the unpressured run.

Demand is the peak of held blocks in that unpressured run. Each case says by which tiers victims come back, and asserts
that they did. KV is compared byte by byte, for every block that both runs have in a tier at their end. Pressured runs
are recorded and replayed.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from engine.checkpoint import CheckpointConfig
from engine.core import Core, CoreConfig
from engine.engine import Engine
from engine.fleet import Fleet, FleetConfig
from engine.model.loading import Loaded
from engine.plan import Sampling
from engine.policy_set import PolicyConfig
from engine.recording import FileRecorder, replay
from engine.records import StepRecord
from engine.request import Finished, Request, Stopping
from engine.runner import ModelRunner
from engine.scheduler import SchedulerConfig
from engine.worker import ThreadWorker
from kvstore.below import ResidencyConfig
from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, Loss, Place, TierUp
from kvstore.disk import DiskTier
from kvstore.memory import host_tier, pool_tier
from kvstore.store import Opened, Store
from kvstore.tier import Buffer, Tier
from tests.engine.driving import UNFORESEEN
from tests.engine.models import BLOCK, load, random_tokens, runner_for

MAX_SEQUENCES = 64
PENALISED = Sampling(repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3)
Directories = Callable[[str], Path]


@dataclass(frozen=True)
class Below:
    """Tiers below the device, in blocks."""

    host: int = 0
    disk: int = 0
    failing_reads: int = 0  # of every so many blocks read from disk one is lost; 0: none


@dataclass(frozen=True)
class Outcome:
    tokens: dict[str, tuple[int, ...]]
    demand: int  # peak of held blocks
    preemptions: int
    recomputed_tokens: int
    resumptions: Counter[tuple[str, str]]
    hit_tokens: Counter[str]
    reload_failures: int
    unsaved_blocks: int
    kv: dict[Key, bytes]  # of the blocks in the topmost tier below the device


def requests(loaded: Loaded) -> list[Request]:
    """64 prompts of 5–44 tokens and answers of 20–60, half greedy, half seeded, a third with penalties."""
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(random_tokens(5 + i * 7 % 40, loaded.config.vocab_size, seed=i)),
            sampling=replace(
                Sampling() if i % 3 else PENALISED, temperature=float(i % 2), top_p=0.95, seed=i
            ),
            stopping=Stopping(max_tokens=20 + i * 11 % 41, ignore_eos=True),
        )
        for i in range(64)
    ]


class FailingReads(DiskTier):
    """Loses one of so many blocks that are read."""

    every = 2
    _reads = 0

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        losses = super().read(places, into)
        for index in range(len(places)):
            self._reads += 1
            if self._reads % self.every == 0:
                into[index][:] = 255  # what came must not be used
                losses[index] = Loss.CORRUPT
        return losses


def open_disk(path: Path, blocks: int, block_bytes: int, failing_reads: int) -> Opened:
    kind = FailingReads if failing_reads else DiskTier
    quota = (blocks + 60) * (block_bytes + 8192) * 2
    tier = kind.open(path, quota_bytes=quota, block_bytes=block_bytes, fingerprint="a test")
    return tier, TierUp(DISK, tier.records(), min(blocks, tier.capacity_blocks), tier.transaction_blocks)


@asynccontextmanager
async def store_for(
    runner: ModelRunner, below: Below, path: Path
) -> AsyncIterator[tuple[Store | None, Mapping[str, Tier]]]:
    device = pool_tier(runner.pool)
    memories: dict[str, Tier] = {DEVICE: device}
    if below.host:
        memories[HOST] = await asyncio.to_thread(host_tier, below.host, device.block_bytes, pinned=False)
    opener = partial(open_disk, path, below.disk, device.block_bytes, below.failing_reads)
    if not (below.host or below.disk):
        yield None, memories
        return
    store = Store(memories, {DISK: opener} if below.disk else {}, hung_seconds=60, retry_seconds=60)
    await asyncio.to_thread(store.open)
    yield store, memories
    assert await asyncio.to_thread(store.stop, 30)


def kv_of(core: Core, memories: Mapping[str, Tier]) -> dict[Key, bytes]:
    """The full blocks in the host tier, by key."""
    found = {}
    for entry in core.scheduler.residency.host.entries():
        buffer = memories[HOST].buffer(entry.slot)
        assert buffer is not None
        if entry.tokens == BLOCK:
            found[entry.key] = buffer.tobytes()
    return found


async def answered(engine: Engine, asked: Sequence[Request]) -> dict[str, tuple[int, ...]]:
    """All answers, and all that is to be saved is saved."""
    streams = [engine.submit(request) for request in asked]
    answers = [[token async for delta in stream for token in delta.token_ids] for stream in streams]
    await engine.quiet()
    return {request.id: tuple(answer) for request, answer in zip(asked, answers, strict=True)}


async def outcome(
    loaded: Loaded,
    blocks: int,
    directory: Path,
    below: Below,
    rounds: Sequence[list[Request]] | None = None,
    resume: str = "reload",
) -> Outcome:
    """Runs the rounds (None: the 64 requests) one after another; nothing stays on the device between two."""
    residency = ResidencyConfig(host_blocks=below.host, disk_blocks=below.disk)
    scheduler = SchedulerConfig(
        BLOCK,
        blocks,
        max_batch_tokens=128,
        max_sequences=MAX_SEQUENCES,
        policies=PolicyConfig(resume=resume, parameters=UNFORESEEN),
        residency=residency,
        checkpoint=CheckpointConfig(every_tokens=BLOCK),
    )
    config = CoreConfig(scheduler, loaded.config.max_positions, max_queue=100)
    fleet = Fleet(FleetConfig.of(config), (b"x",) * loaded.config.vocab_size)
    runner = runner_for(loaded, kv_blocks=blocks, max_sequences=MAX_SEQUENCES)
    steps: list[StepRecord] = []
    ends: list[Finished] = []
    answers: dict[str, tuple[int, ...]] = {}
    await asyncio.to_thread(directory.mkdir, exist_ok=True)
    async with store_for(runner, below, directory / "kv") as (store, memories):
        async with FileRecorder().writing(directory / "recording.jsonl", fleet.config) as recorder:
            engine = Engine(fleet, [ThreadWorker(runner)], exact=runner.exact, recorder=recorder, store=store)
            engine.on_step.append(steps.append)
            engine.on_finished.append(ends.append)
            try:
                for asked in rounds or [requests(loaded)]:
                    answers |= await answered(engine, asked)
                    engine.prune(DEVICE, 0)
                assert await engine.drain(30)
            finally:
                await asyncio.to_thread(engine.stop)
        fleet.check()
        core = fleet.cores[0]
        assert core.idle
        assert core.scheduler.residency.quiet
        assert core.scheduler.pool.held == 0
        counts = core.scheduler.counts
        return Outcome(
            tokens=answers,
            demand=max(step.kv_used_blocks for step in steps),
            preemptions=counts.preemptions,
            recomputed_tokens=sum(end.recomputed_tokens for end in ends),
            resumptions=counts.resumptions,
            hit_tokens=counts.hit_tokens,
            reload_failures=counts.reload_failures,
            unsaved_blocks=core.scheduler.residency.dropped_blocks,
            kv=kv_of(core, memories),
        )


CASES = [("shipped", "bfloat16"), ("shipped", "float32"), ("odd_sizes", "bfloat16")]


@pytest.fixture(params=CASES, ids="-".join)
def loaded(request: pytest.FixtureRequest, model_directory: Directories) -> Loaded:
    model, dtype = request.param
    return load(model_directory(model), "cpu", dtype)


async def same_as_calm(loaded: Loaded, directory: Path, below: Below, resume: str = "reload") -> Outcome:
    """Runs with all the room there is, then under pressure with these tiers; what comes out must be the same."""
    calm = await outcome(loaded, 1024, directory / "calm", Below(host=1024))
    assert calm.preemptions == 0
    assert len({*calm.tokens.values()}) == 64
    pressed = await outcome(loaded, int(0.3 * calm.demand), directory / "pressed", below, resume=resume)
    assert pressed.preemptions > 0
    assert pressed.tokens == calm.tokens
    if below.host:
        both = calm.kv.keys() & pressed.kv.keys()
        assert len(both) >= min(100, below.host // 4)
        assert all(calm.kv[key] == pressed.kv[key] for key in both)
    vocabulary = (b"x",) * loaded.config.vocab_size
    recording = directory / "pressed" / "recording.jsonl"
    assert await asyncio.to_thread(replay, recording, vocabulary) > 64
    return pressed


async def test_victims_come_back_from_the_host(loaded: Loaded, tmp_path: Path) -> None:
    pressed = await same_as_calm(loaded, tmp_path, Below(host=1024), resume="reload")
    assert pressed.resumptions["reload", HOST] > 0
    assert pressed.recomputed_tokens == 0


async def test_victims_come_back_from_the_disk(loaded: Loaded, tmp_path: Path) -> None:
    pressed = await same_as_calm(loaded, tmp_path, Below(disk=1024), resume="reload")
    assert pressed.resumptions["reload", DISK] > 0


async def test_host_and_disk_are_both_too_small(loaded: Loaded, tmp_path: Path) -> None:
    pressed = await same_as_calm(loaded, tmp_path, Below(host=8, disk=8))
    assert pressed.recomputed_tokens > 0
    assert pressed.unsaved_blocks > 0


async def test_reloads_fail_half_way(loaded: Loaded, tmp_path: Path) -> None:
    pressed = await same_as_calm(loaded, tmp_path, Below(disk=1024, failing_reads=2))
    assert pressed.reload_failures > 0
    assert pressed.recomputed_tokens > 0


async def test_victims_are_computed_again(loaded: Loaded, tmp_path: Path) -> None:
    pressed = await same_as_calm(loaded, tmp_path, Below(), resume="recompute")
    assert pressed.recomputed_tokens > 0


def turns(loaded: Loaded) -> list[list[Request]]:
    """Four conversations of five turns: each turn's prompt is all that was said before, and some more."""
    return [
        [
            Request(
                id=f"c{talk}t{turn}",
                prompt=tuple(random_tokens(40 + 50 * turn, loaded.config.vocab_size, seed=talk)),
                sampling=Sampling(temperature=float(talk % 2), seed=talk),
                stopping=Stopping(max_tokens=20, ignore_eos=True),
            )
            for talk in range(4)
        ]
        for turn in range(5)
    ]


@pytest.mark.parametrize(
    ("below", "tier"), [(Below(host=512), HOST), (Below(disk=512), DISK)], ids=[HOST, DISK]
)
async def test_turns_of_a_conversation_come_back_though_all_was_evicted_between(
    loaded: Loaded, tmp_path: Path, below: Below, tier: str
) -> None:
    calm = await conversations(loaded, tmp_path / "calm", Below())
    evicted = await conversations(loaded, tmp_path / "evicted", below)
    assert evicted.tokens == calm.tokens
    assert evicted.hit_tokens[tier] > 4 * 4 * 2 * BLOCK
    assert evicted.hit_tokens[DEVICE] == 0
    assert calm.hit_tokens.total() == 0


async def conversations(loaded: Loaded, directory: Path, below: Below) -> Outcome:
    """Turn by turn, with nothing left on the device after each."""
    return await outcome(loaded, 256, directory, below, rounds=turns(loaded))
