"""What a policy has decided, and why: data for people. Whoever carries it out is elsewhere (engine/scheduler.py)."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    ADMITTED = "admitted"
    HELD_BACK = "held_back"  # there is room now, but what runs is expected to need it
    PROMOTED = "promoted"
    PREEMPTED = "preempted"
    SAVED_AHEAD = "saved_ahead"  # it runs, but is likely to be preempted soon
    SPARED = "spared"  # it lacks blocks, but waits for somebody's end rather than preempt
    PLACED = "placed"  # at a replica
    MIGRATED = "migrated"  # to another replica
    STAYED = "stayed"  # a migration failed: it goes on where it was
    RESUMED = "resumed"  # its KV is on the device again
    LOAD_FAILED = "load_failed"
    REPRIORITISED = "reprioritised"  # an operator wants it to be more urgent, or less


@dataclass(frozen=True, slots=True)
class Alternative:
    """Something that could have been done. `price`: weighted seconds, comparable within one decision."""

    name: str
    price: float


@dataclass(frozen=True, slots=True)
class Decision:
    """`seconds`: predicted for what was chosen, or measured where `kind` tells of something that is over."""

    kind: Kind
    policy: str  # the policy's name; "" where no policy had a say
    chosen: str
    reason: str
    seconds: float | None = None
    alternatives: tuple[Alternative, ...] = ()  # what was chosen is among them
