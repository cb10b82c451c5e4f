"""Which replica is for which sizes: limits as configured, or learned from the sizes that sequences end with. Pure.

Where a request goes by its size is the routing policy's, who moves up the rebalancing policy's. How limits are drawn:
policies/sizes.py.
"""

from collections.abc import Sequence
from math import inf

from engine.member import Member
from policies.sizes import SizeLimits


class SizeClasses:
    """`auto`: limits are learned, and what is configured only says which replicas are of one class, and their order.

    Classes are, the smallest sizes first: replicas with equal limits, those without one last; where nobody has a
    limit, `burst` replicas and all others; where all have one role too, each replica by itself. A class is to carry
    its share of the load as its devices have KV.
    """

    def __init__(self, members: Sequence[Member], *, auto: bool) -> None:
        self._members = members
        kinds = [_kind(member, members) for member in members]
        order = sorted(set(kinds))
        self._class_of = [order.index(kind) for kind in kinds]
        self._limits: SizeLimits | None = None
        if auto and len(order) > 1:
            shares = [0.0] * len(order)
            for number, member in zip(self._class_of, members, strict=True):
                shares[number] += member.capacity_tokens
            self._limits = SizeLimits(shares)

    def observe(self, prompt_tokens: int, output_tokens: int) -> None:
        """A sequence has ended by itself with so many."""
        if self._limits is not None:
            self._limits.observe(prompt_tokens, output_tokens)

    def draw(self) -> None:
        """Members have the limits that are known now."""
        if self._limits is not None:
            limits = self._limits.limits
            for number, member in zip(self._class_of, self._members, strict=True):
                member.limit_tokens = limits[number]


def _kind(member: Member, members: Sequence[Member]) -> tuple[float, int]:
    if any(each.limit_tokens for each in members):
        return member.limit_tokens or inf, 0
    if len({each.role for each in members}) > 1:
        return inf, int(member.role != "burst")
    return inf, member.number
