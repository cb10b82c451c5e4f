"""From a simulated run to figures, by the definitions of docs/simulation.md. Pure arithmetic.

Percentiles, objectives and capacity serve live runs too: app/load/figures.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from engine.simulation import Outcome, Served

WANTED_ATTAINMENT = 0.9
METRICS = {
    "ttft": "time to first token, s",
    "tpot": "time per output token, s",
    "e2e": "end to end, s",
    "normalised": "end to end ÷ output tokens, s",
    "itl": "between chunks, s",  # of live runs alone
}


@dataclass(frozen=True, slots=True)
class Objectives:
    """In seconds; None: none."""

    ttft: float | None = None
    tpot: float | None = None

    def met(self, times: Mapping[str, float] | None) -> bool:
        """Of a request's latencies; None, of a refused or unfinished one, meets nothing."""
        if times is None:
            return False
        return (self.ttft is None or times["ttft"] <= self.ttft) and (
            self.tpot is None or times.get("tpot", 0.0) <= self.tpot
        )


def latencies(served: Served) -> dict[str, float] | None:
    """By metric; None of a request that was refused. An answer of one token has no TPOT."""
    if served.finished is None or served.first_token is None:
        return None
    whole, first = served.finished - served.arrived, served.first_token - served.arrived
    found = {"ttft": first, "e2e": whole, "normalised": whole / served.output_tokens}
    if served.output_tokens > 1:
        found["tpot"] = (whole - first) / (served.output_tokens - 1)
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    mean: float
    p50: float
    p90: float
    p99: float


def spread(values: Iterable[float]) -> Spread | None:
    """None of no values. Percentiles lie between the two values around them."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Spread(fmean(ordered), *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)))


def percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. Shares are 0 … 1; `attainment` is over all attempted requests."""

    attempted: int
    refused: int
    unfinished: int
    spreads: dict[str, Spread]
    attainment: float
    goodput: float  # requests per second that met the objectives
    recompute_tax: float  # positions computed again ÷ all computed
    preemptions: int
    hit_rate: float  # prompt tokens found in some tier ÷ looked up
    busy: float  # share of the time that the devices computed
    seconds: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def figures(outcome: Outcome, objectives: Objectives) -> Figures:
    times = [found for served in outcome.served if (found := latencies(served))]
    spreads = {
        name: one
        for name in METRICS
        if (one := spread(each[name] for each in times if name in each)) is not None
    }
    attempted = len(outcome.served) + outcome.unfinished
    met = sum(map(objectives.met, times))
    counts = outcome.counts
    return Figures(
        attempted=attempted,
        refused=len(outcome.served) - len(times),
        unfinished=outcome.unfinished,
        spreads=spreads,
        attainment=_share(met, attempted),
        goodput=_share(met, outcome.seconds),
        recompute_tax=_share(outcome.recomputed_tokens, outcome.computed_tokens),
        preemptions=counts.preemptions,
        hit_rate=_share(counts.prefix_hits, counts.prefix_queries),
        busy=_share(outcome.busy_seconds, outcome.seconds * max(1, len(outcome.busy_by_replica))),
        seconds=outcome.seconds,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def capacity(attainments: Iterable[tuple[float, float]]) -> float | None:
    """The highest rate below which all meet: of (rate, attainment), the last before the first that falls short."""
    found = None
    for rate, attainment in sorted(attainments):
        if attainment < WANTED_ATTAINMENT:
            break
        found = rate
    return found
