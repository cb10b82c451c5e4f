"""What the composition root puts together: memory → blocks, recordings, the loop's lag."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request

from app.compose import CannotRecord, check_recording
from app.config import Config, EngineSection
from app.lag import measured_lag
from app.memory import NotEnoughMemory, free_cpu_bytes, kv_blocks
from app.served import Model
from app.serving import Parts, serving
from app.sse import EventStream
from engine.core import CoreConfig
from engine.engine import Engine, Revived
from engine.fleet import BalanceConfig, Fleet, FleetConfig
from engine.model.generation import GenerationDefaults
from engine.plan import Launched, Plan, Sampling
from engine.policy_set import PolicyConfig
from engine.recording import replay
from engine.request import Request, Stopping
from engine.scheduler import SchedulerConfig
from engine.worker import QueueWorker, ThreadWorker
from tests.app.rig import EOS, STORY, VOCABULARY, ByteTokenizer
from tests.engine.driving import UNFORESEEN
from tests.fakes import ScriptedRunner, hashed, saying


@pytest.mark.parametrize(
    ("wanted", "free", "useful", "blocks"),
    [
        (0, 1000, 100, 50),  # half of the free memory
        (0, 1000, 20, 20),  # no more than can be held
        (70, 1000, 20, 70),  # what the operator says, while it fits
    ],
)
def test_blocks_from_memory(wanted: int, free: int, useful: int, blocks: int) -> None:
    assert kv_blocks(wanted, block_bytes=10, useful_blocks=useful, free_bytes=free, share=0.5) == blocks


@pytest.mark.parametrize(("wanted", "free"), [(101, 1000), (0, 19)])
def test_a_pool_that_does_not_fit_is_refused_with_what_to_change(wanted: int, free: int) -> None:
    with pytest.raises(NotEnoughMemory, match="free"):
        kv_blocks(wanted, block_bytes=10, useful_blocks=100, free_bytes=free, share=0.5)


def test_free_memory_is_a_plausible_number() -> None:
    assert 2**20 < free_cpu_bytes() < 2**60


async def test_a_recording_of_a_live_run_replays_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    scheduler = SchedulerConfig(16, 24, 64, 4, policies=PolicyConfig(parameters=UNFORESEEN))
    core = CoreConfig(scheduler, model_context=256, max_queue=8, eos_token_ids=(EOS,))
    fleet = Fleet(FleetConfig.of(core), VOCABULARY)
    worker = QueueWorker(ScriptedRunner(saying(STORY), block_size=16, max_sequences=4))
    steps = asyncio.ensure_future(asyncio.to_thread(worker.run_forever))
    config = Config(engine=EngineSection(record=str(path)))
    async with serving(Parts(config, MODEL, fleet, [worker], exact=True)) as (engine, _):
        requests = [Request(f"r{i}", (i,) * 40, Sampling(), Stopping(120)) for i in range(4)]
        streams = [engine.submit(request) for request in requests]
        for stream in streams:
            assert sum([len(delta.token_ids) async for delta in stream]) == 120
    await steps
    assert fleet.cores[0].scheduler.counts.preemptions > 0
    assert await asyncio.to_thread(replay, path, VOCABULARY) > 120


def test_a_recording_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    check_recording(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(CannotRecord, match="cannot be written"):
        check_recording(str(tmp_path / "none" / "run.jsonl"))


MODEL = Model("otter", ByteTokenizer(), VOCABULARY, {}, GenerationDefaults((EOS,)), created=1, token_ids=257)


class Burning(ScriptedRunner):
    """Fails at its third step."""

    def launch(self, plan: Plan) -> Launched:
        if plan.step == 3:
            raise RuntimeError("the device is on fire")
        return super().launch(plan)


async def test_a_first_replica_that_dies_leaves_its_thread_and_comes_back_on_another() -> None:
    """Its requests go on at the second; one that is placed there again is served by a new worker's thread."""
    core = CoreConfig(SchedulerConfig(16, 64, 64, 4), model_context=256, max_queue=8)
    runners = [kind(hashed(200), block_size=16, max_sequences=4) for kind in (Burning, ScriptedRunner)]
    first_worker, other = QueueWorker(runners[0]), ThreadWorker(runners[1])
    started, back = list[ThreadWorker](), asyncio.Event()

    async def revive(number: int) -> Revived:
        assert number == 0
        started.append(ThreadWorker(ScriptedRunner(hashed(200), block_size=16, max_sequences=4)))
        return Revived(started[-1], None)

    async def said(engine: Engine, name: str) -> list[int]:
        stream = engine.submit(Request(name, (1,) * 40, Sampling(seed=1), Stopping(20)))
        return [token for delta in [delta async for delta in stream] for token in delta.token_ids]

    steps = asyncio.ensure_future(asyncio.to_thread(first_worker.run_forever))
    workers = [first_worker, other]
    parts = Parts(
        Config(), MODEL, Fleet(FleetConfig.of(core, 2), VOCABULARY), workers, exact=True, revive=revive
    )
    async with serving(parts) as (engine, _):
        engine.on_replica.append(lambda number, up, reason: back.set() if up else None)
        first = await said(engine, "first")
        await steps  # the main thread has left; nobody else has
        assert engine.failure is None
        engine.drain_replica(0, draining=False)
        await back.wait()
        engine.drain_replica(1, draining=True)
        assert len(first) == 20
        assert await said(engine, "second") == first
        assert await engine.drain(20.0)
    assert len(runners[1].plans) > 0
    assert not started[0]._thread.is_alive()
    assert not other._thread.is_alive()


async def test_the_engines_timer_runs_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: asyncio.Queue[None] = asyncio.Queue()
    monkeypatch.setattr(Engine, "tick", lambda engine: ticks.put_nowait(None))
    core = CoreConfig(SchedulerConfig(16, 64, 64, 4), model_context=256, max_queue=8)
    often = FleetConfig.of(core, balance=BalanceConfig(period_seconds=0.001))
    worker = QueueWorker(ScriptedRunner(saying(STORY), block_size=16, max_sequences=4))
    before = asyncio.all_tasks()
    async with serving(Parts(Config(), MODEL, Fleet(often, VOCABULARY), [worker], exact=True)):
        for _ in range(3):
            await ticks.get()
    assert asyncio.all_tasks() == before, "it has ended"


async def test_the_lag_of_a_loop_is_observed() -> None:
    seen: asyncio.Queue[float] = asyncio.Queue()
    async with measured_lag(seen.put_nowait):
        assert await seen.get() >= 0


@pytest.mark.parametrize(
    "beside",
    [
        lambda: measured_lag(lambda seconds: None),
        lambda: EventStream(make_mocked_request("GET", "/"), ping_seconds=100).pinging(),
    ],
)
async def test_who_is_cancelled_while_its_helper_ends_is_cancelled(
    beside: Callable[[], AbstractAsyncContextManager[None]],
) -> None:
    went_on = asyncio.Event()

    async def handler() -> None:
        async with beside():
            await asyncio.sleep(0)
        went_on.set()

    handling = asyncio.ensure_future(handler())
    for _ in range(2):
        await asyncio.sleep(0)
    handling.cancel()
    await asyncio.wait([handling])
    assert handling.cancelled()
    assert not went_on.is_set()
