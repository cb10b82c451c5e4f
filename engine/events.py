"""The core's alphabet: events go in, instructions come out. Plain data, so that a run can be recorded and replayed.

What concerns bytes (copies, their ends, tiers that come and go) is defined in kvstore/copies.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

from engine.plan import Plan, StepResult
from engine.request import Delta, Finished, Request, ServiceClass
from kvstore.copies import Copy, CopyDone, Drop, TierDown, TierUp
from policies.decisions import Decision


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
    """A replica's runner finished a step. Steps end in the order in which they were told."""

    result: StepResult
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Preempted:
    """An operator wants a request to give its place up now. It waits again, and comes back in its turn."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Reprioritised:
    """An operator wants a request to be as urgent as this from now on. Unknown and finished ids are ignored."""

    request_id: str
    priority: int
    service: ServiceClass


@dataclass(frozen=True, slots=True)
class Pruned:
    """An operator wants a tier to keep at most `blocks`, the rest evicted by the policy; 0 forgets all that is idle.

    The device tier forgets its idle blocks whatever `blocks` says.
    """

    tier: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Damaged:
    """A verification has found records of a tier that cannot be read: they are dropped, and computed again."""

    tier: str
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class PoliciesChanged:
    """An operator wants other policies: (family, name) each, of those that were loaded at start."""

    names: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Migrated:
    """An operator wants a request to go on at another replica; None: wherever it costs least."""

    request_id: str
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class Drained:
    """An operator wants a replica to take nothing more, and its requests to go on elsewhere; or to take some again."""

    replica: int
    draining: bool


@dataclass(frozen=True, slots=True)
class ReplicaDown:
    """A replica's device is given up. Its requests go on elsewhere, from what of them lies below the device."""

    replica: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaUp:
    """A replica has a device again, empty."""

    replica: int


@dataclass(frozen=True, slots=True)
class Timer:
    """Time has passed: loads are compared, and migrations that take too long given up."""


Event = (
    Arrived
    | Cancelled
    | StepDone
    | Preempted
    | Reprioritised
    | Pruned
    | Damaged
    | PoliciesChanged
    | CopyDone
    | TierDown
    | TierUp
    | Migrated
    | Drained
    | ReplicaDown
    | ReplicaUp
    | Timer
)


@dataclass(frozen=True, slots=True)
class Run:
    """Launch this step."""

    plan: Plan


class Emit(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class Decided:
    """Why something happens to a sequence: for its timeline."""

    request_id: str
    choice: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class Resumed:
    """A preempted sequence has all its KV on the device again. `tier`: the lowest that it took from."""

    request_id: str
    way: str
    tier: str
    predicted_seconds: float
    actual_seconds: float
    regret_seconds: float | None  # actual − the best predicted alternative; None: there was no other way


@dataclass(frozen=True, slots=True)
class PolicyFailed:
    """A plug-in raised or returned nonsense; the plainest policy of its family decided in its place."""

    family: str
    name: str
    what: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Of a live migration: from when the source stops its sequence, which may be in a step still, until the target
    runs it."""

    seconds: float = 0.0
    steps: int = 0  # of the source's, that it would have been in
    transfer_seconds: float = 0.0  # of these, its last blocks and its tail were on their way
    transfer_steps: int = 0


@dataclass(frozen=True, slots=True)
class MigrationOver:
    """A request's choice has moved, or goes on at its source because of `failure`. For logs and metrics."""

    request_id: str
    choice: int
    source: int
    target: int  # the source, where none was found
    reason: str  # one of moves.REASONS
    failure: str  # "" where it has moved
    live: bool  # it ran, and went on without giving up its place before
    seconds: float
    pause: Pause
    detail: str = ""  # to the reason, for people


Instruction = (
    Run | Emit | Reject | Report | Account | Decided | Resumed | PolicyFailed | MigrationOver | Copy | Drop
)
