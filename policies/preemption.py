"""Victims: which running sequence gives up its blocks when the pool runs out.

A policy is a sort key over (view, offer): the sequence with the lowest key goes. `offer` prices a victim when it is
asked to, and only then, since that is the dear part.
"""

from collections.abc import Callable
from typing import Protocol

from policies.views import SequenceView


class Offer(Protocol):
    """What the others get if a sequence goes."""

    @property
    def frees(self) -> int:
        """Blocks that only it holds."""

    @property
    def price(self) -> float:
        """Weighted seconds of its way back per block freed (policies/pricing.py); infinite when it frees nothing."""


Victim = Callable[[SequenceView, Offer], tuple[float, ...]]


def cheapest_resume(view: SequenceView, offer: Offer) -> tuple[float, ...]:
    """The one whose way back costs least per block that it frees. Ties: the newest admission.

    Assumes that the cost model is about right: an error that is the same for all changes nothing. Worst case: prices
    all alike, and the order among them is by chance of lengths; each preemption raises the next price of its victim,
    so nobody is chosen again and again. Source: ours.
    """
    return (offer.price, -view.admitted_as)


def last_admitted(view: SequenceView, offer: Offer) -> tuple[float, ...]:
    """The sequence admitted last. Admissions are numbered, so there are no ties.

    Assumes that the newest has the least to lose, which is wrong for a long prompt just computed. Worst case: the
    same newcomer is admitted and thrown out again and again. Source: vLLM's scheduler.
    """
    return (-view.admitted_as,)


def fewest_output(view: SequenceView, offer: Offer) -> tuple[float, ...]:
    """The one that has generated least; among these the longest prompt, then the newest admission.

    Assumes that output is what is lost. Worst case: a long prompt is computed again for one token of output.
    Source: SGLang's retraction of requests in decode.
    """
    return (view.output_tokens, -view.prompt_tokens, -view.admitted_as)


def least_computed(view: SequenceView, offer: Offer) -> tuple[float, ...]:
    """The one with the fewest positions computed; among these the newest admission.

    Assumes that what comes back is computed again. Worst case: it frees hardly anything, so many go.
    Source: the proposal of vllm#53723.
    """
    return (view.computed_tokens, -view.admitted_as)


def lowest_priority(view: SequenceView, offer: Offer) -> tuple[float, ...]:
    """The least urgent class, then the highest priority number, then the newest admission.

    Assumes that clients' priorities are honest. Worst case: one low-priority sequence gives way to everybody.
    Source: vLLM's priority scheduling.
    """
    return (-view.class_rank, -view.priority, -view.admitted_as)


VICTIMS: dict[str, Victim] = {
    "cheapest_resume": cheapest_resume,
    "last_admitted": last_admitted,
    "fewest_output": fewest_output,
    "least_computed": least_computed,
    "lowest_priority": lowest_priority,
}
