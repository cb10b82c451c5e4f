"""Metrics by name: each has the labels `model_name` and `engine`, and is made when somebody first asks for a child."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Metric = TypeVar("Metric", Counter, Gauge, Histogram)


class Families:
    """`engine` of its methods: the number of the replica; 0 for what is the whole process's. `more`: other labels."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.registry = registry
        self._model_name = model_name
        self._families: dict[str, Any] = {}

    def labels(self, engine: int) -> dict[str, str]:
        return {"model_name": self._model_name, "engine": str(engine)}

    def gauge(self, engine: int, name: str, text: str, **more: str) -> Gauge:
        return self._child(Gauge, engine, name, text, more)

    def counter(self, engine: int, name: str, text: str, **more: str) -> Counter:
        return self._child(Counter, engine, name, text, more)

    def histogram(self, engine: int, name: str, text: str, edges: Sequence[float], **more: str) -> Histogram:
        return self._child(Histogram, engine, name, text, more, buckets=edges)

    def _child(
        self,
        kind: type[Metric],
        engine: int,
        name: str,
        text: str,
        more: Mapping[str, str],
        **options: Any,
    ) -> Metric:
        labels = self.labels(engine) | dict(more)
        if name not in self._families:
            self._families[name] = kind(name, text, list(labels), registry=self.registry, **options)
        family: Metric = self._families[name]
        return family.labels(**labels)
