"""Histograms read back from what a Prometheus client exports."""

import math

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.scrape import NoSuchMetric, histogram

NAME = "sluice:lag_seconds"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def exported(registry: CollectorRegistry) -> Histogram:
    return Histogram(NAME, "lag", ["replica"], registry=registry, buckets=(0.01, 0.1, 1.0))


def text(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_buckets_are_counted_alone_and_labels_together(
    registry: CollectorRegistry, exported: Histogram
) -> None:
    for replica, seconds in [("a", 0.005), ("a", 0.5), ("b", 0.5), ("b", 7.0)]:
        exported.labels(replica).observe(seconds)
    read = histogram(text(registry), NAME)
    assert read.edges == (0.01, 0.1, 1.0, math.inf)
    assert read.counts == (1, 0, 2, 1)
    assert read.count == 4
    assert read.total == pytest.approx(8.005)
    assert read.mean == pytest.approx(8.005 / 4)


def test_a_quantile_is_the_upper_edge_of_its_bucket(registry: CollectorRegistry, exported: Histogram) -> None:
    for _ in range(99):
        exported.labels("a").observe(0.05)
    exported.labels("a").observe(7.0)
    read = histogram(text(registry), NAME)
    assert (read.quantile(0.5), read.quantile(0.99), read.quantile(1.0)) == (0.1, 0.1, math.inf)


def test_only_what_came_between_two_readings_counts(registry: CollectorRegistry, exported: Histogram) -> None:
    exported.labels("a").observe(7.0)
    before = histogram(text(registry), NAME)
    exported.labels("a").observe(0.05)
    since = histogram(text(registry), NAME).since(before)
    assert since.counts == (0, 1, 0, 0)
    assert since.total == pytest.approx(0.05)


def test_nothing_observed_is_zero_everywhere(registry: CollectorRegistry, exported: Histogram) -> None:
    exported.labels("a")
    read = histogram(text(registry), NAME)
    assert (read.count, read.mean, read.quantile(0.99)) == (0, 0, 0)


def test_a_metric_that_is_not_exported_is_named(registry: CollectorRegistry) -> None:
    with pytest.raises(NoSuchMetric, match=NAME):
        histogram(text(registry), NAME)
