"""Greedy least load beside the least possible makespan: the routing policy `least_load` on random fixed works.

`python -m bench.greedy [--replicas 2 3 4] [--requests 4 6 8] [--draws 300] [--seed 0]`

Works are log-normal (σ = 1, as lengths of answers are), placed one after the other in the order drawn; none ends
meanwhile. The optimum is by trying all placements, so the numbers are small. The bound is 2 - 1/m (Graham, 1969).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean

from rich.console import Console
from rich.table import Table

from policies.routing import ROUTINGS


@dataclass(frozen=True, slots=True)
class Replica:
    """Implements policies.views.CandidateView, of requests that are all alike but for what they are charged."""

    number: int
    charged_seconds: float = 0.0
    requests: int = 0
    role: str = "any"
    limit_tokens: int = 0
    capacity_tokens: int = 2
    used_tokens: int = 0
    placed: int = 0
    backlog_seconds: float = 0.0
    forecast_tokens: float = 0.0
    waiting: int = 0
    prompt_tokens: int = 1
    size_tokens: float = 1.0
    urgent: bool = False
    cached_tokens: int = 0
    prefill_seconds: float = 0.0
    saved_seconds: float = 0.0
    decode_seconds: float = 0.0
    ahead_seconds: float = 0.0
    behind_seconds: float = 0.0
    disturbed_seconds: float = 0.0
    session_home: bool = False

    def charged(self, seconds: float) -> "Replica":
        return replace(
            self,
            charged_seconds=self.charged_seconds + seconds,
            requests=self.requests + 1,
            placed=self.placed + 1,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """Ratios are greedy makespan ÷ optimum."""

    replicas: int
    requests: int
    mean_ratio: float
    worst_ratio: float
    bound: float


def greedy(works: Sequence[float], count: int) -> float:
    """The makespan of `least_load` on so many idle replicas."""
    replicas = [Replica(number) for number in range(count)]
    for work in works:
        chosen = ROUTINGS["least_load"](replicas).replica
        replicas[chosen] = replicas[chosen].charged(work)
    return max(each.charged_seconds for each in replicas)


def optimum(works: Sequence[float], count: int) -> float:
    """The least makespan of all placements: tries them all, but for those that only exchange replicas."""
    best = sum(works)

    def place(index: int, loads: tuple[float, ...]) -> None:
        nonlocal best
        if max(loads) >= best:
            return
        if index == len(works):
            best = max(loads)
            return
        for load in set(loads):
            at = loads.index(load)
            place(index + 1, (*loads[:at], load + works[index], *loads[at + 1 :]))

    place(0, (0.0,) * count)
    return best


def bound(count: int) -> float:
    return 2 - 1 / count


def rows(replicas: Sequence[int], requests: Sequence[int], draws: int, seed: int) -> Iterator[Row]:
    for count in replicas:
        for length in requests:
            random = Random(f"{seed} {count} {length}")
            drawn = [[random.lognormvariate(0.0, 1.0) for _ in range(length)] for _ in range(draws)]
            ratios = [greedy(works, count) / optimum(works, count) for works in drawn]
            yield Row(count, length, fmean(ratios), max(ratios), bound(count))


def table(found: Sequence[Row]) -> Table:
    shown = Table("m", "n", "mean ratio", "worst ratio", "bound", title="greedy least load ÷ optimum")
    for row in found:
        figures = (row.mean_ratio, row.worst_ratio, row.bound)
        shown.add_row(str(row.replicas), str(row.requests), *(f"{figure:.3f}" for figure in figures))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.greedy", description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=(2, 3, 4))
    parser.add_argument("--requests", type=int, nargs="+", default=(4, 6, 8))
    parser.add_argument("--draws", type=int, default=300, help="of works, for each row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    Console().print(table(list(rows(options.replicas, options.requests, options.draws, options.seed))))


if __name__ == "__main__":
    main()
