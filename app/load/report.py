"""What came of the runs: tables for people, JSON Lines for programs. Charts are charts.py's, ratios compare.py's."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.load.figures import MOST_LAG_SECONDS, Figures, latencies
from app.load.generator import Sample, number_of
from app.simulate.figures import Objectives, capacity
from app.simulate.report import latencies as latency_table
from app.simulate.report import print_whole, write_lines


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `whole`: it was not interrupted."""

    server: str
    rate: float | None
    repeat: int
    samples: Sequence[Sample]
    figures: Figures
    whole: bool = True

    @property
    def name(self) -> str:
        at = "" if self.rate is None else f" @ {self.rate:g}/s"
        return f"{self.server}{at}" + (f" #{self.repeat + 1}" if self.repeat else "")


def show(results: Sequence[Result], objectives: Objectives, console: Console) -> None:
    console.print(latency_table(((each.name, each.figures.spreads) for each in results), "run"))
    print_whole(_accounts(results), console)
    for line in notes(results):
        console.print(line, soft_wrap=True)
    if objectives != Objectives():
        for server, rate in _capacities(results).items():
            found = "below the lowest rate" if rate is None else f"{rate:g} requests/s"
            console.print(f"capacity (highest rate with ≥ 90 % attainment), {server}: {found}")


def _accounts(results: Iterable[Result]) -> Table:
    heads = ("run", "attempted", "answered", "attained", "goodput/s", "answers/s", "tokens/s", "prompt tokens",
             "of these cached", "lag P50 / P99, ms", "seconds")  # fmt: skip
    table = Table(*heads, title="accounts")
    for result in results:
        found = result.figures
        cached = (
            "-" if found.cached_tokens is None else f"{found.cached_tokens / max(1, found.prompt_tokens):.1%}"
        )
        table.add_row(
            result.name,
            f"{found.attempted:,}",
            f"{found.answered:,}",
            f"{found.attainment:.1%}",
            f"{found.goodput:.3g}",
            f"{found.requests_per_second:.3g}",
            f"{found.output_tokens_per_second:,.1f}",
            f"{found.prompt_tokens:,}",
            cached,
            f"{found.lag_median * 1e3:.2f} / {found.lag_p99 * 1e3:.2f}",
            f"{found.seconds:,.1f}",
        )
    return table


def notes(results: Iterable[Result]) -> Iterator[str]:
    """What a reader of the tables must know, a line each."""
    for result in results:
        found = result.figures
        if not result.whole:
            yield f"{result.name}: interrupted; requests that ran then are attempted, and not answered."
        for kind, count in found.errors.items():
            detail = next((each.detail for each in result.samples if each.error == kind and each.detail), "")
            yield f"{result.name}: {count:,} of {kind}" + (f", as in: {detail}" if detail else "")
        guessed = {source: count for source, count in found.counted.items() if source != "usage"}
        for source, count in guessed.items():
            yield f"{result.name}: the server sent no usage with {count:,} answers; tokens are its {source}, counted."
        if found.void:
            yield (
                f"{result.name}: VOID. The generator was late, by {found.lag_median * 1e3:.1f} ms in the median "
                f"(at most {MOST_LAG_SECONDS * 1e3:g}): use a lower rate or a machine with more room."
            )


def _capacities(results: Iterable[Result]) -> dict[str, float | None]:
    return {server: capacity(pairs) for server, pairs in attainments(results).items()}


def attainments(results: Iterable[Result]) -> dict[str, list[tuple[float, float]]]:
    """(rate, attainment) by server: of repeats the worst, so that a rate that is met is met each time."""
    worst: dict[str, dict[float, float]] = {}
    for result in results:
        if result.rate is not None:
            rates = worst.setdefault(result.server, {})
            rates[result.rate] = min(rates.get(result.rate, 1.0), result.figures.attainment)
    return {server: sorted(rates.items()) for server, rates in worst.items()}


def write_rows(results: Sequence[Result], directory: Path, facts: dict[str, Any]) -> None:
    """`runs.jsonl` (its first line: what was asked for) and `requests.jsonl`, a row a request."""
    runs = ({"run": each.name, "whole": each.whole, **_named(each), **each.figures.row()} for each in results)
    write_lines(directory / "runs.jsonl", [facts, *runs])
    rows = (_row(result, sample) for result in results for sample in result.samples)
    write_lines(directory / "requests.jsonl", rows)


def _named(result: Result) -> dict[str, Any]:
    return {"server": result.server, "rate": result.rate, "repeat": result.repeat}


def _row(result: Result, sample: Sample) -> dict[str, Any]:
    """Seconds since the load began; latencies by their definitions."""
    request = sample.request
    return {
        "run": result.name,
        "number": number_of(sample),
        "session": request.session,
        "due": sample.due,
        "sent": sample.sent,
        "times": [round(at, 6) for at in sample.times],
        **(latencies(sample) or {}),
        "prompt_tokens_asked": request.prompt_tokens,
        "output_tokens_asked": request.output_tokens,
        "prompt_tokens": sample.prompt_tokens,
        "cached_tokens": sample.cached_tokens,
        "output_tokens": sample.tokens,
        "counted": sample.counted,
        "finish_reason": sample.finish_reason,
        "error": sample.error or None,
        "detail": sample.detail or None,
    }
