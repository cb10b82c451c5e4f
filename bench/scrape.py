"""Reading a server's /metrics: histograms, and what was added to one between two readings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True, slots=True)
class Histogram:
    edges: tuple[float, ...]  # rising; the last is infinite
    counts: tuple[float, ...]  # of each bucket alone
    total: float  # the sum of all observations

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The upper edge of the bucket that the quantile lies in: it is at most that. 0 for none."""
        reached = zip(self.edges, accumulate(self.counts), strict=True)
        return (
            next((edge for edge, seen in reached if seen >= share * self.count), 0.0) if self.count else 0.0
        )

    def since(self, earlier: "Histogram") -> "Histogram":
        counts = tuple(now - before for now, before in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.edges, counts, self.total - earlier.total)


class NoSuchMetric(Exception):
    """The server does not export it: is it Sluice, and this version?"""


def histogram(exposition: str, name: str) -> Histogram:
    """Of all label values together. Raises NoSuchMetric."""
    for family in text_string_to_metric_families(exposition):
        if family.name == name:
            return _histogram(family.samples, name)
    raise NoSuchMetric(f"{name} is not among the server's metrics")


def _histogram(samples: Iterable[Sample], name: str) -> Histogram:
    """Samples are (name, labels, value, …), buckets cumulative."""
    buckets: dict[float, float] = {}
    total = 0.0
    for sample in samples:
        label = sample.name.removeprefix(name)
        if label == "_bucket":
            edge = float(sample.labels["le"])
            buckets[edge] = buckets.get(edge, 0.0) + sample.value
        elif label == "_sum":
            total += sample.value
    edges = tuple(sorted(buckets))
    return Histogram(edges, _alone([buckets[edge] for edge in edges]), total)


def _alone(cumulative: Sequence[float]) -> tuple[float, ...]:
    return tuple(now - before for now, before in zip(cumulative, [0.0, *cumulative], strict=False))
