"""Measures a profile on this machine: a real runner's steps, copies to and from the host, steps of a live engine.

The main thread must be the caller's: torch has it, as in a server. Nothing else should run on the machine meanwhile.
"""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from app.compose import load
from app.config import Config
from app.core_config import COPY_BYTES
from app.profiling.fitting import Error, Sample, errors, fit_between, fit_steps, fit_transfer
from app.profiling.grid import Limits, cells
from app.profiling.live import Seen, watched
from app.serving import Parts
from app.tiers import device_tier
from engine.profile import Between, Profile, Transfer
from engine.runner import ModelRunner
from engine.runner_cuda import CudaRunner
from engine.step_time import shape
from kvstore.copies import Place
from kvstore.memory import MemoryTier, host_tier
from kvstore.tier import Buffer, Tier

ROUNDS = 5
COPY_REPEATS = 20

Note = Callable[[str], None]


def measure(config: Config, note: Note) -> tuple[Profile, list[Error]]:
    """A profile of the configured model here, and how far its fit is from what was measured. Raises CANNOT_START."""
    parts = load(config)
    runner = parts.worker.runner
    assert isinstance(runner, ModelRunner | CudaRunner)
    alone = _steps(runner, parts, note)
    device = device_tier(runner)
    transfers = _transfers(device, note)
    core = parts.core.config
    # where the next step is launched ahead, the rest of the engine works while the device does: nothing to see there
    seen = Seen() if core.max_outstanding > 1 else watched(parts, note)
    step = fit_steps(alone, seen.steps)
    profile = Profile(
        machine=_machine(),
        model=parts.model.name,
        dtype=str(runner.pool.dtype).removeprefix("torch."),
        source="measured by sluice bench profile: medians of steps alone, and steps of a live engine under load",
        block_size=core.scheduler.block_size,
        block_bytes=device.block_bytes,
        context=core.model_context,
        kv_blocks=core.scheduler.blocks,
        runs_ahead=core.max_outstanding > 1,
        step=step,
        between=fit_between(seen.gaps, seen.idle_seconds) if seen.gaps else Between(),
        transfers=transfers,
    )
    return profile, errors([*alone, *seen.steps], step.timer())


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
