"""Policies compared in virtual time: the systems of bench/systems.py on recorded workloads, short of KV blocks.

    python -m bench.policies_simulated --trace FILE --profile epyc2-tales --rows FILE     # again to add cells
    python -m bench.policies_simulated --rows FILE --report [--chart FILE]
    python -m bench.policies_simulated --trace FILE --profile P --shares 0.4 --loads 0.85 --worst 3

A cell is a trace, a load and a share of the demand; each is played with several seeds, and a seed chooses which
sessions of the trace are there and when they come (Poisson). Per seed: all at once without pressure, for the capacity;
then at `load` × capacity, for the demand (the peak of blocks held); then every system with `share` × demand, behind
`--link` where one is given: a slow tier. Answers have the recorded lengths; nobody knows them, and clients ask for
`--cap` tokens.

Latency is normalised: seconds from arrival to end, over the tokens of the answer. Live: bench/policies.py.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from app.config_sources import load as load_config
from app.plugins import load_plugins
from app.profiling.operator_tables import read_tables
from app.simulate.command import PROFILES
from app.simulate.figures import Objectives, figures, latencies
from app.simulate.playing import TraceWorkload
from app.simulate.scenario import core_config
from app.workload import formats, transform
from app.workload.drawing import Drawing
from app.workload.trace import TraceRequest
from bench.policies_simulated_report import draw, report
from bench.report import console
from bench.systems import SYSTEMS, named
from engine.events import Decided, Event
from engine.fleet import FleetConfig, Told
from engine.policy_set import Catalog
from engine.profile import Profile, Route, Transfer, read_profile
from engine.simulation import Outcome, Recorder, Simulation

UNPRESSURED_BLOCKS = 2**17
LINK: tuple[Route, Route] = ("device>host", "host>device")
ASSUMED_COPIES = Transfer(2e-5, 2e10)
"""Between device and host, where operator tables measured none: PCIe 4.0 x16, 20 GB/s after 20 us."""


@dataclass(frozen=True, slots=True)
class Workload:
    """How a trace becomes requests of the profile's model. `block`: tokens of what was a recorded block of 512."""

    trace: Path
    requests: int
    block: int
    answers_over: int  # recorded lengths of answers are divided by this
    cap: int  # tokens that clients ask for
    context: int

    def chosen(self, seed: int, recorded: Sequence[TraceRequest]) -> list[TraceRequest]:
        """Without arrivals: all at once. Prompts of traces that share nothing shrink as answers do."""
        share = min(1.0, 4 * self.requests / len(recorded))
        those = transform.first(transform.thin(recorded, share, seed), self.requests)
        outputs = {each.number: max(2, each.output_tokens // self.answers_over) for each in those}
        block = self.block if any(each.blocks for each in those) else 512 // self.answers_over
        small = transform.scaled(those, block)
        whole = [replace(each, output_tokens=min(self.cap, outputs[each.number])) for each in small]
        return [replace(each, arrival=0.0) for each in transform.clipped(whole, self.context - self.cap)]


@dataclass(frozen=True, slots=True)
class Cell:
    workload: Workload
    profile: str
    load: float
    shares: tuple[float, ...]
    seed: int
    systems: Mapping[str, Mapping[str, str]]
    max_sequences: int
    objectives: Objectives
    settings: tuple[str, ...] = ()  # of the configuration, for all systems
    link: Transfer | None = None  # between device and host, instead of the profile's


def profile_of(name: str) -> Profile:
    """A shipped one, a file, or a directory of operator tables. Raises ProfileError, TraceError."""
    if (shipped := PROFILES / f"{name}.json").is_file():
        return read_profile(shipped)
    if not Path(name).is_dir():
        return read_profile(Path(name))
    return replace(read_tables(Path(name)), transfers=dict.fromkeys(LINK, ASSUMED_COPIES))


def machine(cell: Cell) -> str:
    """For people: the profile, and the link where it is another one."""
    name = Path(cell.profile).name
    if cell.link is None:
        return name
    return f"{name}, {cell.link.latency_seconds * 1e3:g} ms + {cell.link.bytes_per_second / 1e6:g} MB/s"


def play(
    cell: Cell,
    trace: Sequence[TraceRequest],
    policies: Mapping[str, str],
    blocks: int,
    recorder: Recorder | None = None,
    tenants: Mapping[int, str] | None = None,
) -> tuple[Outcome, int]:
    """One run, and the most blocks held in it."""
    profile = profile_of(cell.profile)
    if cell.link:
        profile = replace(profile, transfers={**profile.transfers, **dict.fromkeys(LINK, cell.link)})
    flags = [f"policies.{key}={value}" for key, value in policies.items()]
    flags += [f"engine.kv_blocks={blocks}", f"engine.max_sequences={cell.max_sequences}", *cell.settings]
    config = load_config([*flags, "engine.max_queue=1000000"], {}, cwd=Path("/")).config
    core = replace(core_config(config, profile), model_context=cell.workload.context)
    peak = 0

    def watch(step: Any) -> None:
        nonlocal peak
        peak = max(peak, step.kv_used_blocks)

    simulation = Simulation(
        FleetConfig.of(core), profile, TraceWorkload(trace, core.context, cap=cell.workload.cap, tenants=tenants),
        catalog=Catalog(load_plugins(config.policies)), on_step=watch, recorder=recorder,
    )  # fmt: skip
    return simulation.run(), peak


def situation(cell: Cell) -> tuple[list[TraceRequest], float, int]:
    """The requests as they come at the cell's load, their rate, and the demand: of fcfs by the profile's own link, so
    that other defaults of ours, and slow tiers, change neither.
    """
    plain, cell = SYSTEMS["fcfs_reload"], replace(cell, link=None)
    recorded = formats.load(cell.workload.trace, Drawing(0))
    at_once = cell.workload.chosen(cell.seed, recorded)
    burst, _ = play(cell, at_once, plain, UNPRESSURED_BLOCKS)
    rate = cell.load * len(at_once) / burst.seconds
    trace = transform.retimed(at_once, rate, cell.seed)
    _, demand = play(cell, trace, plain, UNPRESSURED_BLOCKS)
    return trace, rate, demand


def blocks_of(cell: Cell, trace: Sequence[TraceRequest], share: float, demand: int) -> int:
    """The share of the demand, or what the largest request may need."""
    largest = max(each.prompt_tokens for each in trace) + cell.workload.cap
    return max(round(share * demand), -(-largest // 16) + 1)


def rows_of(cell: Cell) -> list[dict[str, Any]]:
    """A row a system and share."""
    trace, rate, demand = situation(cell)
    found = []
    for share in cell.shares:
        blocks = blocks_of(cell, trace, share, demand)
        for name, policies in cell.systems.items():
            outcome, _ = play(cell, trace, policies, blocks)
            head = {
                "trace": cell.workload.trace.name, "profile": machine(cell), "load": cell.load,
                "share": share, "seed": cell.seed, "system": name, "policies": dict(policies), "rate": rate,
                "demand": demand, "blocks": blocks,
            }  # fmt: skip
            found.append(head | row_of(outcome, cell.objectives))
    return found


def row_of(outcome: Outcome, objectives: Objectives) -> dict[str, Any]:
    assert not outcome.unfinished
    found = figures(outcome, objectives)
    assert not found.refused
    normalised, ttft = found.spreads["normalised"], found.spreads["ttft"]
    return {
        "tax": found.recompute_tax, "preemptions": found.preemptions, "attainment": found.attainment,
        "mean": normalised.mean, "p50": normalised.p50, "p99": normalised.p99, "ttft": ttft.mean,
        "ttft_p99": ttft.p99, "tpot": found.spreads["tpot"].mean, "seconds": found.seconds, "busy": found.busy,
        "promotions": outcome.counts.promotions.total(), "hits": found.hit_rate,
        "ways": Counter(back.way for back in outcome.returns), "digest": outcome.digest[:12],
    }  # fmt: skip


# --- why: the worst requests' timelines ------------------------------------------------------------------------------


def worst(cell: Cell, count: int) -> None:
    """Prints, for each system, the requests with the highest normalised latency and what was decided about them."""
    trace, rate, demand = situation(cell)
    blocks = blocks_of(cell, trace, cell.shares[0], demand)
    console().print(f"{rate:.2f} requests/s, {blocks} of {demand} blocks")
    for name, policies in cell.systems.items():
        decided: dict[str, list[tuple[float, Decided]]] = {}

        def record(now: float, event: Event, told: list[Told], to: Any = decided) -> None:
            for each in chain.from_iterable(instructions for _, instructions in told):
                if isinstance(each, Decided):
                    to.setdefault(each.request_id, []).append((now, each))

        outcome, _ = play(cell, trace, policies, blocks, record)
        timed = [(found["normalised"], each) for each in outcome.served if (found := latencies(each))]
        for normalised, each in sorted(timed, key=lambda pair: -pair[0])[:count]:
            console().print(
                f"{name}: request {each.number}, {each.prompt_tokens} + {each.output_tokens} tokens, "
                f"{normalised * 1e3:.1f} ms/token, TTFT {(each.first_token or 0) - each.arrived:.3f} s, "
                f"waited {each.queued_seconds:.3f} s"
            )
            for now, told in decided.get(str(each.number), ()):
                decision = told.decision
                console().print(
                    f"  {now - each.arrived:8.3f} s  {decision.kind} {decision.policy} {decision.chosen}: "
                    f"{decision.reason}"
                )


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> int:
    options = parsed()
    if options.report:
        found = [json.loads(line) for line in options.rows.read_text().splitlines()]
        report(found, console())
        if options.chart:
            draw(found, options.chart)
        return 0
    cells = cells_of(options)
    if options.worst:
        worst(replace(cells[0], shares=cells[0].shares[:1]), options.worst)
        return 0
    with ProcessPoolExecutor(options.jobs) as pool, options.rows.open("a") as file:
        for found in pool.map(rows_of, cells):
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
    return 0


def cells_of(options: argparse.Namespace) -> list[Cell]:
    systems = dict(options.systems)
    workloads = [
        Workload(trace, options.requests, options.block, options.answers_over, options.cap, options.context)
        for trace in options.trace
    ]
    return [
        Cell(
            workload, options.profile, load, tuple(options.shares), seed, systems, options.max_sequences,
            Objectives(options.ttft, options.tpot), tuple(options.set), options.link and Transfer(*options.link),
        )
        for workload, load, seed in product(workloads, options.loads, options.seeds)
    ]  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.policies_simulated",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--trace", type=Path, nargs="+", help="recorded traces (docs/simulation.md)")
    parser.add_argument(
        "--profile", default="epyc2-tales", help="a shipped one, a file, or a directory of operator tables"
    )
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--block", type=int, default=16, help="tokens of what was a recorded block of 512")
    parser.add_argument(
        "--answers-over", type=int, default=4, help="recorded output lengths are divided by this"
    )
    parser.add_argument("--cap", type=int, default=512, help="what clients ask for as max_tokens")
    parser.add_argument("--context", type=int, default=2048, help="of the model")
    parser.add_argument("--max-sequences", type=int, default=64)
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 0.7, 0.85, 1.0], help="of the capacity"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.25], help="of the demand"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--systems",
        nargs="+",
        type=named,
        default=list(SYSTEMS.items()),
        help="names, or NAME=key:value,key:value over the defaults",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the configuration, for all systems",
    )
    parser.add_argument(
        "--link",
        type=float,
        nargs=2,
        metavar=("SECONDS", "BYTES"),
        help="between device and host, instead of the profile's: of a copy, and a second",
    )
    parser.add_argument("--ttft", type=float, help="objective, in seconds")
    parser.add_argument("--tpot", type=float, help="objective, in seconds")
    parser.add_argument("--rows", type=Path, help="where rows are added (JSON Lines)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--worst", type=int, help="timelines of so many requests instead, of the first cell")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--chart", type=Path, help="PNG, with --report")
    options = parser.parse_args()
    if not ((options.trace and (options.rows or options.worst)) or (options.report and options.rows)):
        parser.error("--trace with --rows or --worst, or --rows with --report")
    return options


if __name__ == "__main__":
    sys.exit(main())
