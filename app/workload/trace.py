"""What every trace becomes: requests with arrivals, lengths, what their prompts share, and who waits for whom.

Loaders are one file a format (formats.py lists them), changes are transform.py's, token ids prompts.py's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


class TraceError(Exception):
    """A trace that cannot be used: which file, which line, and why. Line 0 is the file as a whole."""

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(path, line, why)  # all of them, so that it comes out of another process as it is

    def __str__(self) -> str:
        path, line, why = self.args
        return f"{path}:{line}: {why}" if line else f"{path}: {why}"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Of a prompt with block ids, equal leading ids mean equal tokens; other ids, other tokens.

    Ids cover the prompt from its first token on, `block_size` tokens each. The last may cover less than that; what
    lies beyond it, or the whole prompt where no ids are recorded, is like no other prompt.
    """

    number: int  # its place in the trace as loaded: unique, and kept by every transformation
    session: str
    arrival: float  # seconds from the trace's start; of a follow-up: as recorded, if it was
    prompt_tokens: int
    output_tokens: int
    block_runs: tuple[tuple[int, int], ...] = ()  # ids as runs: first id, how many follow one another
    block_size: int = 0
    after: int | None = None  # the number of the request that must end before it comes …
    think_seconds: float = 0.0  # … and how long after that end

    def block_ids(self) -> Iterator[int]:
        return (first + index for first, count in self.block_runs for index in range(count))

    @property
    def blocks(self) -> int:
        return sum(count for _, count in self.block_runs)


Trace = Sequence[TraceRequest]
"""By arrival; ties in the order of the file."""


def runs(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Block ids as runs: an hour of long prompts is tens of millions of ids, and nearly all follow one another."""
    found: list[tuple[int, int]] = []
    for each in ids:
        if found and each == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((each, 1))
    return tuple(found)


def openings(trace: Trace) -> list[TraceRequest]:
    """The requests that wait for no other."""
    return [request for request in trace if request.after is None]


def span_seconds(trace: Trace) -> float:
    """From the first opening request to the last."""
    arrivals = [request.arrival for request in openings(trace)]
    return max(arrivals) - min(arrivals) if arrivals else 0.0


def rate(trace: Trace) -> float:
    """Opening requests per second; 0 where fewer than two, or all at one moment."""
    span = span_seconds(trace)
    return (len(openings(trace)) - 1) / span if span > 0 else 0.0


def in_order(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    return sorted(requests, key=lambda request: (request.arrival, request.number))


def from_first(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    """In order, and the first arrives at 0: a recording may be part of a longer one, or have another clock's times."""
    found = in_order(requests)
    start = found[0].arrival if found else 0.0
    return [replace(request, arrival=request.arrival - start) for request in found]
