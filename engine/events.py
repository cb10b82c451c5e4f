"""The core's alphabet: events go in, instructions come out. Plain data, so that a run can be recorded and replayed.

Copies between tiers and timers join these when the tiers do.
"""

from dataclasses import dataclass

from engine.plan import Plan, StepResult
from engine.request import Delta, Finished, Request


@dataclass(frozen=True, slots=True)
class Arrived:
    """A client's request. Its `n` choices become as many sequences."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client left, or an operator ended the request. Unknown and finished ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """The runner finished a step. Steps end in the order in which they were told."""

    result: StepResult


Event = Arrived | Cancelled | StepDone


@dataclass(frozen=True, slots=True)
class Run:
    """Launch this step."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand this news to the client."""

    request_id: str
    delta: Delta


@dataclass(frozen=True, slots=True)
class Reject:
    """The request was not taken. `code` is the API's: queue_full, context_length_exceeded, …"""

    request_id: str
    code: str
    message: str
    param: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """A sequence has ended: its accounts, for logs and metrics."""

    finished: Finished


@dataclass(frozen=True, slots=True)
class Account:
    """What a finished step did, beyond its tokens, for logs and metrics. Counts are of this step alone."""

    step: int
    rows: int
    prefill_tokens: int  # positions computed in rows longer than one token, or short of the sequence's end
    decode_tokens: int
    recomputed_tokens: int  # of these positions, computed once before
    sampled_tokens: int  # without those of void rows: what clients get
    seconds: float
    gil_seconds: float


Instruction = Run | Emit | Reject | Report | Account
