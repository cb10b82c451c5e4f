"""What one step computes, and what comes of it: the only language the core and a runner share.

A runner keeps a little state per *slot* (block table, sampling parameters, last sampled token), so a plan
carries only what changed since the slot's last row. Nothing here knows torch.

What is made once a row of every step is a named tuple: made in a quarter of a frozen dataclass's time.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

PENDING = -1
"""A token id not known yet: the one that the slot's previous row, still under way, is about to sample."""

LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0
"""Bounds of a repetition penalty: logits that are multiplied or divided by it stay finite."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's next token is drawn. Noise is a function of (seed, choice, position, token id) alone."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off
    seed: int = 0  # 0 <= seed < 2**64
    choice: int = 0  # which of a request's n choices
    logprobs: int | None = None  # None: none; 0: the drawn token's; k: the k likeliest too
    suppressed: tuple[int, ...] = ()  # ids never drawn before position `suppressed_until` (min_tokens)
    suppressed_until: int = 0  # a token drawn for a position below this is not one of `suppressed`
    repetition_penalty: float = 1.0  # 1 is off
    frequency_penalty: float = 0.0  # 0 is off
    presence_penalty: float = 0.0  # 0 is off
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id and what is added to its logit, each id once

    @property
    def penalises(self) -> bool:
        """Whether a draw depends on the tokens so far."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


@dataclass(frozen=True, slots=True)
class Placement:
    """A sequence takes a slot of the runner: its block table starts empty, its sampling is this."""

    slot: int
    sampling: Sampling
    history: tuple[
        int, ...
    ] = ()  # prompt and output so far, where sampling penalises: its rows need not have it
    prompt_tokens: int = 0  # how many of the history are the prompt


class Row(NamedTuple):
    """One sequence's share of a step: compute KV for `tokens` at positions start, start + 1, …

    Before the step, `blocks` are written into the slot's block table from index `blocks_at` on (its end, when the
    sequence grew; earlier, when a block gave way to an equal one). When `samples`, the logits of the last position
    are sampled; the token drawn belongs to position start + len(tokens).
    """

    slot: int
    start: int
    tokens: tuple[int, ...]  # ids, or (PENDING,) alone
    blocks_at: int
    blocks: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step over a batch of rows, at most one a slot. Placements happen first."""

    step: int
    placements: tuple[Placement, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probabilities under the model's own distribution (before temperature and filters)."""

    logprob: float  # of the drawn token
    top: tuple[tuple[int, float], ...]  # the k likeliest (id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew: one entry for each sampling row of the plan, in the order of its rows."""

    step: int
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob | None, ...]
    seconds: float  # wall time of the step on the runner's thread
    gil_seconds: float  # of these, the time spent in Python, the interpreter lock held


class Launched(Protocol):
    """A step under way. `collect()` blocks until it is done and returns its result; call it once."""

    def collect(self) -> StepResult: ...


class Runner(Protocol):
    """Turns plans into tokens, on one thread, in the order they are launched.

    `launch` may return before the work is done (CUDA), or after all of it (CPU). A plan may be launched before
    its predecessor is collected; its PENDING tokens are then read where the predecessor leaves them.
    """

    @property
    def exact(self) -> bool:
        """Whether a position's bits never depend on its batch, its chunks or its way back (design §4.1)."""

    def launch(self, plan: Plan) -> Launched: ...
