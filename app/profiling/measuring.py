"""Measures a profile on this machine: a real runner's steps, copies to and from the host, and what lies between steps.

The main thread must be the caller's: torch has it, as in a server. Nothing else should run on the machine meanwhile.
"""

import asyncio
import platform
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from app.compose import load
from app.config import Config
from app.core_config import COPY_BYTES
from app.profiling.fitting import Error, Sample, errors, fit_line, fit_steps, fit_transfer
from app.profiling.grid import Limits, cells
from app.serving import Parts
from app.tiers import device_tier
from engine.engine import Engine
from engine.plan import Sampling
from engine.profile import Between, Profile, Transfer
from engine.records import StepRecord
from engine.request import Request, Stopping
from engine.runner import ModelRunner
from engine.runner_cuda import CudaRunner
from engine.step_time import Shape, Timer, shape
from engine.stream import Stream
from kvstore.copies import Place
from kvstore.memory import MemoryTier, host_tier
from kvstore.tier import Buffer, Tier

ROUNDS = 5
COPY_REPEATS = 20
BETWEEN_ROWS = (1, 4, 16, 48)
BETWEEN_TOKENS = 150
STORE_STOP_SECONDS = 10.0

Note = Callable[[str], None]


def measure(config: Config, note: Note) -> tuple[Profile, list[Error]]:
    """A profile of the configured model here, and how far its fit is from what was measured. Raises CANNOT_START."""
    parts = load(config)
    runner = parts.worker.runner
    assert isinstance(runner, ModelRunner | CudaRunner)
    samples = _steps(runner, parts, note)
    step = fit_steps(samples)
    device = device_tier(runner)
    transfers = _transfers(device, note)
    between = _between(parts, step.timer(), note)
    core = parts.core.config
    profile = Profile(
        machine=_machine(),
        model=parts.model.name,
        dtype=str(runner.pool.dtype).removeprefix("torch."),
        source="measured by sluice bench profile: medians of steps alone on the machine",
        block_size=core.scheduler.block_size,
        block_bytes=device.block_bytes,
        context=core.model_context,
        kv_blocks=core.scheduler.blocks,
        runs_ahead=core.max_outstanding > 1,
        step=step,
        between=between,
        transfers=transfers,
    )
    return profile, errors(samples, step.timer())


def _machine() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _steps(runner: ModelRunner | CudaRunner, parts: Parts, note: Note) -> list[Sample]:
    scheduler = parts.core.config.scheduler
    limits = Limits(
        block_size=scheduler.block_size,
        blocks=scheduler.blocks,
        context=parts.core.config.context,
        max_sequences=scheduler.max_sequences,
        max_batch_tokens=scheduler.max_batch_tokens,
    )
    wanted = [(cell.kind, cell.plan(limits.block_size)) for cell in cells(limits)]
    times: list[list[float]] = [[] for _ in wanted]
    for turn in range(ROUNDS + 1):  # in rounds, so that a slow minute of the machine is nobody's alone
        note(f"steps: round {turn} of {ROUNDS}")
        for (_, plan), found in zip(wanted, times, strict=True):
            runner.launch(
                plan
            ).collect()  # a step mostly follows one like it, and finds the caches as that left them
            seconds = runner.launch(plan).collect().seconds
            if turn:  # the first round only warms up
                found.append(seconds)
    return [
        Sample(kind, shape(plan), median(found)) for (kind, plan), found in zip(wanted, times, strict=True)
    ]


# --- copies -------------------------------------------------------------------------------------------------------


def _transfers(device: Tier, note: Note) -> dict[str, Transfer]:
    note("copies")
    most = max(2, COPY_BYTES // device.block_bytes)
    counts = sorted({1, max(1, most // 4), most})
    host = host_tier(most, device.block_bytes, pinned=not isinstance(device, MemoryTier))
    down = [(count, _copy_seconds(device, host, count)) for count in counts]
    up = [(count, _copy_seconds(host, device, count)) for count in counts]
    return {
        route: fit_transfer([(count * device.block_bytes, seconds) for count, seconds in found])
        for route, found in (("device>host", down), ("host>device", up))
    }


def _copy_seconds(source: Tier, target: Tier, count: int) -> float:
    """Of one copy, of blocks that lie apart."""
    places = [Place(b"", slot) for slot in np.random.default_rng(0).permutation(count).tolist()]
    times = []
    for _ in range(COPY_REPEATS):
        begun = time.perf_counter()
        _copy(source, target, places)
        times.append(time.perf_counter() - begun)
    return median(times)


def _copy(source: Tier, target: Tier, places: Sequence[Place]) -> None:
    if isinstance(source, MemoryTier) and isinstance(target, MemoryTier):
        source.copy_to(target, places, places)
    elif into := _buffers(target, places):
        source.read(places, into)
    else:
        target.write(places, _buffers(source, places))


def _buffers(tier: Tier, places: Sequence[Place]) -> list[Buffer]:
    found = [tier.buffer(place.slot) for place in places]
    return [each for each in found if each is not None]


# --- between steps ------------------------------------------------------------------------------------------------


def _between(parts: Parts, step_seconds: Timer, note: Note) -> Between:
    """A live engine decodes: what a step takes in it beyond the step alone, between steps or because of what goes on
    beside them."""
    gaps = parts.worker.run_beside(lambda: asyncio.run(_gaps(parts, step_seconds, note)))
    if parts.store:
        parts.store.stop(STORE_STOP_SECONDS)
    return Between(*fit_line(gaps))


async def _gaps(parts: Parts, step_seconds: Timer, note: Note) -> list[tuple[float, float]]:
    """(rows, median seconds of a step beyond the step alone)."""
    engine = Engine(parts.fleet, parts.workers, exact=parts.exact, store=parts.store, clock=time.perf_counter)
    found = []
    for rows in BETWEEN_ROWS:
        if rows > parts.core.config.scheduler.max_sequences:
            break
        note(f"between steps: {rows} streams")
        seen = await _decode(engine, rows)
        steps = [
            (at - before, rows * number)  # positions read: each stream began with one token
            for number, ((before, last), (at, record)) in enumerate(pairwise(seen), 2)
            if record.rows == last.rows == rows
        ]
        beyond = [took - step_seconds(Shape(rows, rows, rows, context)) for took, context in steps]
        if beyond:
            found.append((float(rows), max(0.0, median(beyond))))
    return found


async def _decode(engine: Engine, rows: int) -> list[tuple[float, StepRecord]]:
    """So many streams at once; the records of their steps, and when each came."""
    seen: list[tuple[float, StepRecord]] = []

    def watch(record: StepRecord) -> None:
        seen.append((time.perf_counter(), record))

    engine.on_step.append(watch)
    room = engine.core.config.context - 1
    stopping = Stopping(min(BETWEEN_TOKENS, room), ignore_eos=True)
    streams = [
        engine.submit(Request(f"gap {rows} {index}", (index + 1,), Sampling(seed=index), stopping))
        for index in range(rows)
    ]
    await asyncio.gather(*(_read(stream) for stream in streams))
    engine.on_step.remove(watch)
    return seen


async def _read(stream: Stream) -> None:
    async for _ in stream:
        pass
