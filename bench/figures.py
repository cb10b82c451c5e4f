"""From traces to figures: pure arithmetic, nothing is measured here."""

from collections.abc import Sequence
from statistics import median

from bench.peers.wire import Trace


class Unmeasurable(Exception):
    """The streams of a job never all ran at once, so it says nothing of decoding: give it more new tokens."""


def prefill_seconds(traces: Sequence[Trace]) -> float:
    """From submission until the last stream has its first token."""
    return max(trace.times[0] for trace in traces)


def decode_window(traces: Sequence[Trace]) -> tuple[float, int]:
    """Seconds in which every stream decoded, and the tokens that came in them.

    From the first token of the last stream to begin, to the last token of the first stream to end: streams
    that begin one after another neither add their prefill to the time nor run with fewer than all of them.
    """
    begin = max(trace.times[0] for trace in traces)
    end = min(trace.times[-1] for trace in traces)
    tokens = sum(begin < time <= end for trace in traces for time in trace.times)
    if not tokens:
        raise Unmeasurable(f"last stream began at {begin:.3f} s, first one ended at {end:.3f} s")
    return end - begin, tokens


def agreement(traces: Sequence[Trace], reference: Sequence[Trace], tokens: int = 8) -> float:
    """Share of streams that begin with the reference's tokens: whether two peers did the same work.

    Below 1 in bfloat16, where near-ties of a random model fall either way; in float32 it should be 1.
    """
    pairs = list(zip(traces, reference, strict=True))
    return sum(a.tokens[:tokens] == b.tokens[:tokens] for a, b in pairs) / len(pairs)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median of ours over median of theirs; None when one is missing."""
    return median(ours) / median(theirs) if ours and theirs else None
