"""Decode and prefill side by side: Sluice, vLLM, transformers' `generate` and continuous batching, the limit.

Prints tables of medians and ratios; raw rows go to a file as they come. How to read them: docs/benchmarks.md.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench import machine, models, report
from bench.cells import Cell, Kind, matrix
from bench.limits import ITEM_BYTES, Meter
from bench.peers.wire import Setup
from bench.process import Program
from bench.session import Effort, ModelChanged, Session, row
from engine.model.errors import ModelError

MODULES = {
    "sluice": "bench.peers.sluice",
    "vllm": "bench.peers.vllm",
    "generate": "bench.peers.transformers_generate",
    "cb": "bench.peers.transformers_cb",
}
DEFAULT = Effort()
PREFILL_ROOM_TOKENS = 16384  # of KV cache, beside the decodes' contexts; more for larger prefills


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.decode_prefill", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["shipped", "random100m"], help="shipped, random100m or directories")
    add("--dtypes", nargs="+", default=list(ITEM_BYTES), choices=list(ITEM_BYTES))
    add("--streams", nargs="+", type=int, default=[1, 8, 32])
    add("--contexts", nargs="+", type=int, default=[128, 512, 2048])
    add("--kinds", nargs="+", type=Kind, default=list(Kind), choices=list(Kind))
    add("--peers", nargs="+", default=list(MODULES), choices=list(MODULES))
    add("--repeats", type=int, default=DEFAULT.repeats)
    add("--seconds", type=float, default=DEFAULT.seconds, help="of a decode repeat; tokens follow from speed")
    add(
        "--patience",
        type=float,
        default=DEFAULT.patience_seconds,
        help="seconds for a cell's prompts, per peer",
    )
    add(
        "--prefill-tokens",
        type=int,
        default=2048,
        help="of all prompts of a prefill; more streams are thinned",
    )
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--neighbours", type=int, default=0, help="busy processes beside whoever is measured")
    add("--vllm-python", default="", help="the Python of an environment with vllm; without it vLLM is absent")
    add("--transformers-python", default=sys.executable)
    add("--model-cache", type=Path, default=Path(".bench"), help="where random models are written")
    add("--out", type=Path, default=Path(".bench"), help="a directory for the rows")
    return parser.parse_args()


class Bench:
    def __init__(
        self, options: argparse.Namespace, write: Callable[[dict[str, Any]], None], progress: Progress
    ) -> None:
        self._options = options
        self._write = write
        self._progress = progress
        cells = matrix(options.streams, options.contexts, prefill_tokens=options.prefill_tokens)
        self._cells = [cell for cell in cells if cell.kind in options.kinds]
        total = (
            len(options.models)
            * len(options.dtypes)
            * len(self._cells)
            * (1 + options.repeats * len(options.peers))
        )
        self._bar = progress.add_task("", total=total)

    def run(self) -> None:
        found = [models.find(name, self._options.model_cache) for name in self._options.models]
        for model in found:  # all of them, before hours go into the first
            for dtype in self._options.dtypes:
                self._run_model(model, dtype)

    def _run_model(self, model: models.BenchModel, dtype: str) -> None:
        setup = self._setup(model, dtype)
        self._limits(model, setup)
        session = Session(setup, model.config.max_positions, self._effort(), os.getpid(), self._note)
        try:
            session.load(self._programs(session.absent))
            self._write(
                {"model": setup.model, "dtype": dtype, "setup": asdict(setup), "peers": session.facts}
            )
            with machine.neighbours(self._options.neighbours):
                for cell in self._cells:
                    self._measure(session, cell)
        finally:
            session.close()
        for peer, reason in session.absent.items():
            self._progress.console.print(
                f"{peer} is absent from {model.name}, {dtype}: {reason}", markup=False
            )

    def _measure(self, session: Session, cell: Cell) -> None:
        expected = self._options.repeats * len(self._options.peers)
        for figure in session.rows(cell):
            self._write(figure)
            self._progress.advance(self._bar)
            expected -= 1
        self._progress.advance(self._bar, expected)

    def _limits(self, model: models.BenchModel, setup: Setup) -> None:
        meter = Meter(model.config, setup.dtype, setup.threads)
        for cell in self._cells:
            self._note(f"limit of {cell.kind} {cell.streams} x {cell.context}")
            limit = meter.tokens_per_second(self._effort().within(cell, model.config.max_positions))
            self._write(row(setup, cell, report.LIMIT) | {"tokens_per_second": limit})
            self._progress.advance(self._bar)

    def _note(self, text: str) -> None:
        self._progress.update(self._bar, description=text.partition("\n")[0][:60])
        if not self._progress.console.is_terminal:
            print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    def _setup(self, model: models.BenchModel, dtype: str) -> Setup:
        longest, prefill = (
            max((cell.tokens for cell in self._cells if cell.kind is kind), default=0)
            for kind in (Kind.DECODE, Kind.PREFILL)
        )
        room = max(prefill, PREFILL_ROOM_TOKENS)
        return Setup(
            model=str(model.directory),
            dtype=dtype,
            vocabulary=model.config.vocab_size,
            kv_tokens=longest + max(self._options.streams) * DEFAULT.max_tokens + room,
            max_streams=max(self._options.streams),
            threads=self._options.threads,
        )

    def _effort(self) -> Effort:
        options = self._options
        return Effort(repeats=options.repeats, seconds=options.seconds, patience_seconds=options.patience)

    def _programs(self, absent: dict[str, str]) -> Sequence[Program]:
        """Those asked for; vLLM only with a Python that has it."""
        own = self._options.transformers_python
        pythons = {"sluice": sys.executable, "vllm": self._options.vllm_python, "generate": own, "cb": own}
        wanted = [name for name in self._options.peers if pythons[name]]
        absent |= {name: "no --vllm-python given" for name in self._options.peers if not pythons[name]}
        return [Program(name, pythons[name], MODULES[name]) for name in wanted]


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / time.strftime("decode_prefill-%Y%m%d-%H%M%S.jsonl")
    console = report.console()
    name = TextColumn("{task.description}", markup=False)  # a peer's last words are no markup
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        path.open("w", buffering=1) as file,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")

        write({"machine": machine.description(), "options": {k: str(v) for k, v in vars(options).items()}})
        failure = None
        try:
            Bench(options, write, progress).run()
        except (ModelChanged, ModelError) as error:
            failure = str(error)
    report.show(report.read([path]), console)
    console.print(f"rows: {path}")
    if failure:
        sys.exit(failure)


if __name__ == "__main__":
    main()
