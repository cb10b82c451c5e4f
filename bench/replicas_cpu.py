"""Decode of several replicas in one process on a CPU: tokens/s of all together, by number of replicas and streams.

    python -m bench.replicas_cpu [--replicas 1 2 3] [--streams 8 32] [--context 128] [--repeats 5] [--rows FILE]

Runners alone, given plans: no scheduler, no HTTP. Each has a thread, and cores ÷ replicas threads to compute with, as
in a server; they share the weights. Streams are a replica's. All decode from the same context on, greedily, until the
first replica has its steps; a rate is over the time that a replica decoded. `main`: one replica on the main thread.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Barrier, Event
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from bench import machine, models
from bench.figures import ratio
from bench.report import DISTURBED_CORES, console
from engine.model.loading import Loaded, load_model
from engine.plan import PENDING, Placement, Plan, Row, Sampling
from engine.runner import ModelRunner
from engine.sampler import Sampler

BLOCK_SIZE = 16
STEPS = 128
WARM_STEPS = 3
WAIT_SECONDS = 60.0  # for the others to be ready
CPU = torch.device("cpu")

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Cell:
    replicas: int
    streams: int  # a replica's
    main: bool = False  # on the main thread: of one replica alone

    @property
    def name(self) -> str:
        return "1, main" if self.main else str(self.replicas)


class Streams:
    """A runner whose slots all hold a prompt, to decode from there."""

    def __init__(self, loaded: Loaded, streams: int, context: int, steps: int) -> None:
        """Prompts are computed here."""
        held = -(-(context + steps + 1) // BLOCK_SIZE)  # blocks of a stream
        sampler = Sampler(streams, loaded.config.vocab_size, CPU)
        self.runner = ModelRunner(
            loaded.model, sampler, kv_blocks=streams * held, block_size=BLOCK_SIZE, max_sequences=streams
        )
        self._streams, self._context = streams, context
        for slot in range(streams):
            tokens = tuple(
                (slot * 31 + position * 7) % loaded.config.vocab_size for position in range(context)
            )
            blocks = tuple(range(slot * held, (slot + 1) * held))
            row = Row(slot, 0, tokens, 0, blocks, samples=True)
            self.runner.launch(Plan(0, (Placement(slot, Sampling(temperature=0.0)),), (row,)))

    def decode(self, steps: int) -> Iterator[int]:
        """The tokens of each step."""
        for step in range(steps):
            rows = tuple(
                Row(slot, self._context + step, (PENDING,), 0, (), samples=True)
                for slot in range(self._streams)
            )
            yield len(self.runner.launch(Plan(step, (), rows)).collect().tokens)


def rate(decoding: Streams, steps: int, begin: Barrier, ended: Event) -> float:
    """Tokens/s of a replica on this thread, beside the others'."""
    for _ in decoding.decode(WARM_STEPS):  # this thread's team comes together
        pass
    begin.wait(WAIT_SECONDS)
    tokens, began = 0, perf_counter()
    for drawn in decoding.decode(steps):
        tokens += drawn
        if ended.is_set():
            break
    ended.set()
    return tokens / (perf_counter() - began)


def measured(decoding: Sequence[Streams], cell: Cell, cores: int, steps: int) -> list[float]:
    """Each replica's tokens/s, all at once."""
    begin, ended = Barrier(cell.replicas), Event()
    torch.set_num_threads(max(1, cores // cell.replicas))  # before the threads that compute with them begin
    if cell.main:
        return [rate(decoding[0], steps, begin, ended)]
    with ThreadPoolExecutor(cell.replicas, "runner") as threads:
        running = [threads.submit(rate, each, steps, begin, ended) for each in decoding[: cell.replicas]]
        return [each.result() for each in running]


def run(
    loaded: Loaded, cells: Sequence[Cell], *, context: int, steps: int, repeats: int, cores: int
) -> Iterator[dict[str, Any]]:
    """A row a cell and repeat; numbers of replicas take turns, so that none always follows the same one."""
    for streams in dict.fromkeys(cell.streams for cell in cells):
        mine = [cell for cell in cells if cell.streams == streams]
        most = max(cell.replicas for cell in mine)
        decoding = [Streams(loaded, streams, context, steps) for _ in range(most)]
        for repeat in range(repeats):
            for cell in mine[::-1] if repeat % 2 else mine:
                others = machine.Others(os.getpid())
                rates = measured(decoding, cell, cores, steps)
                yield asdict(cell) | {
                    "repeat": repeat,
                    "context": context,
                    "threads": max(1, cores // cell.replicas),
                    "tokens_per_second": sum(rates),
                    "each": rates,
                    "others_cores": others.cores(),
                }


def table(rows: Rows) -> Table:
    """Medians, and the ratio to one replica on a thread of its own."""
    by_cell: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_cell[Cell(row["replicas"], row["streams"], row["main"])].append(row)
    made = Table("streams", "replicas", "threads", title="decode on a CPU: median tokens/s of all replicas")
    for name in ("tokens/s", "÷ one", "slowest ÷ fastest", "others"):
        made.add_column(name, justify="right")
    for cell, mine in sorted(by_cell.items(), key=lambda item: (item[0].streams, item[0].replicas)):
        rates = [row["tokens_per_second"] for row in mine]
        one = [row["tokens_per_second"] for row in by_cell.get(Cell(1, cell.streams), ())]
        against = ratio(rates, one)
        others = max(row["others_cores"] for row in mine)
        made.add_row(
            str(cell.streams),
            cell.name,
            str(mine[0]["threads"]),
            f"{median(rates):,.0f}",
            "-" if against is None else f"{against:.2f}",
            f"{median(min(row['each']) / max(row['each']) for row in mine):.2f}",
            f"{others:.2f}{'!' if others > DISTURBED_CORES else ''}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replicas_cpu", description=__doc__)
    add = parser.add_argument
    add("--model", default="shipped", help="shipped, random100m or a directory")
    add("--dtype", default="auto")
    add("--replicas", nargs="+", type=int, default=[1, 2, 3])
    add("--streams", nargs="+", type=int, default=[8, 32])
    add("--context", type=int, default=128)
    add("--steps", type=int, default=STEPS)
    add("--repeats", type=int, default=5)
    add("--cores", type=int, default=len(os.sched_getaffinity(0)))
    add("--model-cache", type=Path, default=Path(".bench"), help="where random models are written")
    add("--rows", type=Path, default=Path("replicas_cpu.jsonl"))
    options = parser.parse_args()
    model = models.find(options.model, options.model_cache)
    loaded = load_model(model.directory, device=CPU, dtype=options.dtype)
    cells = [
        cell
        for streams in options.streams
        for cell in (Cell(1, streams, main=True), *(Cell(count, streams) for count in options.replicas))
    ]
    rows = []
    with options.rows.open("w", buffering=1) as file:
        head = {"model": model.name, "dtype": str(loaded.dtype), "machine": machine.description()}
        file.write(json.dumps(head) + "\n")
        for row in run(
            loaded,
            cells,
            context=options.context,
            steps=options.steps,
            repeats=options.repeats,
            cores=options.cores,
        ):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
    console().print(table(rows))


if __name__ == "__main__":
    main()
