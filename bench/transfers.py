"""Spill and fetch through the store: `python -m bench.transfers [memory disk lag gpu …] [--out DIR] [--path DIR]`.

memory: device (a pool on the CPU) to host and back, against numpy copies of the same slots. disk: device and host to
disk and back, against LMDB with values of the same size, as many a transaction. lag: how late the event loop is while
all that is spilled at full speed and the main thread computes. gpu: a card's pool, against the runtime's own copies,
and what spilling costs its decode; left out where there is no card, and not yet run on one.

Ours is what the engine waits for: submitted copies, through queue and threads, to the last CopyDone. Rounds take the
two in turn; figures are medians. The disk tier without the store, and reads of a cold disk: disk_records.py.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from mmap import PAGESIZE
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Semaphore
from typing import Any, Final

import lmdb
import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from bench import machine, transfers_gpu, transfers_lag
from bench.report import console
from bench.transfers_rig import (
    ARENA_BYTES,
    Model,
    Slots,
    arenas,
    batches_of,
    copies_of,
    keys_of,
    models,
    open_disk,
    transaction_blocks,
)
from kvstore import memory
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, TierDown, TierUp
from kvstore.format import value_bytes
from kvstore.memory import MemoryTier
from kvstore.store import Opened, Store

BATCHES: Final = (1, 8, 64)  # blocks a copy
ROUNDS: Final = 5
GOAL: Final = 0.8
MEMORY_BYTES: Final = 512 * 2**20  # moved a round
DISK_BYTES: Final = {1: 12 * 2**20, 8: 48 * 2**20, 64: 128 * 2**20}  # by batch: small transactions are slow
WAIT_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    block_bytes: int
    route: str
    batch: int  # blocks a copy, at most
    who: str
    round: int
    bytes: int
    seconds: float
    others_cores: float


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """A store over two memories, and a disk where `disk` says how it is opened. Waits for all that it begins."""

    def __init__(
        self, device: MemoryTier, host: MemoryTier, disk: Callable[[], Opened] | None = None
    ) -> None:
        self.device, self.host = device, host
        self.blocks = ARENA_BYTES // host.block_bytes
        self._ended = Semaphore(0)
        self._lost = 0
        fallible = {DISK: disk} if disk else {}
        self.store = Store(
            {DEVICE: self.device, HOST: self.host}, fallible, hung_seconds=60, retry_seconds=60
        )
        self.store.open()
        self.store.start(self._report)

    def _report(self, news: CopyDone | TierDown | TierUp) -> None:
        assert not isinstance(news, TierDown), news
        if isinstance(news, CopyDone):
            self._lost += len(news.lost)
            self._ended.release()

    def run(self, copies: Sequence[Copy]) -> float:
        """Seconds from the first submission to the last end."""
        began = time.perf_counter()
        for copy in copies:
            self.store.submit(copy)
        for _ in copies:
            assert self._ended.acquire(timeout=WAIT_SECONDS)
        taken = time.perf_counter() - began
        assert not self._lost, "nothing is lost here"
        return taken

    def close(self) -> None:
        assert self.store.stop(WAIT_SECONDS)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_rows(model: Model) -> Iterator[Row]:
    """Each way, ours against np.copyto of one slot after another."""
    ours = Ours(*arenas(model.block_bytes))
    slots = {DEVICE: _slots(ours.device, ours.blocks), HOST: _slots(ours.host, ours.blocks)}
    for route in ((DEVICE, HOST), (HOST, DEVICE)):
        for batch in BATCHES:
            count = MEMORY_BYTES // model.block_bytes // batch * batch
            batches = partial(batches_of, count, batch, ours.blocks)
            systems = {
                "sluice": partial(_stored, ours, route, batches),
                "memcpy": partial(_copied, slots[route[0]], slots[route[1]], batches),
            }
            yield from rounds(model, route, batch, count, systems)
    ours.close()


Batches = Callable[[int], list[tuple[Slots, Slots]]]
"""By a seed."""


def _stored(ours: Ours, route: tuple[str, str], batches: Batches, seed: int) -> float:
    found = batches(seed)
    return ours.run(copies_of(*route, found, [b""] * sum(len(those) for those, _ in found)))


def _slots(tier: MemoryTier, blocks: int) -> list[NDArray[np.uint8]]:
    return [tier.buffer(slot) for slot in range(blocks)]


def _copied(
    source: Sequence[NDArray[np.uint8]], target: Sequence[NDArray[np.uint8]], batches: Batches, seed: int
) -> float:
    found = batches(seed)
    pairs = [pair for those, there in found for pair in zip(those.tolist(), there.tolist(), strict=True)]
    began = time.perf_counter()
    for that, place in pairs:
        np.copyto(target[place], source[that])
    return time.perf_counter() - began


def rounds(
    model: Model,
    route: tuple[str, str],
    batch: int,
    count: int,
    systems: Mapping[str, Callable[[int], float]],
) -> Iterator[Row]:
    """One untimed round, then ROUNDS of each system, whose order turns."""
    for round_ in range(-1, ROUNDS):
        for who in list(systems)[:: 1 if round_ % 2 else -1]:
            others = machine.Others(os.getpid())
            seconds = systems[who](round_ + 1)
            if round_ >= 0:
                name, size = f"{route[0]} → {route[1]}", count * model.block_bytes
                cores = round(others.cores(), 3)
                yield Row(model.name, model.block_bytes, name, batch, who, round_, size, seconds, cores)


# --- disk -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """What a round of either system needs, made and touched once: where a hypervisor has taken a page back, touching it
    again costs 10 µs, and rounds on new memory were slower by anything up to seven times.
    """

    device: MemoryTier
    host: MemoryTier
    values: NDArray[np.uint8]  # LMDB's: [n, value_bytes]
    target: NDArray[np.uint8]  # [n, block_bytes]

    @classmethod
    def of(cls, block_bytes: int) -> "Memory":
        size = value_bytes(block_bytes, PAGESIZE)
        values, target = (np.ones((ARENA_BYTES // each, each), np.uint8) for each in (size, block_bytes))
        return cls(*arenas(block_bytes), values, target)


def disk_rows(model: Model, path: Path) -> Iterator[Row]:
    """Down, up, and up again; a fresh store for each round, its reads warm.

    The first reads are of pages that the process has not mapped, which LMDB alone must have: the second are not.
    """
    at_hand = Memory.of(model.block_bytes)
    for name in (DEVICE, HOST):
        for batch in BATCHES:
            count = DISK_BYTES[batch] // model.block_bytes // batch * batch
            yield from _disk_rounds(model, at_hand, path, name, batch, count)


def _disk_rounds(
    model: Model, at_hand: Memory, path: Path, name: str, batch: int, count: int
) -> Iterator[Row]:
    """One untimed round, then ROUNDS of each system, whose order turns."""
    step = transaction_blocks(model.block_bytes, batch)
    for round_ in range(-1, ROUNDS):
        for who in ("sluice", "LMDB", "LMDB, 2 threads")[:: 1 if round_ % 2 else -1]:
            others = machine.Others(os.getpid())
            with fresh(path) as directory:
                keys = keys_of(count, round_ + 1)
                if who == "sluice":
                    found = _our_disk(at_hand, directory, name, keys, step)
                else:
                    found = _raw_disk(at_hand, directory, keys, step, threads=1 + (who != "LMDB"))
            cores = round(others.cores(), 3)
            routes = f"{name} → {DISK}", f"{DISK} → {name}", f"{DISK} → {name}, again"
            for route, seconds in zip(routes, found, strict=True):
                size = count * model.block_bytes
                if round_ >= 0:
                    peer = (
                        "LMDB" if route.endswith(DISK) and who != "sluice" else who
                    )  # one thread writes in both
                    yield Row(model.name, model.block_bytes, route, batch, peer, round_, size, seconds, cores)


@contextmanager
def fresh(path: Path) -> Iterator[Path]:
    directory = path / "store"
    yield directory
    shutil.rmtree(
        directory
    )  # no os.sync() here: on a disk mounted with discard the next files were then 3 times slower


def _our_disk(
    at_hand: Memory, path: Path, name: str, keys: Sequence[bytes], step: int
) -> tuple[float, float, float]:
    opener = partial(open_disk, path, at_hand.host.block_bytes, len(keys))
    ours = Ours(at_hand.device, at_hand.host, opener)
    batches = batches_of(len(keys), step, ours.blocks, len(keys))
    down = ours.run(copies_of(name, DISK, batches, keys))
    up, again = (ours.run(copies_of(DISK, name, batches, keys)) for _ in range(2))
    ours.close()
    return down, up, again


def _raw_disk(
    at_hand: Memory, path: Path, keys: Sequence[bytes], step: int, *, threads: int
) -> tuple[float, float, float]:
    """LMDB alone: values of the same size, as many a transaction, copied out of the map without the lock."""
    values, target = at_hand.values, at_hand.target
    turns = np.random.default_rng(len(keys)).permutation(len(keys)) % len(values)
    pieces = [range(start, min(start + step, len(keys))) for start in range(0, len(keys), step)]
    env = lmdb.open(str(path), map_size=2 * values.shape[1] * len(keys) + 2**26, sync=True, metasync=False)

    def write(piece: range) -> None:
        with env.begin(write=True) as txn:
            for index in piece:
                txn.put(keys[index], values[turns[index]].data)

    def read(piece: range) -> None:
        with env.begin(buffers=True) as txn:
            for index in piece:
                found = txn.get(keys[index])
                assert found is not None
                np.copyto(target[turns[index]], np.frombuffer(found, np.uint8, target.shape[1]))

    down = _seconds(lambda: list(map(write, pieces)))
    with ThreadPoolExecutor(threads) as pool:
        up, again = (
            _seconds(lambda: list((pool.map if threads > 1 else map)(read, pieces))) for _ in range(2)
        )
    env.close()
    return down, up, again


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- what is printed --------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """Medians; the peer is the faster of those there are."""
    shown = Table(
        "model", "block", "route", "blocks a copy", "sluice MB/s", "peer MB/s", "peer", "ratio", "others",
        title=f"spill and fetch, medians of {ROUNDS}", caption=f"! misses {GOAL} of the peer",
    )  # fmt: skip
    for key in dict.fromkeys((row.model, row.block_bytes, row.route, row.batch) for row in rows):
        those = [row for row in rows if (row.model, row.block_bytes, row.route, row.batch) == key]
        speeds = {
            who: median(row.bytes / row.seconds / 1e6 for row in those if row.who == who)
            for who in dict.fromkeys(row.who for row in those)
        }
        ours = speeds.pop("sluice")
        peer = max(speeds, key=speeds.__getitem__)
        ratio, others = ours / speeds[peer], median(row.others_cores for row in those)
        figures = (
            f"{ours:,.0f}",
            f"{speeds[peer]:,.0f}",
            peer,
            f"{ratio:.2f}" + "!" * (ratio < GOAL),
            f"{others:.2f}",
        )
        shown.add_row(key[0], f"{key[1] // 1024} KiB", key[2], str(key[3]), *figures)
    return shown


PARTS: Final = ("memory", "disk", "lag", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transfers", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all, if none is given")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="folder for the rows")
    parser.add_argument("--path", type=Path, help="where stores are put (default: the temporary directory)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(unknown)}")
    memory.warm_up()
    found: list[Any] = []
    with TemporaryDirectory(dir=options.path) as directory:
        for part in options.parts or PARTS:
            rows, shown = _run(part, Path(directory))
            found += [{"part": part, **asdict(row)} for row in rows]
            console().print(shown)
    _write(options.out, found)


def _run(part: str, path: Path) -> tuple[Sequence[Any], Table | str]:
    if part == "lag":
        lags = transfers_lag.run(models(), path)
        return lags, transfers_lag.table(lags)
    if part == "gpu":
        copies = transfers_gpu.run() if torch.cuda.is_available() else []
        return copies, transfers_gpu.table(copies) if copies else "gpu: there is no CUDA device here"
    rows = [
        row
        for model in models()
        for row in (memory_rows(model) if part == "memory" else disk_rows(model, path))
    ]
    return rows, table(rows)


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / time.strftime("transfers-%Y%m%d-%H%M%S.jsonl")
    lines = [{"machine": machine.description()}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sys.stdout.write(f"rows: {path}\n")


if __name__ == "__main__":
    main()
