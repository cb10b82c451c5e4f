"""Who goes first: a static sort key per sequence, lowest first. Waiters stand in a heap, so keys must not change."""

from collections.abc import Callable

from policies.views import SequenceView

Order = Callable[[SequenceView], tuple[float, ...]]


def fcfs(sequence: SequenceView) -> tuple[float, ...]:
    """First come, first served. A preempted sequence keeps its place, so it goes before all later arrivals.

    Service bound: no later arrival is admitted before a waiter, but for one whose next block a running sequence is
    computing: the scheduler passes that over until the block is there. Worst case: one long prompt at the head keeps
    all behind it waiting, room or not. Source: vLLM's default order.
    """
    return (sequence.number,)


ORDERS: dict[str, Order] = {"fcfs": fcfs}
