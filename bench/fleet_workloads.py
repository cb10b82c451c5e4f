"""Workloads for fleets, from recorded traces: conversations, agents' sessions, and a mixture of long ones and bursts.

Where prompts are long, lengths are a quarter of the recorded ones, as is then the KV pool of bench/fleet_simulated.py,
so that a run takes seconds and what is short of what stays so (`SCALES`); think times are a quarter too, at most
`MOST_THINK_SECONDS`. Sessions come as a Poisson process at the wanted rate; the long and bursty workload draws bursts.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

from app.workload import formats, transform
from app.workload.drawing import Drawing, poisson
from app.workload.trace import TraceRequest, in_order

SCALES = {"conversation": 4, "agentic": 4, "azure": 1, "mixed": 1}
CONTEXT, CAP = 131072, 2048
"""Of the model, and what clients ask for as max_tokens; both over the scale."""

MOST_THINK_SECONDS = 15.0
TURNS = 8
"""Of a session: the first so many requests."""

LONG_TOKENS = 16384
LONG_SHARE = 0.05
"""Of the requests of `mixed`: prompts of the conversation trace above so many recorded tokens."""

BURST_SHAPE = 1 / 16
"""Of the gamma distribution of the bursts' inter-arrival times: a CV of 4."""

FILES = {
    "conversation": "mooncake_conversation.jsonl.gz",
    "agentic": "agentic_sessions.jsonl.gz",
    "azure": "azure_llm_2023_conv.csv.gz",
}
WORKLOADS = tuple(SCALES)


@cache
def recorded(traces: Path, name: str, scale: int) -> list[TraceRequest]:
    """A recorded trace, its lengths over `scale`."""
    loaded = formats.load(traces / FILES[name], Drawing(0))
    if name == "agentic":
        loaded = _first_turns(loaded, scale)
    block = loaded[0].block_size or 512
    cap = CAP // scale
    small = transform.scaled(loaded, block // scale, block)
    capped = [replace(each, output_tokens=min(cap, each.output_tokens)) for each in small]
    return transform.clipped(capped, CONTEXT // scale - cap)


def _first_turns(trace: Sequence[TraceRequest], scale: int) -> list[TraceRequest]:
    turns: Counter[str] = Counter()
    kept = []
    for each in trace:
        turns[each.session] += 1
        if turns[each.session] <= TURNS:
            kept.append(replace(each, think_seconds=min(each.think_seconds / scale, MOST_THINK_SECONDS)))
    return transform.whole(kept)


def chosen(traces: Path, name: str, requests: int, seed: int) -> list[TraceRequest]:
    """About so many requests of the workload, whole sessions; when they come is `timed`'s."""
    if name == "mixed":
        return _mixed(traces, requests, seed)
    trace = recorded(traces, name, SCALES[name])
    sessions = list(dict.fromkeys(each.session for each in trace))
    if name == "agentic":
        Random(seed).shuffle(sessions)
    else:
        skipped = seed * requests % max(1, len(sessions) - requests)  # another part of the record
        sessions = sessions[skipped:]
    lengths = Counter(each.session for each in trace)
    kept, count = dict[str, int](), 0
    for session in sessions:
        if count >= requests:
            break
        kept[session] = len(kept)
        count += lengths[session]
    those = [each for each in trace if each.session in kept]
    return sorted(those, key=lambda each: (kept[each.session], each.number))


def _mixed(traces: Path, requests: int, seed: int) -> list[TraceRequest]:
    long = round(requests * LONG_SHARE)
    bursts = chosen(traces, "azure", requests - long, seed)
    conversation = recorded(traces, "conversation", SCALES["mixed"])
    longs = [each for each in conversation if each.prompt_tokens > LONG_TOKENS]
    first = seed * long % max(1, len(longs) - long)
    offset = 1 + max(each.number for each in bursts)
    return bursts + [
        replace(each, number=offset + index, session=f"long {each.session}")
        for index, each in enumerate(longs[first : first + long])
    ]


def at_once(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    """All sessions from the start, without thinking: for the capacity."""
    return [replace(each, arrival=0.0, think_seconds=0.0) for each in trace]


def timed(name: str, trace: Sequence[TraceRequest], rate: float, seed: int) -> list[TraceRequest]:
    """At so many requests per second in all."""
    openings = [each for each in trace if each.after is None]
    opening_rate = rate * len(openings) / len(trace)
    random = Drawing(seed).random("fleet", name)
    if name != "mixed":
        arrivals = poisson(random, opening_rate)
        times = {each.session: next(arrivals) for each in openings}
        return in_order(replace(each, arrival=times[each.session]) for each in trace)
    longs = [each for each in trace if each.session.startswith("long ")]
    bursts = [each for each in trace if not each.session.startswith("long ")]
    share = len(longs) / len(trace)
    arrivals = poisson(random, rate * share)
    burst_arrivals = _gamma(random, rate * (1 - share), BURST_SHAPE)
    return in_order(
        [replace(each, arrival=next(arrivals)) for each in longs]
        + [replace(each, arrival=next(burst_arrivals)) for each in bursts]
    )


def _gamma(random: Random, rate: float, shape: float) -> Iterator[float]:
    """Arrival times whose gaps are gamma-distributed: a CV of 1 / √shape."""
    now = 0.0
    while True:
        now += random.gammavariate(shape, 1 / (rate * shape))
        yield now
