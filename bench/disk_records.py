"""The disk tier by itself: `python -m bench.disk_records [PART …] [--path DIR]`.

checksums: candidates, GB/s, and how much of its speed another thread keeps meanwhile. bandwidth: the tier against LMDB
with values of the same size, written durably, read cold and warm. transactions: the best number of blocks a write.
index: the audit, the index, and memory at a million records. churn: fifty times the quota at 95 % fill.
"""

import argparse
import hashlib
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from mmap import PAGESIZE
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import lmdb
import numpy as np
import xxhash
from rich.table import Table

from bench.report import console
from kvstore.copies import Place
from kvstore.disk import LIMITS, DiskTier
from kvstore.disk_files import audit
from kvstore.disk_sizes import TransactionLimits
from kvstore.format import About, value_bytes
from kvstore.tier import Buffer

SIZES: Final = (4096, 2**16, 2**20, 2**22)
ROUNDS: Final = 5


def main() -> None:
    parts = {
        "checksums": checksums,
        "bandwidth": bandwidth,
        "transactions": transactions,
        "index": index,
        "churn": churn,
    }
    parser = argparse.ArgumentParser(
        prog="python -m bench.disk_records", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all, if none is given")
    parser.add_argument(
        "--path", type=Path, help="where to put the stores (default: the system's temporary directory)"
    )
    given = parser.parse_args()
    if unknown := set(given.parts) - parts.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    for name in given.parts or parts:
        with TemporaryDirectory(dir=given.path) as directory:
            console().print(parts[name](Path(directory)))


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def blocks(count: int, size: int) -> tuple[list[Place], list[Buffer]]:
    random = np.random.default_rng(size)
    keys = [random.bytes(32) for _ in range(count)]
    return [Place(key, tokens=16) for key in keys], [
        np.frombuffer(random.bytes(size), np.uint8) for _ in keys
    ]


# --- checksums --------------------------------------------------------------------------------------------------------


def checksums(_: Path) -> Table:
    """GB/s, and the speed that a thread of Python keeps while another computes checksums."""
    candidates: dict[str, Callable[[bytes], object]] = {
        "crc32 (zlib)": zlib.crc32,
        "xxh3_64": xxhash.xxh3_64_intdigest,
        "xxh3_128": xxhash.xxh3_128_intdigest,
        "blake2b": lambda data: hashlib.blake2b(data).digest(),
        "sha256": lambda data: hashlib.sha256(data).digest(),
    }
    if find_spec("google_crc32c"):  # a candidate only: nothing else needs it
        candidates["crc32c (google)"] = import_module("google_crc32c").value
    table = Table("checksum", *(f"{size // 1024} KiB" for size in SIZES), title="GB/s (other thread keeps)")
    for name, function in candidates.items():
        table.add_row(name, *(_checksum(function, size) for size in SIZES))
    return table


def _checksum(function: Callable[[bytes], object], size: int) -> str:
    data = blocks(1, size)[1][0].tobytes()
    repeats = max(1, 2**25 // size)
    speed = size * repeats / seconds(lambda: [function(data) for _ in range(repeats)]) / 1e9
    return f"{speed:.1f} ({_kept(lambda: function(data)):.0%})"


def _kept(work: Callable[[], object]) -> float:
    """Share of its speed that counting keeps while `work` runs again and again in another thread. Half: GIL held."""
    alone, stop = _counted(), threading.Event()

    def again() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=again)
    thread.start()
    together = _counted()
    stop.set()
    thread.join()
    return together / alone


def _counted() -> int:
    end, count = time.perf_counter() + 0.2, 0
    while time.perf_counter() < end:
        count += 1
    return count


# --- bandwidth --------------------------------------------------------------------------------------------------------


def bandwidth(path: Path) -> Table:
    """Medians of interleaved rounds, MB/s: LMDB with values of the same size, and the tier."""
    table = Table(
        "block", "what", "LMDB", "tier", "ratio", title=f"MB/s, medians of {ROUNDS}; as many blocks a write"
    )
    for size in (2**15, 2**18, 2**20, 2**22):
        for what, raw, ours in _bandwidths(path / str(size), size):
            table.add_row(f"{size // 1024} KiB", what, f"{raw:,.0f}", f"{ours:,.0f}", f"{ours / raw:.2f}")
    return table


def _bandwidths(path: Path, size: int) -> list[tuple[str, float, float]]:
    count = max(16, min(2000, 2**28 // size))
    places, data = blocks(count, size)
    found: dict[str, tuple[list[float], list[float]]] = {
        w: ([], []) for w in ("write", "read cold", "read warm")
    }
    for round_ in range(ROUNDS):
        ways = [_raw, _tier] if round_ % 2 else [_tier, _raw]
        for way in ways:
            for what, taken in way(path, places, data).items():
                found[what][way is _tier].append(size * count / taken / 1e6)
            shutil.rmtree(path)
    return [(what, median(raw), median(ours)) for what, (raw, ours) in found.items()]


def _open(path: Path, size: int, count: int, limits: TransactionLimits) -> DiskTier:
    quota = (count + 64) * (value_bytes(size, PAGESIZE) + 400) * 5 // 4 + 2**24
    return DiskTier.open(path, quota_bytes=quota, block_bytes=size, fingerprint="bench", limits=limits)


def _tier(
    path: Path, places: Sequence[Place], data: Sequence[Buffer], limits: TransactionLimits = LIMITS
) -> dict[str, float]:
    size, target = data[0].nbytes, np.zeros(data[0].nbytes, np.uint8)
    tier = _open(path, size, len(places), limits)
    step = tier.transaction_blocks
    pieces = [slice(start, start + step) for start in range(0, len(places), step)]
    taken = {"write": seconds(lambda: [tier.write(places[piece], data[piece]) for piece in pieces])}
    for what in ("read cold", "read warm"):
        if what == "read cold":
            _forget(path / "data.mdb")
        taken[what] = seconds(lambda: [tier.read([place], [target]) for place in places])
    tier.close()
    return taken


def _raw(path: Path, places: Sequence[Place], data: Sequence[Buffer]) -> dict[str, float]:
    """LMDB alone, used well: as many values a transaction, and copied out of the map without the GIL."""
    size, target = value_bytes(data[0].nbytes, PAGESIZE), np.zeros(data[0].nbytes, np.uint8)
    values = [np.pad(block, (0, size - block.nbytes)) for block in data]
    step = LIMITS.of(data[0].nbytes)
    env = lmdb.open(str(path), map_size=2 * size * len(values) + 2**26, metasync=False)

    def write(start: int) -> None:
        with env.begin(write=True) as txn:
            for place, value in zip(places[start : start + step], values[start : start + step], strict=True):
                txn.put(place.key, value.data)

    def read(key: bytes) -> None:
        with env.begin(buffers=True) as txn:
            value = txn.get(key)
            assert value is not None
            np.copyto(target, np.frombuffer(value, np.uint8, target.nbytes))

    def read_all() -> None:
        for place in places:
            read(place.key)

    taken = {"write": seconds(lambda: list(map(write, range(0, len(values), step))))}
    _forget(path / "data.mdb")
    taken["read cold"], taken["read warm"] = seconds(read_all), seconds(read_all)
    env.close()
    return taken


def _forget(file: Path) -> None:
    """Drops a file from the page cache, as far as it is not mapped by a process."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def transactions(path: Path) -> Table:
    """Durable writes by the number of blocks in a transaction, MB/s."""
    counts = (1, 2, 4, 8, 16, 32, 64, 128)
    table = Table("block", *map(str, counts), title="written MB/s, by blocks a transaction")
    for size in (2**15, 2**18, 2**20, 2**22):
        places, data = blocks(min(1024, 2**28 // size), size)
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(3):
            for count in counts:
                taken = _tier(path / "s", places, data, TransactionLimits(count, 2**40))
                speeds[count].append(size * len(places) / taken["write"] / 1e6)
                shutil.rmtree(path / "s")
        table.add_row(f"{size // 1024} KiB", *(f"{median(speed):,.0f}" for speed in speeds.values()))
    return table


# --- index and churn --------------------------------------------------------------------------------------------------


def index(path: Path, records: int = 1_000_000, size: int = 1024) -> Table:
    """A start with a million records, in chains of sixteen."""
    many = TransactionLimits(1000, 2**40)  # to fill it quickly
    tier = DiskTier.open(path, quota_bytes=6 * 2**30, block_bytes=size, fingerprint="bench", limits=many)
    _fill(tier, records, size)
    tier.close()
    data, about = path / "data.mdb", About.of(size, "bench")
    table = Table("what", "value", title=f"{records:,} records, {data.stat().st_size / 1e9:.1f} GB")
    _forget(data)
    for what in ("cold", "warm"):
        table.add_row(f"audit, {what}", f"{seconds(lambda: audit(data, about)):.2f} s")
    begin = time.perf_counter()
    tier = DiskTier.open(path, quota_bytes=6 * 2**30, block_bytes=size, fingerprint="bench")
    table.add_row("open, with the audit", f"{time.perf_counter() - begin:.2f} s")
    memory, begin = _anonymous_bytes(), time.perf_counter()
    places = tier.records()
    table.add_row("records()", f"{time.perf_counter() - begin:.2f} s")
    table.add_row("memory of the places", f"{(_anonymous_bytes() - memory) / 2**20:,.0f} MiB")
    assert len(places) == records, "all of them came back"
    tier.close()
    return table


def _fill(tier: DiskTier, records: int, size: int) -> None:
    data = np.zeros(size, np.uint8)
    keys = [hashlib.sha256(b"%d" % number).digest() for number in range(records)]
    for start in range(0, records, tier.transaction_blocks):
        places = [
            Place(keys[n], parent=keys[n - 1] if n % 16 else b"", depth=n % 16, tokens=16)
            for n in range(start, min(start + tier.transaction_blocks, records))
        ]
        assert not any(tier.write(places, [data] * len(places))), "there is room"


def _anonymous_bytes() -> int:
    """Of this process, pages of files left out."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def churn(path: Path, quota: int = 2**28, size: int = 2**16, turns: int = 50) -> Table:
    """Random records come and go at 95 % of the capacity, until `turns` times the quota is written."""
    tier = DiskTier.open(path, quota_bytes=quota, block_bytes=size, fingerprint="bench")
    random, data, step = Random(1), blocks(1, size)[1] * tier.transaction_blocks, tier.transaction_blocks
    live = [random.randbytes(32) for _ in range(int(0.95 * tier.capacity_blocks))]
    for start in range(0, len(live), step):
        piece = live[start : start + step]
        assert not any(tier.write([Place(key) for key in piece], data[: len(piece)])), "there is room"
    share = tier.capacity_blocks * size / quota
    table = Table(
        "written", "MB/s", "file, of the quota", "losses", title=f"churn; capacity {share:.1%} of the quota"
    )
    for turn in range(0, turns, 5):
        begin, losses = time.perf_counter(), 0
        writes = 5 * quota // (step * size)
        for _ in range(writes):
            new, where = [random.randbytes(32) for _ in range(step)], random.sample(range(len(live)), step)
            losses += sum(map(bool, tier.write([Place(key) for key in new], data, [live[n] for n in where])))
            for n, key in zip(where, new, strict=True):
                live[n] = key
        speed = writes * step * size / (time.perf_counter() - begin) / 1e6
        full = sum(file.stat().st_size for file in path.iterdir()) / quota
        table.add_row(f"{turn + 5} quotas", f"{speed:,.0f}", f"{full:.1%}", str(losses))
    assert {place.key for place in tier.records()} == set(live), "what should be there is"
    tier.close()
    return table


if __name__ == "__main__":
    main()
