"""Sluice against vLLM over HTTP while KV memory is short: same weights, KV bytes, trace and load generator.

    python -m bench.pressure_http --trace FILE --vllm-python PYTHON                 # demand, then three shares of it
    python -m bench.pressure_http --trace FILE --vllm-python PYTHON --demand BLOCKS --shares 0.4
    python -m bench.pressure_http --report

Sluice runs as configured by default, its host tier among it; vLLM has prefix caching on, and recomputes what it
preempts. Demand: the most blocks that Sluice holds at once when it has room. Prompts are the trace's, shrunk (a
recorded block becomes one of 16 tokens); answers keep their recorded length; both fit into the context. The load is
`sluice bench serve`'s (app/load/), its figures too.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from aiohttp import ClientError, ClientSession
from rich.table import Table

from app.load.conversation import Asking
from app.load.figures import Figures, figures
from app.load.running import CannotLoad, Target, connected, load
from app.simulate.figures import Objectives
from app.workload import formats, transform
from app.workload.drawing import Drawing
from app.workload.trace import TraceError, TraceRequest
from bench import machine, vllm_server
from bench.report import console
from bench.server import ROOT, ServerFailed, metrics, running, total

NAME = "bench"
SHIPPED = ROOT / "app" / "shipped" / "tales"
OUR_BLOCK, THEIR_BLOCK, PROMPT_BLOCK = 16, 32, 16  # tokens; vLLM's attention on a CPU wants a multiple of 32
SEQUENCES, STEP_TOKENS = 64, 2048
AMPLE_BLOCKS = 8192
WARM_REQUESTS = 4
SLUICE, VLLM = "sluice", "vllm"
SHOWN = {  # a column's head: a row's key, and whether vLLM ÷ Sluice says something
    "tax": ("tax", False),
    "recomputed": ("recomputed", True),
    "preempted": ("preemptions", True),
    "TTFT mean": ("ttft_mean", True),
    "TTFT P99": ("ttft_p99", True),
    "TPOT mean": ("tpot_mean", True),
    "E2E mean": ("e2e_mean", True),
    "E2E ÷ n mean": ("normalised_mean", True),
    "E2E ÷ n P99": ("normalised_p99", True),
    "goodput/s": ("goodput", True),
    "tokens/s": ("output_tokens_per_second", True),
    "answered": ("answered", False),
    "lag median": ("lag_median", False),
    "others' cores": ("others_cores", False),
}


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that is ready. `positions`: computed so far, and of these computed again."""

    url: str
    pid: int
    positions: Callable[[ClientSession], Awaitable[tuple[float, float]]]


def workload(path: Path, count: int, rate: float, context: int) -> list[TraceRequest]:
    """The first `count` requests, at Poisson arrivals. Raises TraceError."""
    recorded = formats.load(path, Drawing(0))[:count]
    shrunk = transform.scaled(recorded, PROMPT_BLOCK)
    kept = [replace(a, output_tokens=b.output_tokens) for a, b in zip(shrunk, recorded, strict=True)]
    return transform.retimed(transform.clipped(kept, context), rate)


@asynccontextmanager
async def sluice(options: argparse.Namespace, blocks: int) -> AsyncIterator[Serving]:
    """Raises ServerFailed."""
    settings = {
        "model.path": str(options.model),
        "model.name": NAME,
        "model.dtype": "bfloat16",
        "engine.block_size": OUR_BLOCK,
        "engine.kv_blocks": blocks,
        "engine.max_sequences": SEQUENCES,
        "engine.max_batch_tokens": STEP_TOKENS,
    }
    async with running(settings) as server:
        yield Serving(server.url, server.pid, _our_positions)


async def _our_positions(http: ClientSession) -> tuple[float, float]:
    text = await metrics(http)
    return total(text, "sluice:computed_tokens_total"), total(text, "sluice:recomputed_tokens_total")


@asynccontextmanager
async def vllm(options: argparse.Namespace, blocks: int) -> AsyncIterator[Serving]:
    """`blocks` of ours. Raises ServerFailed."""
    told = {
        "--model": options.model,
        "--served-model-name": NAME,
        "--dtype": "bfloat16",
        "--block-size": THEIR_BLOCK,
        "--num-gpu-blocks-override": blocks * OUR_BLOCK // THEIR_BLOCK,
        "--max-model-len": options.context,
        "--max-num-seqs": SEQUENCES,
        "--max-num-batched-tokens": STEP_TOKENS,
        "--enable-prefix-caching": "",
    }
    async with vllm_server.running(options.vllm_python, told) as server:

        async def positions(http: ClientSession) -> tuple[float, float]:
            return await asyncio.to_thread(server.positions)

        yield Serving(server.url, server.pid, positions)


SERVERS = {SLUICE: sluice, VLLM: vllm}


async def measure(
    server: Serving, trace: Sequence[TraceRequest], options: argparse.Namespace, *, peaks: bool
) -> dict[str, Any]:
    """Plays the trace; figures, and what the counters rose by. `peaks`: the blocks held at most, too (Sluice's alone).

    Nothing is asked of a server while it is loaded: that would cost this process time that it owes to the load.
    """
    target = Target(server.url, model=NAME, timeout_seconds=options.timeout)
    asking = Asking(NAME)
    async with connected(target) as http:
        await load(http, target, trace[:WARM_REQUESTS], asking, run=2)
        before, (computed, again) = await _preemptions(http), await server.positions(http)
        samples, _ = await load(http, target, trace, asking)
        after, (computed_after, again_after) = await _preemptions(http), await server.positions(http)
        peak = await _peak(http, server.url) if peaks else None
    rose = {
        "preemptions": after - before,
        "computed": computed_after - computed,
        "recomputed": again_after - again,
        "tax": (again_after - again) / max(1.0, computed_after - computed),
        "peak": peak,
    }
    return _row(figures(samples, Objectives(options.ttft, options.tpot))) | rose


def _row(found: Figures) -> dict[str, Any]:
    """Flat: a spread becomes its mean and its P99."""
    flat = found.row()
    spreads = flat.pop("spreads")
    return flat | {
        f"{name}_{share}": each[share] for name, each in spreads.items() for share in ("mean", "p99")
    }


async def _preemptions(http: ClientSession) -> float:
    return total(await metrics(http), "vllm:num_preemptions_total")


async def _peak(http: ClientSession, url: str) -> int:
    """Blocks that Sluice held at most. It counts at every step: who asks now and then misses a short peak."""
    async with http.get(f"{url}/admin/state") as response:
        response.raise_for_status()
        return int((await response.json())["kv_peak_blocks"])


async def run(options: argparse.Namespace) -> None:
    """Adds a row a server and share as they come; the demand first, unless it is given."""
    trace = await asyncio.to_thread(workload, options.trace, options.requests, options.rate, options.context)
    demand: int = options.demand or await _demand(options, trace)
    for share in options.shares:
        blocks = round(demand * share * OUR_BLOCK / THEIR_BLOCK) * THEIR_BLOCK // OUR_BLOCK
        if not blocks:  # to a server 0 means: as many as there is memory for
            raise SystemExit(
                f"{share:g} of a demand of {demand} blocks is none: more requests, or a higher rate"
            )
        for name in [SLUICE, *([VLLM] if options.vllm_python else [])]:
            await _cell(options, trace, name, {"share": share, "blocks": blocks, "demand": demand})


async def _demand(options: argparse.Namespace, trace: Sequence[TraceRequest]) -> int:
    row = await _cell(options, trace, SLUICE, {"share": None, "blocks": AMPLE_BLOCKS, "demand": None})
    return int(row["peak"])


async def _cell(
    options: argparse.Namespace, trace: Sequence[TraceRequest], name: str, about: dict[str, Any]
) -> dict[str, Any]:
    sys.stderr.write(f"{name}, {about['blocks']} blocks of {OUR_BLOCK} tokens …\n")
    async with SERVERS[name](options, about["blocks"]) as server:
        others = await asyncio.to_thread(_others, server.pid)
        found = await measure(server, trace, options, peaks=about["share"] is None)
        found["others_cores"] = await asyncio.to_thread(others.cores)
    row = about | {"rate": options.rate, "requests": len(trace), "server": name, **found}
    await asyncio.to_thread(_append, options.rows, row | {"machine": machine.description()})
    return row


def _others(server: int) -> machine.Others:
    return machine.Others(os.getpid(), *machine.family(server))


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def report(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a figure and cell; of several rows of one server and cell, medians."""
    table = Table("share", "blocks", "rate", "", SLUICE, VLLM, "÷", title="over HTTP, KV memory short")
    table.caption = (
        "÷: vLLM over Sluice. VOID: the load generator was late. others' cores: over 0.15, measure again"
    )
    for cell in dict.fromkeys(map(_cell_of, rows)):
        sides = [[row for row in rows if _cell_of(row) == cell and row["server"] == name] for name in SERVERS]
        share, blocks, rate, _ = cell
        heads = ("ample" if share is None else f"{share:g}", str(blocks), f"{rate:g}")
        for head, (name, told) in SHOWN.items():
            ours, theirs = (_median(side, name) for side in sides)
            ratio = f"{theirs / ours:.2f}" if told and ours and theirs is not None else ""
            table.add_row(*heads, head, _figure(name, ours), _figure(name, theirs), ratio)
        table.add_row(*heads, "runs", *map(_runs, sides), "")
        table.add_section()
    return table


def _cell_of(row: dict[str, Any]) -> tuple[float | None, int, float, int]:
    return row["share"], row["blocks"], row["rate"], row["requests"]


def _median(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return median(values) if values else None


def _runs(rows: Sequence[dict[str, Any]]) -> str:
    void = sum(row["void"] for row in rows)
    return f"{len(rows)}" + (f", {void} VOID" if void else "")


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name == "tax" else f"{value:.4g}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pressure_http", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--trace", type=Path, metavar="FILE")
    add(
        "--rows",
        type=Path,
        default=Path(".bench/pressure_http.jsonl"),
        metavar="FILE",
        help="rows are added to it",
    )
    add("--report", action="store_true", help="run nothing: what the rows say")
    add(
        "--vllm-python",
        default="",
        metavar="PYTHON",
        help="of an environment with vLLM; without it Sluice alone",
    )
    add("--model", type=Path, default=SHIPPED)
    add("--requests", type=int, default=120)
    add("--rate", type=float, default=4.0, help="requests per second")
    add("--context", type=int, default=1024, help="tokens that a prompt and its answer have room in")
    add("--demand", type=int, help="peak of our blocks, unpressured; without it, it is measured first")
    add("--shares", type=_shares, default=[0.6, 0.4, 0.25], metavar="S,S", help="of the demand")
    add("--ttft", type=float, default=5.0, help="objective of goodput, seconds")
    add("--tpot", type=float, default=0.2, help="objective of goodput, seconds")
    add("--timeout", type=float, default=300.0, help="seconds for any one request")
    options = parser.parse_args()
    if not options.report and options.trace is None:
        parser.error("--trace is needed")
    return options


def _shares(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


async def _interruptible(options: argparse.Namespace) -> None:
    """SIGTERM ends the servers too: `timeout` must not leave one behind."""
    task = asyncio.ensure_future(run(options))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def main() -> None:
    options = arguments()
    if not options.report:
        try:
            asyncio.run(_interruptible(options))
        except (CannotLoad, ClientError, ServerFailed, TraceError, OSError) as error:
            sys.exit(f"cannot be measured: {error}")
        except asyncio.CancelledError:
            sys.exit("ended from outside; the cells that were measured are in the rows")
    console().print(report([json.loads(line) for line in options.rows.read_text().splitlines()]))


if __name__ == "__main__":
    main()
