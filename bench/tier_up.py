"""A disk that comes up with many records, on the event loop: `python -m bench.tier_up [--records 1000000]`.

The engine feeds the core its records in parts (`RECORDS_AT_ONCE`), one a turn of the loop. Shown: how long the core was
at one part, and how late a timer was that wanted to run every millisecond meanwhile; and how long all takes in one
event, as a core does it that is asked so. No model runs, and there is no disk.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from statistics import median

from rich.table import Table

from bench.report import console
from engine.core import CoreConfig
from engine.engine import Engine
from engine.events import Event
from engine.fleet import Fleet, FleetConfig, Told
from engine.plan import Plan
from engine.scheduler import SchedulerConfig
from engine.tiers_below import RECORDS_AT_ONCE
from engine.worker import Report
from kvstore.below import ResidencyConfig
from kvstore.copies import DISK, Copy, CopyDone, Drop, Place, TierDown, TierUp
from kvstore.tier import Tier

CHAIN = 250  # records: 4,000 tokens
TICK_SECONDS = 0.001


def records_of(count: int) -> tuple[Place, ...]:
    keys = [sha256(b"%d" % number).digest() for number in range(count)]
    return tuple(
        Place(key, -1, keys[number - 1] if number % CHAIN else b"", number % CHAIN, 16)
        for number, key in enumerate(keys)
    )


def new_fleet(records: int) -> Fleet:
    residency = ResidencyConfig(host_blocks=16, disk_blocks=records)
    scheduler = SchedulerConfig(16, 16, max_batch_tokens=64, max_sequences=4, residency=residency)
    return Fleet(FleetConfig.of(CoreConfig(scheduler, model_context=256, max_queue=4)), ())


class NoWorker:
    """Nothing is asked of it."""

    def start(self, report: Report) -> None:
        pass

    def submit(self, plan: Plan) -> None:
        raise AssertionError("no request is made")

    def stop(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class Telling:
    """A store that says what it is told to, and how long each of the core's events took."""

    report: Callable[[CopyDone | TierDown | TierUp], None]

    def start(self, report: Callable[[CopyDone | TierDown | TierUp], None]) -> None:
        self.report = report

    def submit(self, copy: Copy) -> None:
        raise AssertionError("nothing is computed")

    def drop(self, drop: Drop) -> None:
        raise AssertionError("all records fit")

    def put_device(self, replica: int, tier: Tier) -> None:
        raise AssertionError("no replica is started again")

    def block_bytes(self, tier: str) -> int:
        return 1


class Ends:
    """When each event had been handled."""

    def __init__(self) -> None:
        self.moments: list[tuple[float, float]] = []

    def record(self, now: float, event: Event, told: list[Told]) -> None:
        self.moments.append((now, time.monotonic()))


async def in_parts(records: tuple[Place, ...]) -> tuple[list[float], list[float], float]:
    """Seconds of each part, seconds by which each tick was late, and seconds until the tier was up."""
    fleet, store, ends, up = new_fleet(len(records)), Telling(), Ends(), asyncio.Event()
    engine = Engine(fleet, [NoWorker()], exact=True, store=store, recorder=ends)
    engine.on_tier.append(lambda *_: up.set())
    began = time.monotonic()
    store.report(TierUp(DISK, records))
    ticks = [began]
    while not up.is_set():
        await asyncio.sleep(TICK_SECONDS)
        ticks.append(time.monotonic())
    assert len(fleet.common.below.shelves.disk) == len(records)
    late = [after - before - TICK_SECONDS for before, after in pairwise(ticks)]
    return [end - start for start, end in ends.moments], late, ticks[-1] - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tier_up", description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    options = parser.parse_args()
    records = records_of(options.records)
    parts, late, seconds = asyncio.run(in_parts(records))
    fleet, began = new_fleet(options.records), time.monotonic()
    fleet.handle(TierUp(DISK, records), 0.0)
    whole = time.monotonic() - began
    shown = Table("", "ms", title=f"{options.records:,} records come up")
    shown.add_row("one event: all at once", f"{whole * 1e3:,.0f}")
    shown.add_row(f"one event of {RECORDS_AT_ONCE:,}, median", f"{median(parts) * 1e3:.1f}")
    shown.add_row("… and the longest", f"{max(parts) * 1e3:.1f}")
    shown.add_row("a tick was late by, median", f"{median(late) * 1e3:.1f}")
    shown.add_row("… and at most", f"{max(late) * 1e3:.1f}")
    shown.add_row("until the tier was up", f"{seconds * 1e3:,.0f}")
    console().print(shown)


if __name__ == "__main__":
    main()
