"""How late the event loop is while everything is spilled at full speed; a part of bench.transfers.

As in the server (app/process.py) the main thread computes and the event loop has a second one. The loop keeps copies of
4 MiB under way from device to host and from host to disk, 64 MiB each, and sets a timer again and again. The main
thread multiplies matrices with torch and runs one of our own kernels' kind of loop, with Python between, as a step has.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
import uvloop
from numpy.typing import NDArray
from rich.table import Table

from bench import machine
from bench.transfers_rig import ARENA_BYTES, Model, arenas, batches_of, open_disk, places, transaction_blocks
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, TierDown, TierUp
from kvstore.native import compiled
from kvstore.store import Store

SECONDS: Final = 8.0
PERIOD_SECONDS: Final = 0.005
GOAL_SECONDS: Final = 0.02
COPY_BYTES: Final = 4 * 2**20
IN_FLIGHT_BYTES: Final = 64 * 2**20
DISK_BYTES: Final = 256 * 2**20
ROWS, WIDTH = 32, 1024


@dataclass(frozen=True, slots=True)
class Lag:
    model: str
    what: str
    samples: int
    median_seconds: float
    p99_seconds: float
    worst_seconds: float
    steps_per_second: float  # of the main thread
    memory_bytes_per_second: float
    disk_bytes_per_second: float
    others_cores: float


class Spiller:
    """Keeps both routes full until it is stopped. All but `told` belongs to the loop's thread."""

    def __init__(self, model: Model, path: Path) -> None:
        device, host = arenas(model.block_bytes)
        self.moved = {HOST: 0, DISK: 0}
        self._size = model.block_bytes
        self._blocks = ARENA_BYTES // model.block_bytes
        self._capacity = DISK_BYTES // model.block_bytes
        self._records: list[bytes] = []  # oldest first
        self._under_way: dict[int, Copy] = {}
        self._ids, self._keys = count(), count()
        self._stopping = False
        self._quiet = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        opener = partial(open_disk, path, model.block_bytes, self._capacity)
        self._store = Store({DEVICE: device, HOST: host}, {DISK: opener}, hung_seconds=60, retry_seconds=60)

    async def start(self) -> None:
        await asyncio.to_thread(self._store.open)
        self._store.start(self.told)
        for target in (HOST, DISK):
            for _ in range(IN_FLIGHT_BYTES // COPY_BYTES):
                self._submit(target)

    async def stop(self) -> None:
        self._stopping = True
        await self._quiet.wait()
        assert await asyncio.to_thread(self._store.stop, 60)

    def told(self, news: CopyDone | TierDown | TierUp) -> None:
        self._loop.call_soon_threadsafe(self._heard, news)

    def _heard(self, news: CopyDone | TierDown | TierUp) -> None:
        assert not isinstance(news, TierDown), news
        if not isinstance(news, CopyDone):
            return
        assert not news.lost, news
        copy = self._under_way.pop(news.id)
        self.moved[copy.target] += len(copy.sources) * self._size
        if not self._stopping:
            self._submit(copy.target)
        elif not self._under_way:
            self._quiet.set()

    def _submit(self, target: str) -> None:
        id = next(self._ids)
        batch = transaction_blocks(self._size, COPY_BYTES // self._size)
        [(those, there)] = batches_of(batch, batch, self._blocks, id)
        keys = [next(self._keys).to_bytes(32, "big") for _ in range(batch)]
        drops: list[bytes] = []
        if target == DISK:
            self._records += keys
            spare = max(0, len(self._records) - self._capacity)
            drops, self._records = self._records[:spare], self._records[spare:]
        source = DEVICE if target == HOST else HOST
        copy = Copy(id, source, target, places(keys, those), places(keys, there), tuple(drops))
        self._under_way[id] = copy
        self._store.submit(copy)


@compiled
def _scan(numbers: NDArray[np.float32]) -> float:
    total = 0.0
    for number in numbers:
        total = max(total * 0.999, number)
    return total


class Steps:
    """What the main thread does."""

    def __init__(self) -> None:
        self._weights = [torch.randn(WIDTH, 4 * WIDTH, dtype=torch.bfloat16) for _ in range(8)]
        self._rows = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
        self._numbers = np.random.default_rng(1).standard_normal(200_000, dtype=np.float32)

    def run(self) -> None:
        """Some milliseconds."""
        x = self._rows
        for weight in self._weights:
            x = torch.nn.functional.silu(x @ weight)[:, :WIDTH]
        _scan(self._numbers)
        sum(
            number * number for number in range(3000)
        )  # holds the interpreter's lock, as a step's Python does


async def lags(seconds: float) -> list[float]:
    """By how much a timer came late, each time."""
    loop, found = asyncio.get_running_loop(), []
    end = loop.time() + seconds
    while (now := loop.time()) < end:
        await asyncio.sleep(PERIOD_SECONDS)
        found.append(max(0.0, loop.time() - now - PERIOD_SECONDS))
    return found


def run(models: Sequence[Model], path: Path) -> list[Lag]:
    steps = Steps()
    steps.run()
    rows = []
    for model in models:
        for what in ("computing", "computing and spilling"):
            with TemporaryDirectory(dir=path) as directory:
                spill = what != "computing"
                rows.append(_beside(steps, partial(_measure, model, what, Path(directory), spill)))
    return rows


def _beside(steps: Steps, measure: Callable[[Callable[[], int]], Coroutine[Any, Any, Lag]]) -> Lag:
    """Computes on this thread until the loop on another one has measured."""
    done, ended = 0, threading.Event()
    found: list[Lag] = []

    def loop() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                found.append(runner.run(measure(lambda: done)))
        finally:
            ended.set()

    thread = threading.Thread(target=loop)
    thread.start()
    while not ended.is_set():
        steps.run()
        done += 1
    thread.join()
    [lag] = found
    return lag


async def _measure(model: Model, what: str, path: Path, spill: bool, steps: Callable[[], int]) -> Lag:
    spiller = Spiller(model, path) if spill else None
    if spiller:
        await spiller.start()
    await lags(0.5)  # until all threads are at work
    moved, began, before = dict(spiller.moved) if spiller else {}, time.perf_counter(), steps()
    others = machine.Others(os.getpid())
    late = await lags(SECONDS)
    cores = round(others.cores(), 3)
    taken, done = time.perf_counter() - began, steps() - before
    rates = {tier: (spiller.moved[tier] - moved[tier]) / taken if spiller else 0.0 for tier in (HOST, DISK)}
    if spiller:
        await spiller.stop()
    p50, p99, worst = (float(np.quantile(late, q)) for q in (0.5, 0.99, 1.0))
    return Lag(model.name, what, len(late), p50, p99, worst, done / taken, rates[HOST], rates[DISK], cores)


def table(rows: Sequence[Lag]) -> Table:
    shown = Table(
        "model", "what", "samples", "p50 ms", "p99 ms", "worst ms", "steps/s", "to host MB/s", "to disk MB/s", "others",
        title="event loop lag", caption=f"! misses {GOAL_SECONDS * 1e3:.0f} ms",
    )  # fmt: skip
    for row in rows:
        late = (row.median_seconds, row.p99_seconds, row.worst_seconds)
        figures = [f"{seconds * 1e3:.1f}" for seconds in late]
        figures[1] += "!" * (row.p99_seconds >= GOAL_SECONDS)
        rates = (f"{rate / 1e6:,.0f}" for rate in (row.memory_bytes_per_second, row.disk_bytes_per_second))
        shown.add_row(
            row.model,
            row.what,
            str(row.samples),
            *figures,
            f"{row.steps_per_second:.0f}",
            *rates,
            f"{row.others_cores:.2f}",
        )
    return shown
