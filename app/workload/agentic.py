"""Coding-agent sessions, one a line: growing contexts, tool waits, human pauses, sub-agents. Closed loop.

Within a session a request comes `think_s` after the one before it has ended. A sub-agent's first request waits for
the request of the main thread that was the last to begin before it. Sessions begin as a Poisson process at the
drawing's rate of sessions per second (one a minute without it), as their starts are not recorded. Ids are local to a
session in the file, and made unique here. Source: callanjfox/kv-cache-tester, re-encoded with runs of ids as
`[first, count]`.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from app.workload.drawing import Drawing, poisson
from app.workload.reading import objects, parsed, seconds, tokens
from app.workload.trace import TraceRequest, in_order

SESSIONS_PER_SECOND = 1 / 60


@dataclass(slots=True)
class Turn:
    """A request as recorded. `began`, `lasted`: seconds from the session's start."""

    began: float
    lasted: float
    request: TraceRequest


def load(path: Path, drawing: Drawing) -> list[TraceRequest]:
    """Raises TraceError."""
    starts = poisson(drawing.random("agentic"), drawing.rate or SESSIONS_PER_SECOND)
    numbers, first_id = count(), 0
    requests: list[TraceRequest] = []
    for turns in parsed(path, objects(path), lambda row: _session(row, numbers)):
        start = next(starts)
        requests += [_placed(turn.request, start, first_id) for turn in turns]
        first_id += 1 + max((sum(run) for turn in turns for run in turn.request.block_runs), default=0)
    return in_order(requests)


def _placed(request: TraceRequest, start: float, first_id: int) -> TraceRequest:
    ids = tuple((first_id + first, length) for first, length in request.block_runs)
    return replace(request, arrival=start + request.arrival, block_runs=ids)


def _session(row: dict[str, Any], numbers: "count[int]") -> list[Turn]:
    session, block_size = str(row["id"]), tokens(row["block_size"])
    main = list(_thread(row["requests"], 0.0, session, block_size, numbers))
    if not main:
        raise ValueError("a session without requests")
    begins = [turn.began for turn in main]
    turns = list(main)
    for agent in row["subagents"]:
        start = seconds(agent["t"])
        caller = main[max(0, bisect_right(begins, start) - 1)]
        thread = list(_thread(agent["requests"], start, session, block_size, numbers))
        if thread:
            wait = max(0.0, start - caller.began - caller.lasted)
            thread[0].request = replace(thread[0].request, after=caller.request.number, think_seconds=wait)
        turns += thread
    return turns


def _thread(
    rows: list[dict[str, Any]], start: float, session: str, block_size: int, numbers: "count[int]"
) -> Iterator[Turn]:
    before: Turn | None = None
    for row in rows:
        prompt, ids = (
            tokens(row["in"]),
            tuple((int(first), tokens(length)) for first, length in row["hash_runs"]),
        )
        if sum(length for _, length in ids) * block_size > prompt + block_size - 1:
            raise ValueError(f"hash_runs cover more than a prompt of {prompt} tokens")
        began = start + seconds(row["t"])
        request = TraceRequest(
            number=next(numbers),
            session=session,
            arrival=began,
            prompt_tokens=prompt,
            output_tokens=max(1, tokens(row["out"], least=0)),  # a server cannot generate nothing
            block_runs=ids,
            block_size=block_size,
            after=before.request.number if before else None,
            think_seconds=_think_seconds(row, began, before) if before else 0.0,
        )
        before = Turn(began, seconds(row["api_s"] or 0.0), request)  # None: not recorded
        yield before


def _think_seconds(row: dict[str, Any], began: float, before: Turn) -> float:
    """As recorded, else by the times of both requests."""
    if row["think_s"] is None:
        return max(0.0, began - before.began - before.lasted)
    return seconds(row["think_s"])
