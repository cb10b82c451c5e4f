"""The shell: streams, cancels, draining and death, with a scripted runner on a real worker thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.events import Cancelled
from engine.fleet import Fleet, FleetConfig
from engine.plan import Launched, Plan, StepResult
from engine.recording import Difference, FileRecorder, RecordingError, header, replay
from engine.records import StepRecord
from engine.request import EngineDead, Finished, FinishReason, QueueFull, Refused
from engine.stream import Stream
from engine.tiers_below import Store
from engine.worker import QueueWorker, ThreadWorker
from kvstore.below import ResidencyConfig
from kvstore.copies import DISK, Copy, CopyDone, Drop, Loss, Place, TierDown, TierUp
from kvstore.tier import Tier
from tests.engine.driving import VOCABULARY, Driver, core_config, request
from tests.fakes import ScriptedRunner, hashed


class BreakingRunner(ScriptedRunner):
    """Fails at its third step."""

    def launch(self, plan: Plan) -> Launched:
        if plan.step == 3:
            raise RuntimeError("the device is gone")
        return super().launch(plan)


class BreakingLaunched:
    def collect(self) -> StepResult:
        raise RuntimeError("the device is gone")


class BreakingLate(ScriptedRunner):
    """Launches its first step; what came of it cannot be had."""

    def launch(self, plan: Plan) -> Launched:
        return BreakingLaunched()


class Held(ScriptedRunner):
    """Its second step takes until `released`."""

    released: threading.Event

    def launch(self, plan: Plan) -> Launched:
        if plan.step == 2:
            self.released.wait()
        return super().launch(plan)


@asynccontextmanager
async def running(
    runner: type[ScriptedRunner] = ScriptedRunner,
    recorder: FileRecorder | None = None,
    store: Store | None = None,
    **config: Any,
) -> AsyncIterator[Engine]:
    fleet = Fleet(FleetConfig.of(core_config(**config)), VOCABULARY)
    fake = runner(hashed(98), block_size=4, max_sequences=8)
    overlap = config.get("max_outstanding", 1) > 1
    worker = ThreadWorker(fake, overlap=overlap)
    engine = Engine(fleet, [worker], exact=True, store=store, recorder=recorder)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)
    fleet.check()


async def read(stream: Stream) -> tuple[int, ...]:
    return tuple([token async for delta in stream for token in delta.token_ids])


@pytest.mark.parametrize("max_outstanding", [1, 2])
async def test_streams_under_pressure_say_what_a_driven_core_says(max_outstanding: int) -> None:
    asked = [request(f"r{i}", range(i, i + 5), max_tokens=30, seed=i) for i in range(16)]
    driver = Driver(core_config(blocks=1000))
    driver.arrive(*asked)
    driver.finish()
    async with running(blocks=20, max_outstanding=max_outstanding) as engine:
        answers = await asyncio.gather(*(read(engine.submit(each)) for each in asked))
        assert engine.core.scheduler.counts.preemptions > 0
    assert answers == [driver.tokens(each.id) for each in asked]


async def test_a_slow_reader_gets_merged_deltas_and_all_of_them() -> None:
    async with running() as engine:
        slow, other = (
            engine.submit(request("slow", [1, 2])),
            engine.submit(request("other", [3], max_tokens=30)),
        )
        await read(other)
        deltas = [delta async for delta in slow]
        assert len(deltas) == 1
        assert len(deltas[0].token_ids) == 8
        assert deltas[0].finish_reason is FinishReason.LENGTH
        assert (slow.usage.prompt_tokens, slow.usage.completion_tokens) == (2, 8)


async def test_usage_tells_cached_tokens() -> None:
    async with running() as engine:
        for expected in (0, 16):
            stream = engine.submit(request("a", range(20)))
            await read(stream)
            assert stream.usage.cached_tokens == expected


async def test_cancel_ends_the_stream_and_frees_blocks_at_once() -> None:
    async with running() as engine:
        stream = engine.submit(request("a", range(20), max_tokens=200))
        await anext(stream)
        assert stream.cancel()
        assert engine.core.scheduler.pool.held == 0
        assert [delta.finish_reason async for delta in stream] == [FinishReason.CANCELLED]
        assert not stream.cancel()


async def test_refusals_are_raised_and_leave_nothing() -> None:
    async with running(max_queue=2, model_context=50) as engine:
        with pytest.raises(Refused, match="context is 50 tokens") as refused:
            engine.submit(request("long", range(60)))
        assert refused.value.code == "context_length_exceeded"
        streams = [engine.submit(request("first", [1], max_tokens=40))]
        with pytest.raises(QueueFull):
            streams += [engine.submit(request(f"r{i}", [i])) for i in range(4)]
        for stream in streams:
            await read(stream)
        assert engine.requests() == []


async def test_a_dead_runner_ends_every_stream_and_refuses_more() -> None:
    async with running(BreakingRunner) as engine:
        stream = engine.submit(request("a", [1], max_tokens=30))
        with pytest.raises(EngineDead):
            await read(stream)
        assert isinstance(await engine.dead, RuntimeError)
        with pytest.raises(EngineDead):
            engine.submit(request("b", [1]))


def test_a_worker_ends_when_a_result_cannot_be_collected() -> None:
    reports: list[StepResult | BaseException] = []
    worker = QueueWorker(BreakingLate(hashed(98), block_size=4, max_sequences=8), overlap=True)
    worker.start(reports.append)
    worker.submit(Plan(1, (), ()))
    worker.run_forever()
    assert [str(report) for report in reports] == ["the device is gone"]


@pytest.mark.parametrize("fails", [False, True])
def test_work_beside_a_worker_is_waited_for_and_its_failure_is_ours(fails: bool) -> None:
    worker = QueueWorker(ScriptedRunner(hashed(98), block_size=4, max_sequences=8))
    reports: list[StepResult | BaseException] = []
    worker.start(reports.append)

    def work() -> str:
        worker.submit(Plan(1, (), ()))
        if fails:
            raise ValueError("no such workload")
        return threading.current_thread().name

    if fails:
        with pytest.raises(ValueError, match="no such workload"):
            worker.run_beside(work)
    else:
        assert worker.run_beside(work).startswith("event loop")
    assert [isinstance(report, StepResult) for report in reports] == [True], "what was submitted is done"


def test_a_step_may_end_after_its_loop_has_closed() -> None:
    """A drain that ran out of time leaves a step under way; the worker then still ends in peace."""
    runner = Held(hashed(98), block_size=4, max_sequences=8)
    runner.released = threading.Event()
    worker = QueueWorker(runner)

    async def serve() -> None:
        engine = Engine(Fleet(FleetConfig.of(core_config()), VOCABULARY), [worker], exact=True)
        await anext(engine.submit(request("a", [1], max_tokens=30)))
        assert not await engine.drain(0)
        engine.stop()

    def serve_and_release() -> None:
        asyncio.run(serve())
        runner.released.set()

    loop = threading.Thread(target=serve_and_release)
    loop.start()
    worker.run_forever()
    loop.join()
    assert len(runner.plans) == 2


async def test_drain_waits_for_those_at_hand_and_takes_no_more() -> None:
    async with running() as engine:
        stream = engine.submit(request("a", [1], max_tokens=30))
        drained = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="shutting down"):
            engine.submit(request("b", [1]))
        assert len(await read(stream)) == 30
        assert await drained


async def test_drain_cancels_what_takes_too_long() -> None:
    async with running() as engine:
        stream = engine.submit(request("a", [1], max_tokens=200))
        assert not await engine.drain(0)
        assert [delta.finish_reason async for delta in stream][-1] is FinishReason.CANCELLED


async def test_observers_see_every_step_and_every_end() -> None:
    steps: list[StepRecord] = []
    ends: list[Finished] = []
    async with running() as engine:
        engine.on_step.append(steps.append)
        engine.on_finished.append(ends.append)
        await read(engine.submit(request("a", range(20), n=2)))
    assert all(step.computed_tokens == step.prefill_tokens + step.decode_tokens for step in steps)
    assert sum(step.prefix_hits for step in steps) == 16
    assert [end.choice for end in ends] == [0, 1]
    assert all(len(end.token_times) == 8 for end in ends)


async def test_a_recorded_run_replays_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    async with (
        FileRecorder().writing(path, FleetConfig.of(core_config(blocks=20))) as recorder,
        running(recorder=recorder, blocks=20) as engine,
    ):
        asked = [request(f"r{i}", range(i, i + 5), max_tokens=20, seed=i) for i in range(12)]
        streams = [engine.submit(each) for each in asked]
        streams[3].cancel()
        await asyncio.gather(*(read(stream) for stream in streams))
        preemptions = engine.core.scheduler.counts.preemptions
    assert recorder.failure is None
    assert preemptions > 0
    assert replay(path, VOCABULARY) > 20
    changed = path.read_bytes().replace(b'"max_tokens":20', b'"max_tokens":19', 1)
    path.write_bytes(changed)
    with pytest.raises(Difference, match="event"):
        replay(path, VOCABULARY)


class Reporting:
    """A store that only says what it is told to."""

    report: Callable[[CopyDone | TierDown | TierUp], None]

    def start(self, report: Callable[[CopyDone | TierDown | TierUp], None]) -> None:
        self.report = report

    def submit(self, copy: Copy) -> None:
        self.report(CopyDone(copy.id, tuple((index, Loss.DOWN) for index in range(len(copy.sources)))))

    def drop(self, drop: Drop) -> None:
        pass

    def put_device(self, replica: int, tier: Tier) -> None:
        raise AssertionError("no replica is started again")

    def block_bytes(self, tier: str) -> int:
        return 1


async def test_a_large_tier_comes_up_in_parts_between_which_others_come_and_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told, gone before all of it was known, told again: in the end all of it is known, once."""
    monkeypatch.setattr("engine.tiers_below.RECORDS_AT_ONCE", 2)
    keys = [bytes([number]) * 32 for number in range(7)]
    places = [Place(key, -1, keys[n - 1] if n else b"", n, 4) for n, key in enumerate(keys)]
    path, store, news = tmp_path / "run.jsonl", Reporting(), asyncio.Queue[tuple[str, bool, str]]()
    below = ResidencyConfig(disk_blocks=20)
    config = core_config(blocks=20, residency=below)
    async with (
        FileRecorder().writing(path, FleetConfig.of(config)) as recorder,
        running(recorder=recorder, store=store, blocks=20, residency=below) as engine,
    ):
        engine.on_tier.append(lambda *told: news.put_nowait(told))
        disk = engine.core.scheduler.residency.shelves.named
        store.report(TierUp(DISK, tuple(places)))
        store.report(TierDown(DISK, "it has gone"))
        assert await news.get() == (DISK, False, "it has gone")
        store.report(TierUp(DISK, tuple(places)))
        assert len(disk(DISK)) == 0

        async def others() -> list[tuple[int, ...]]:
            """One comes in each turn of the loop."""
            streams = []
            for number in range(6):
                streams.append(engine.submit(request(f"r{number}", range(5), max_tokens=3)))
                await asyncio.sleep(0)
            return [await read(stream) for stream in streams]

        coming = asyncio.create_task(others())
        assert await news.get() == (DISK, True, "7 records")
        ours = [entry.key for entry in disk(DISK).entries() if entry.key in keys]  # the request's may come in
        assert ours == keys
        assert [len(answer) for answer in await coming] == [3] * 6
    lines = path.read_text().splitlines()
    ups = [number for number, line in enumerate(lines) if '"TierUp"' in line]
    assert 4 < len(ups) < 8, "the first was broken off"
    assert ups[-1] - ups[-4] > 3, "others came between"
    assert replay(path, VOCABULARY) == len(lines) - 1


async def test_the_event_that_kills_the_core_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    config = FleetConfig.of(core_config())
    async with FileRecorder().writing(path, config) as recorder, running(recorder=recorder) as engine:
        with pytest.raises(AssertionError):
            engine.submit(request("a", []))
        assert isinstance(await engine.dead, AssertionError)
    with pytest.raises(AssertionError):
        replay(path, VOCABULARY)


async def test_a_recording_ends_when_its_disk_fails(tmp_path: Path) -> None:
    """Even with the line that says so waiting for room behind those that cannot be written."""
    recorder = FileRecorder(limit=1)
    async with (
        asyncio.timeout(60),
        recorder.writing(tmp_path / "none" / "run.jsonl", FleetConfig.of(core_config())),
    ):
        recorder.record(0.0, Cancelled("nobody"), [])
    assert isinstance(recorder.failure, FileNotFoundError)


@pytest.mark.parametrize("line", ["hello", "7", '[0.0, "Nothing", {}, []]', '[0.0, "Cancelled", 7, []]'])
def test_a_line_that_is_no_event_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(header(FleetConfig.of(core_config())) + b"\n" + line.encode() + b"\n")
    with pytest.raises(RecordingError, match="line 2"):
        replay(path, VOCABULARY)


def test_what_is_not_a_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("hello\n")
    with pytest.raises(RecordingError, match="line 1"):
        replay(path, VOCABULARY)
