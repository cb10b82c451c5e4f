"""When a waiter goes before all others, whatever the order says: parameters that every order has.

Promoted waiters stand before all others, among themselves by arrival, and may displace any runner that arrived
later. Which of them are, and since when, is the line's to know (engine/waiting.py); here are the thresholds.
"""

from dataclasses import dataclass, fields

from policies.views import SequenceView


@dataclass(frozen=True)
class Promotion:
    """Thresholds; 0 turns one off. Reasons: "wait", "service", "demotions", "resume_price", "kv_held".

    `wait_seconds` and `service_tokens` are watched while a sequence waits, by the line itself: it is promoted when
    so many seconds have passed, or when so many tokens have been computed for anybody, since it began to wait. The
    others are looked at once, when a preempted sequence begins to wait (`reason_at_enqueue`).

    Service bound, for every spell of waiting, by `service_tokens`: those that came later are computed no more than
    `service_tokens` + 2 × `max_batch_tokens` tokens before the waiter is given its place: the threshold is seen when
    the next step is made, and room may be there a step later. Earlier arrivals are not in the bound: by arrival they
    were first. A spell goes on where its waiter is moved to, with what was computed for anybody before it moved.
    Assumes a scheduler that makes room for a promoted waiter at the cost of later arrivals.

    Worst case: thresholds below what a busy hour's waiters see as a matter of course; then all are promoted, and
    every order is `fcfs`. The default is some minutes of a saturated small device, or about one of a large one.
    Source: FastServe promotes by wait (Wu et al., 2023), as multi-level queues have since CTSS (Corbató et al.,
    1962). Counting service instead of seconds is ours: the bound then holds at any speed.
    """

    wait_seconds: float = 0.0
    service_tokens: int = 1_000_000
    demotions: int = 0  # times it has been preempted
    resume_seconds: float = 0.0  # predicted price of bringing it back
    kv_blocks_tokens: int = 0  # positions kept for it, which eviction may take while it waits

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) >= 0:
                raise ValueError(f"{each.name} must not be negative")

    def reason_at_enqueue(self, view: SequenceView, /) -> str | None:
        """Why it is promoted as it begins to wait, if it is. Of several reasons, the first of the fields' order."""
        if not view.preemptions:
            return None
        if 0 < self.demotions <= view.preemptions:
            return "demotions"
        if 0 < self.resume_seconds <= view.resume_seconds:
            return "resume_price"
        if 0 < self.kv_blocks_tokens <= view.kept_tokens:
            return "kv_held"
        return None
