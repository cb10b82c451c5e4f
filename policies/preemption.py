"""Victims: which running sequence gives up its blocks when the pool runs out."""

from collections.abc import Callable, Sequence

from policies.views import SequenceView

Victim = Callable[[Sequence[SequenceView]], SequenceView]


def last_admitted(running: Sequence[SequenceView]) -> SequenceView:
    """The sequence admitted last. Admissions are numbered, so there are no ties.

    Assumes that the newest has the least to lose, which is wrong for a long prompt just computed. Worst case: the
    same newcomer is admitted and thrown out again and again. Source: vLLM's scheduler.
    """
    return max(running, key=lambda sequence: sequence.admitted_as)


VICTIMS: dict[str, Victim] = {"last_admitted": last_admitted}
