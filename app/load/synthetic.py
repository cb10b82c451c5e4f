"""A workload of made-up lengths: sessions of one or more turns, over a shared beginning where one is wanted.

It is a trace like a recorded one; of files: app/workload/formats.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from random import Random

from app.workload.drawing import Drawing
from app.workload.trace import TraceRequest, in_order

BLOCK_TOKENS = 16
"""Of the made-up blocks: what is shared is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, random: Random) -> int:
        return random.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """`input`: of an opening prompt, beyond what is shared. `turn_input`: what each further turn's user adds."""

    sessions: int
    input: Lengths
    output: Lengths
    turns: int = 1
    turn_input: Lengths = Lengths(32, 32)
    think_seconds: float = 1.0
    shared_tokens: int = 0  # with which all prompts begin


def synthetic(what: Synthetic, drawing: Drawing) -> list[TraceRequest]:
    """All sessions open at 0: arrivals are drawn after (transform.retimed). The same for the same seed."""
    numbers = count()
    shared = what.shared_tokens // BLOCK_TOKENS
    requests: list[TraceRequest] = []
    first = shared
    for session in range(what.sessions):
        turns = list(_session(what, session, shared, first, drawing, numbers))
        first = sum(turns[-1].block_runs[-1])
        requests += turns
    return in_order(requests)


def _session(
    what: Synthetic, session: int, shared: int, first: int, drawing: Drawing, numbers: "count[int]"
) -> Iterator[TraceRequest]:
    """Each turn's prompt is the one before it, its answer and new words."""
    random = drawing.random("session", session)
    prompt, before = shared * BLOCK_TOKENS, None
    for turn in range(what.turns):
        prompt += (what.turn_input if turn else what.input).draw(random)
        output = what.output.draw(random)
        own = -(-prompt // BLOCK_TOKENS) - shared
        request = TraceRequest(
            number=next(numbers),
            session=str(session),
            arrival=0.0,
            prompt_tokens=prompt,
            output_tokens=output,
            block_runs=((0, shared), (first, own)) if shared else ((first, own),),
            block_size=BLOCK_TOKENS,
            after=before,
            think_seconds=what.think_seconds if turn else 0.0,
        )
        yield request
        prompt, before = prompt + output, request.number
