"""What may be done to a trace before it is played: all deterministic, all leave numbers and sessions as they are.

A lower rate is fewer sessions, never slower ones: stretching would change burstiness and reuse distances.
"""

from collections.abc import Iterable
from dataclasses import replace

from app.workload.drawing import Drawing, poisson
from app.workload.trace import Trace, TraceRequest, in_order, openings
from app.workload.trace import rate as rate_of


class CannotTransform(Exception):
    """The trace cannot be made what was asked for; the message says why, and what could."""


def thin(trace: Trace, share: float, seed: int = 0) -> list[TraceRequest]:
    """Keeps about `share` (0 … 1) of the sessions, each whole. A smaller share keeps a part of a larger one's."""
    drawing = Drawing(seed)
    return [each for each in trace if drawing.random("thin", each.session).random() < share]


def at_rate(trace: Trace, rate: float, seed: int = 0) -> list[TraceRequest]:
    """Thins to about `rate` opening requests per second. Raises CannotTransform where there are not so many."""
    own = rate_of(trace)
    if rate > own * 1.001:
        raise CannotTransform(
            f"this trace has {own:.3g} requests/s: it can be thinned, not thickened, to {rate:g}; "
            "draw new arrivals (poisson) for more"
        )
    return thin(trace, rate / own, seed)


def retimed(trace: Trace, rate: float, seed: int = 0) -> list[TraceRequest]:
    """The same requests in the same order, their openings a Poisson process of `rate` per second.

    Follow-ups keep their distance from their session's opening, and think as long as before.
    """
    arrivals = poisson(Drawing(seed).random("retimed"), rate)
    shifts = {
        opening.number: at - opening.arrival for opening, at in zip(openings(trace), arrivals, strict=False)
    }
    for each in sorted(trace, key=lambda each: each.number):  # who is waited for has the lower number
        if each.after is not None:
            shifts[each.number] = shifts[each.after]
    return in_order(replace(each, arrival=each.arrival + shifts[each.number]) for each in trace)


def scaled(trace: Trace, block_size: int, recorded_block_size: int = 512) -> list[TraceRequest]:
    """For small models: a recorded block becomes one of `block_size` tokens, so what is shared stays shared.

    All lengths shrink alike, those of answers and of prompts without blocks by `block_size / recorded_block_size`.
    """
    return [_scaled(each, block_size, each.block_size or recorded_block_size) for each in trace]


def _scaled(request: TraceRequest, size: int, recorded: int) -> TraceRequest:
    whole, rest = divmod(request.prompt_tokens, recorded)
    return replace(
        request,
        prompt_tokens=whole * size + -(-rest * size // recorded),
        output_tokens=max(1, round(request.output_tokens * size / recorded)),
        block_size=size if request.block_size else 0,
    )


def clipped(trace: Trace, context: int) -> list[TraceRequest]:
    """Fits every request into a context: answers to half of it at most, then prompts, which lose their ends."""
    return [_clipped(each, context) for each in trace]


def _clipped(request: TraceRequest, context: int) -> TraceRequest:
    output = min(request.output_tokens, context // 2)
    prompt = min(request.prompt_tokens, context - output)
    if (prompt, output) == (request.prompt_tokens, request.output_tokens):
        return request
    size = request.block_size
    kept = _first(request.block_runs, prompt // size) if size else ()
    return replace(request, prompt_tokens=prompt, output_tokens=output, block_runs=kept)


def _first(block_runs: Iterable[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    kept: list[tuple[int, int]] = []
    for first, length in block_runs:
        taken = min(length, count)
        count -= taken
        if taken:
            kept.append((first, taken))
    return tuple(kept)


def first(trace: Trace, count: int) -> list[TraceRequest]:
    """The first `count` requests; a follow-up whose predecessor is left out is left out too."""
    return whole(trace[:count])


def until(trace: Trace, seconds: float) -> list[TraceRequest]:
    """Sessions that open before `seconds`, each whole."""
    kept = {each.session for each in trace if each.after is None and each.arrival < seconds}
    return [each for each in trace if each.session in kept]


def whole(trace: Trace) -> list[TraceRequest]:
    """Without the follow-ups of requests that are not there."""
    there: set[int] = set()
    kept = []
    for each in sorted(trace, key=lambda each: each.number):
        if each.after is None or each.after in there:
            there.add(each.number)
            kept.append(each)
    return in_order(kept)
