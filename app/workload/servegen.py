"""ServeGen's clients, one a line: per window how fast and how bursty each is, per 6 hours how long its requests are.

Requests are drawn: per client and window, inter-arrival times from the named distribution, rescaled so that all
clients together have the drawing's rate (None: their own); lengths through the quantiles, input and output apart.
A client is a session, so thinning takes whole clients. Source: alibaba/ServeGen, Xiang et al., arXiv 2505.09999.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from app.workload.drawing import Drawing
from app.workload.reading import objects, parsed, seconds
from app.workload.trace import TraceRequest

WINDOW_SECONDS = 600.0
DISTRIBUTIONS = ("Gamma", "Weibull")
LEAST_SHAPE = 0.01
"""Below, the scale of a Weibull distribution of mean 1 is no float any more, and nearly all gaps are 0."""


@dataclass(frozen=True, slots=True)
class Window:
    start: float
    rate: float
    distribution: str
    shape: float

    def gap(self, random: Random) -> float:
        """An inter-arrival time, of mean 1."""
        if self.distribution == "Gamma":
            return random.gammavariate(self.shape, 1 / self.shape)
        return random.weibullvariate(1 / math.gamma(1 + 1 / self.shape), self.shape)


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    windows: list[Window]
    lengths: list[
        tuple[float, list[float], list[float]]
    ]  # from when on; quantiles of input and output tokens

    def quantiles(self, at: float) -> tuple[list[float], list[float]]:
        """Those of the last 6 hours that began by then; of the first ones before."""
        index = bisect_right(self.lengths, at, key=lambda each: each[0])
        return self.lengths[max(0, index - 1)][1:]


def load(path: Path, drawing: Drawing) -> list[TraceRequest]:
    """The first `drawing.seconds` of the day. Raises TraceError."""
    clients = list(parsed(path, objects(path), _client))
    factor = 1.0 if drawing.rate is None else drawing.rate / max(_rate(clients, drawing.seconds), 1e-9)
    drawn = sorted(each for client in clients for each in _draw(client, factor, drawing))
    return [
        TraceRequest(number, name, at, prompt, output)
        for number, (at, name, prompt, output) in enumerate(drawn)
    ]


def _client(row: dict[str, Any]) -> Client:
    windows = [_window(*each) for each in row["arrivals"]]
    lengths = [
        (seconds(each["t"]), _quantiles(each, "input_tokens"), _quantiles(each, "output_tokens"))
        for each in row["lengths"]
    ]
    if not lengths:
        raise ValueError("a client without lengths")
    return Client(str(row["client"]), windows, sorted(lengths))


def _window(
    start: float, rate: float, variation: float, distribution: str, shape: float, scale: float
) -> Window:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"inter-arrival times are {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")
    if not (0 < rate < math.inf and LEAST_SHAPE <= shape < math.inf):
        raise ValueError(f"a window at {start} s with rate {rate} and shape {shape}")
    return Window(seconds(start), rate, distribution, shape)


def _quantiles(row: dict[str, Any], name: str) -> list[float]:
    values = [float(each) for each in row["quantiles"][name]]
    if len(values) < 2 or values != sorted(values) or not all(0 <= each < math.inf for each in values):
        raise ValueError(f"quantiles of {name} must rise from 0 or more, be finite, and be two at least")
    return values


def _rate(clients: list[Client], duration: float) -> float:
    """Requests per second of all together, over the drawn time."""
    overlaps = (
        window.rate * max(0.0, min(window.start + WINDOW_SECONDS, duration) - window.start)
        for client in clients
        for window in client.windows
    )
    return sum(overlaps) / duration


def _draw(client: Client, factor: float, drawing: Drawing) -> Iterator[tuple[float, str, int, int]]:
    """(arrival, client, prompt tokens, output tokens)."""
    for window in client.windows:
        if window.start >= drawing.seconds:
            continue
        random = drawing.random("servegen", client.name, window.start)
        end = min(window.start + WINDOW_SECONDS, drawing.seconds)
        mean = 1 / (window.rate * factor)
        at = window.start + window.gap(random) * mean * random.random()  # it began before the window did
        while at < end:
            inputs, outputs = client.quantiles(at)
            yield at, client.name, _length(inputs, random), _length(outputs, random)
            at += window.gap(random) * mean


def _length(quantiles: list[float], random: Random) -> int:
    place = random.random() * (len(quantiles) - 1)
    below = int(place)
    value = quantiles[below] + (place - below) * (quantiles[below + 1] - quantiles[below])
    return max(1, round(value))
