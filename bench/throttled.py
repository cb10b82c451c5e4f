"""Ways back from a slow tier, live: `cheapest` beside always reloading and always computing again, all else equal.

    python -m bench.throttled --trace FILE --rows FILE                    # five repeats, the ways by turns
    python -m bench.throttled --trace FILE --rows FILE --slowdown 20      # the tier slows in mid-run
    python -m bench.throttled --rows FILE --report

The host tier is behind a link of `--latency` and `--rate` (bench/slow_tier.py), chosen so that short sequences are
computed more cheaply and long ones loaded more cheaply. Otherwise as bench/policies.py: a run without pressure gives
rate, demand and answers, which all others must repeat to the token. With `--slowdown` the link is so many times slower
in the middle third of the arrivals; told is what came back by which way in each second, and how long decisions took to
turn: until, of the last five, more went the new way.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from rich.table import Table

from app.serving import Parts
from bench.policies import (
    LATE_SECONDS,
    Ending,
    Live,
    Outcome,
    Run,
    arguments,
    figures,
    in_a_process,
    play,
    rotated,
    run_of,
    workload,
)
from bench.report import console
from bench.slow_tier import Link, SlowTier
from engine.engine import Engine
from kvstore import memory
from policies.pricing import RECOMPUTE

WAYS = ("cheapest", "reload", "recompute")
LAST = 5
"""Decisions that are looked at, to say which way they go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRun(Run):
    """`system` is the way back. A link without bytes per second is none."""

    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    slowdown: float = 1.0
    slow: tuple[float, float] = (0.0, 0.0)  # from, until: seconds since the beginning
    order: str = "hybrid"


class SlowLive(Live):
    """The link becomes slow in mid-run, and quick again."""

    def __init__(self, parts: Parts, ending: Ending, outcome: Outcome, run: SlowRun, link: Link) -> None:
        super().__init__(parts, ending, outcome)
        self._run = run
        self._link = link

    def watch(self, engine: Engine) -> None:
        if self._run.slowdown > 1:
            begin, end = self._run.slow
            self.at(begin, partial(setattr, self._link, "slowdown", self._run.slowdown))
            self.at(end, partial(setattr, self._link, "slowdown", 1.0))


def play_slow(run: SlowRun) -> Outcome:
    """The host arena is made behind the link, so that calibration measures the tier that is served from."""
    run = replace(run, policies={"resume": run.system, "order": run.order})
    link = Link(run.latency_seconds, run.bytes_per_second or float("inf"))
    made = memory.host_tier

    def host(blocks: int, block_bytes: int, *, pinned: bool) -> SlowTier:
        return SlowTier(made(blocks, block_bytes, pinned=pinned), link)

    if not run.bytes_per_second:
        return play(run)
    with patch.object(memory, "host_tier", host):
        return play(run, partial(SlowLive, run=run, link=link))


# --- all ways ---------------------------------------------------------------------------------------------------------


def repeat(base: SlowRun, load: float, share: float, slowdown: float, number: int, rows: Path) -> int:
    """One of all ways. Exit code 1 when an answer differs, or the load came too late."""
    plain = replace(base, bytes_per_second=0.0)
    at_rate = plain if base.rate else replace(plain, rate=load * base.requests / _played(plain).seconds)
    free = _played(at_rate)
    blocks = max(round(share * free.peak_blocks), 2048 // 16 + 1)
    last = workload(at_rate)[-1].arrival
    slowed = replace(base, rate=at_rate.rate, blocks=blocks, slowdown=slowdown, slow=(last / 3, last * 2 / 3))
    wrong = 0
    for way in rotated(WAYS if slowdown == 1 else WAYS[:1], number):
        outcome = _played(replace(slowed, system=way))
        same, void = outcome.answers == free.answers, outcome.late > LATE_SECONDS
        wrong += not same or void
        row = asdict(slowed) | {
            "system": way,
            "demand": free.peak_blocks,
            "same": same,
            "void": void,
            "trace": Path(base.trace).name,
            "free": figures(free)["mean"],
            **figures(outcome),
            "resumed": outcome.resumed,
        }
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        console().print(f"{way}: { {key: value for key, value in row.items() if key != 'resumed'} }")
    return int(wrong > 0)


def _played(run: SlowRun) -> Outcome:
    return in_a_process(run, "bench.throttled")


def report(rows: Path) -> int:
    """Exit code 1 when `cheapest` is not the best in mean and P99, or any answer differed."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    told = [json.loads(text) for text in rows.read_text().splitlines()]
    for row in told:
        if not row["void"] and row["slowdown"] == 1:
            found[row["system"]].append(row)
    missed = not all(row["same"] for row in told)
    if found:
        console().print(_compared(found), _predicted(found))
        for key in ("mean", "p99"):
            best = min(found, key=lambda way: _median(found[way], key))
            missed |= best != WAYS[0]
    for row in told:
        if row["slowdown"] > 1:
            timeline(row)
    return int(missed)


def _compared(found: dict[str, list[dict[str, Any]]]) -> Table:
    first = next(iter(found.values()))[0]
    title = (
        f"{first['trace']}, {first['order']}, KV {first['blocks'] / first['demand']:.2f} of demand, "
        f"{first['latency_seconds'] * 1e3:g} ms + {first['bytes_per_second'] / 1e6:g} MB/s"
    )
    table = Table("way", "runs", "mean ms", "P99 ms", "TTFT ms", "P99", "preempted", "tax", title=title)
    for name in ("came back by", "regret s"):
        table.add_column(name)
    for way, rows in found.items():
        scaled = (_median(rows, key) * 1e3 for key in ("mean", "p99", "ttft", "ttft_p99"))
        ways = Counter[str]()
        for row in rows:
            ways.update({name: count / len(rows) for name, count in row["ways"].items()})
        table.add_row(
            way,
            str(len(rows)),
            *(f"{value:.1f}" for value in scaled),
            f"{_median(rows, 'preemptions'):.0f}",
            f"{_median(rows, 'tax'):.1%}",
            ", ".join(f"{name} {n:.0f}" for name, n in ways.most_common()),
            f"{_median(rows, 'regret_seconds'):.2f}",
        )
    return table


def _predicted(found: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("policy", "way", "resumes", "error", "predicted ÷ actual", title="coming back, predicted")
    for policy, rows in found.items():
        ratios = defaultdict[str, list[float]](list)
        for row in rows:
            for _, way, predicted, actual, _ in row["resumed"]:
                ratios[way].append(predicted / max(actual, 1e-9))
        for way, those in sorted(ratios.items()):
            error = median(abs(ratio - 1) for ratio in those)
            table.add_row(policy, way, str(len(those)), f"{error:.0%}", f"{median(those):.2f}")
    return table


def timeline(row: dict[str, Any]) -> None:
    begin, end = row["slow"]
    table = Table(
        "second", "link", "recompute", "others", title=f"{row['slowdown']:g} times slower for a while"
    )
    seconds = defaultdict[int, Counter[bool]](Counter)
    decisions = sorted((at, way.startswith(RECOMPUTE)) for at, way, *_ in row["resumed"])
    for at, computed in decisions:
        seconds[int(at)][computed] += 1
    for second in range(max(seconds, default=0) + 1):
        link = "slow" if begin <= second + 0.5 < end else ""
        table.add_row(str(second), link, *(str(seconds[second][which] or "") for which in (True, False)))
    to, back = turned(decisions, begin, True), turned(decisions, end, False)
    console().print(
        table, f"turned after {to} s, and back after {back} s", f"mean {row['mean'] * 1e3:.1f} ms"
    )


def turned(decisions: Iterable[tuple[float, bool]], since: float, way: bool) -> float | None:
    """Seconds after `since` when for the first time most of the last few decisions went that way; None: never."""
    last: deque[bool] = deque(maxlen=LAST)
    for at, each in decisions:
        if at >= since:
            last.append(each == way)
            if sum(last) > LAST / 2:
                return round(at - since, 2)
    return None


def _median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(median(row[key] for row in rows))


def asked(options: argparse.Namespace) -> SlowRun:
    return SlowRun(
        **asdict(run_of(options, WAYS[0], options.per_second)),
        latency_seconds=options.latency,
        bytes_per_second=options.rate,
        order=options.order,
    )


def main() -> int:
    options = parsed(sys.argv[1:])
    if options.play:
        outcome = play_slow(SlowRun(**json.loads(options.play)))
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        return 0
    if options.report:
        return report(options.rows)
    return max(
        repeat(asked(options), options.load, options.share, options.slowdown, number, options.rows)
        for number in range(options.repeats)
    )


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = arguments(__doc__, requests=300, answers_over=1)
    add = parser.add_argument
    add("--per-second", type=float, default=0.0, help="requests, instead of a load")
    add("--latency", type=float, default=0.02, help="seconds of each copy")
    add("--rate", type=float, default=100e6, help="bytes per second")
    add("--slowdown", type=float, default=1.0)
    add("--order", default="hybrid")
    add("--repeats", type=int, default=5)
    options = parser.parse_args(words)
    if not options.play and (options.rows is None or not (options.report or options.trace)):
        parser.error("--rows, and --trace or --report, are needed")
    return options


if __name__ == "__main__":
    sys.exit(main())
