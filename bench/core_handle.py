"""How long the core takes for an event: `core.handle` with 256 running and 10,000 waiting, by order policy.

    python -m bench.core_handle [--orders fcfs mlq …] [--running 256] [--waiting 10000] [--steps 300] [--rows FILE]

The core alone, in virtual time: steps draw one token that means nothing, copies end before the next step. Answers have
lengths of their own, so that some end in every few steps and waiters take their places; one request arrives after each
step. `short`: half the blocks that those who run come to hold, nothing foreseen, a host tier: blocks are often missing.
The goal is a median of 1 ms (design §9). Garbage is collected as in a server (app/collector.py), p99 has that in it.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from app import collector
from bench import machine
from bench.report import console
from engine.core import Core, CoreConfig
from engine.events import Arrived, Event, Run, StepDone
from engine.fleet import Fleet, FleetConfig
from engine.plan import Plan, Sampling, StepResult
from engine.policy_set import PolicyConfig
from engine.request import Request, ServiceClass, Stopping
from engine.scheduler import SchedulerConfig
from kvstore.below import ResidencyConfig
from kvstore.copies import Copy, CopyDone
from policies.order import ORDERS

GOAL_SECONDS = 1e-3
BLOCK_SIZE, MOST_TOKENS = 16, 400
UNFORESEEN = {"admission": {"risk": 1.0, "wait_steps": 0}}
CLASSES = (ServiceClass("interactive", 0, 4.0), ServiceClass("batch", 1, 1.0))
VOCABULARY = tuple(bytes([97 + number % 26]) for number in range(1000))
WARM_STEPS = 50


class Driven:
    """A core with `running` places and `waiting` more requests; `short` of blocks, or with enough for all.

    `fleet`: events go through a fleet of this one replica, as in a server.
    """

    def __init__(self, order: str, running: int, waiting: int, *, short: bool, fleet: bool = False) -> None:
        policies = PolicyConfig(
            order=order,
            victim="cheapest_resume",
            resume="cheapest",
            prediction="histogram",
            parameters=UNFORESEEN if short else {},
        )
        blocks = running * (MOST_TOKENS + 80) // BLOCK_SIZE
        scheduler = SchedulerConfig(
            BLOCK_SIZE,
            running * 8 if short else blocks,
            max_batch_tokens=4096,
            max_sequences=running,
            policies=policies,
            block_bytes=2**16,
            residency=ResidencyConfig(host_blocks=4 * blocks if short else 0),
        )
        config = CoreConfig(scheduler, 4096, max_queue=10 * (running + waiting))
        self.fleet = Fleet(FleetConfig.of(config), VOCABULARY) if fleet else None
        self.core = self.fleet.cores[0] if self.fleet else Core(config, VOCABULARY)
        self.now = 0.0
        self.seconds: dict[str, list[float]] = {"StepDone": [], "Arrived": []}
        self._random = Random(1)
        self._plan: Plan | None = None
        self._copies: list[Copy] = []
        self._requests = self._made()
        for _ in range(running + waiting):
            self._feed(Arrived(next(self._requests)))

    def _made(self) -> Iterator[Request]:
        number = 0
        while True:
            number += 1
            draw = self._random.randrange
            prompt = tuple(draw(1000) for _ in range(draw(30, 80)))
            stopping = Stopping(draw(100, MOST_TOKENS), ignore_eos=True)
            yield Request(
                f"r{number}",
                prompt,
                Sampling(),
                stopping,
                priority=draw(3),
                tenant=f"t{draw(8)}",
                service=CLASSES[draw(2)],
            )

    def turn(self) -> None:
        """A step's end and an arrival; copies end before, untimed."""
        while self._copies:
            self._feed(CopyDone(self._copies.pop(0).id, seconds=1e-4))
        assert self._plan is not None
        tokens = (5,) * sum(row.samples for row in self._plan.rows)
        result = StepResult(self._plan.step, tokens, (None,) * len(tokens), 0.01, 0.001)
        self.now += 0.01
        self.seconds["StepDone"].append(self._feed(StepDone(result)))
        self.seconds["Arrived"].append(self._feed(Arrived(next(self._requests))))

    def _feed(self, event: Event) -> float:
        before = time.perf_counter()
        if self.fleet:
            told = self.fleet.handle(event, self.now)
            instructions = [instruction for each in told for instruction in each.instructions]
        else:
            instructions = self.core.handle(event, self.now)
        seconds = time.perf_counter() - before
        for instruction in instructions:
            if isinstance(instruction, Run):
                self._plan = instruction.plan
            elif isinstance(instruction, Copy):
                self._copies.append(instruction)
        return seconds


def measured(
    order: str, running: int, waiting: int, steps: int, *, short: bool, fleet: bool = False
) -> list[dict[str, Any]]:
    """One row an event."""
    driven = Driven(order, running, waiting, short=short, fleet=fleet)
    ran = []
    for _ in range(WARM_STEPS + steps):
        driven.turn()
        ran.append(len(driven.core.scheduler.running))
    scheduler = driven.core.scheduler
    return [
        {
            "order": order,
            "short": short,
            "fleet": fleet,
            "event": event,
            "median_seconds": median(seconds[WARM_STEPS:]),
            "p99_seconds": quantiles(seconds[WARM_STEPS:], n=100)[-1],
            "running": median(ran[WARM_STEPS:]),
            "waiting": scheduler.waiting,
            "preemptions": scheduler.counts.preemptions,
        }
        for event, seconds in driven.seconds.items()
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("order", "blocks", "event", title="core.handle", caption="! misses the goal of 1 ms")
    for name in ("median ms", "p99 ms", "running", "waiting", "preemptions"):
        made.add_column(name, justify="right")
    for row in rows:
        missed = "!" if row["median_seconds"] > GOAL_SECONDS else ""
        made.add_row(
            row["order"],
            "short" if row["short"] else "enough",
            row["event"],
            f"{row['median_seconds'] * 1e3:.2f}{missed}",
            f"{row['p99_seconds'] * 1e3:.2f}",
            f"{row['running']:.0f}",
            str(row["waiting"]),
            str(row["preemptions"]),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.core_handle", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS))
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--fleet", action="store_true", help="through a fleet of one replica")
    parser.add_argument("--rows", type=Path, default=Path("core_handle.jsonl"))
    options = parser.parse_args()
    collector.spare()
    rows = [
        row
        for order in options.orders
        for short in (False, True)
        for row in measured(
            order, options.running, options.waiting, options.steps, short=short, fleet=options.fleet
        )
    ]
    console().print(table(rows))
    lines = [{"machine": machine.description()}, *rows]
    options.rows.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
