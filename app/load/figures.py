"""From samples to figures, by the definitions of docs/bench_serve.md. Pure arithmetic."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from app.load.generator import Sample
from app.simulate.figures import METRICS, Objectives, Spread, percentile, spread

MOST_LAG_SECONDS = 0.010
"""Median, of a generator whose figures may be trusted."""


def latencies(sample: Sample) -> dict[str, float] | None:
    """By metric, in seconds; None of a request that was not answered. An answer of one token has no TPOT."""
    if sample.error:
        return None
    first, whole = sample.times[0] - sample.due, sample.times[-1] - sample.due
    found = {"ttft": first, "e2e": whole, "normalised": whole / sample.tokens}
    if sample.tokens > 1:
        found["tpot"] = (whole - first) / (sample.tokens - 1)
    return found


def gaps(sample: Sample) -> list[float]:
    return [later - earlier for earlier, later in zip(sample.times, sample.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. Shares are 0 … 1; `attainment` is over all attempted requests. Rates are per second."""

    attempted: int
    answered: int
    errors: dict[str, int]  # by kind, the most frequent first
    spreads: dict[str, Spread]
    attainment: float
    goodput: float  # requests that met the objectives
    requests_per_second: float  # answered
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    output_tokens: int
    prompt_tokens: int  # as the server counts, else as asked
    cached_tokens: int | None  # None: the server says nothing of it
    counted: dict[str, int]  # answers by where their number of tokens is from
    lag_median: float
    lag_p99: float
    seconds: float  # from the beginning to the last that came

    @property
    def void(self) -> bool:
        """The generator was late itself: nothing of this run may be used."""
        return self.lag_median > MOST_LAG_SECONDS

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"void": self.void}


def figures(samples: Sequence[Sample], objectives: Objectives) -> Figures:
    times = [found for sample in samples if (found := latencies(sample))]
    good = [sample for sample in samples if not sample.error]
    lags = sorted(sample.sent - sample.due for sample in samples if sample.sent is not None)
    cached = [sample.cached_tokens for sample in good if sample.cached_tokens is not None]
    seconds = max((sample.times[-1] for sample in good), default=0.0)
    met = sum(map(objectives.met, times))
    output = sum(sample.tokens for sample in good)
    prompt = sum(sample.prompt_tokens or sample.request.prompt_tokens for sample in good)
    return Figures(
        attempted=len(samples),
        answered=len(good),
        errors=dict(Counter(sample.error for sample in samples if sample.error).most_common()),
        spreads=_spreads(times, good),
        attainment=met / len(samples) if samples else 0.0,
        goodput=_rate(met, seconds),
        requests_per_second=_rate(len(good), seconds),
        output_tokens_per_second=_rate(output, seconds),
        prompt_tokens_per_second=_rate(prompt, seconds),
        output_tokens=output,
        prompt_tokens=prompt,
        cached_tokens=sum(cached) if cached else None,
        counted=dict(Counter(sample.counted for sample in good).most_common()),
        lag_median=median(lags) if lags else 0.0,
        lag_p99=percentile(lags, 0.99) if lags else 0.0,
        seconds=seconds,
    )


def _spreads(times: Sequence[dict[str, float]], good: Sequence[Sample]) -> dict[str, Spread]:
    values = {name: [each[name] for each in times if name in each] for name in METRICS}
    values["itl"] = [gap for sample in good for gap in gaps(sample)]
    return {name: found for name, those in values.items() if (found := spread(those)) is not None}


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
