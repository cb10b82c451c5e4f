"""What each tenant has been served: virtual token counters, for orders that are fair between them.

A prompt's token counts once, a generated one twice, each divided by the weight of its request. A tenant that comes back
from having nothing to do starts at the least counter of those that have, so idleness saves nothing up.
Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI'24.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.plan import Row
from engine.sequence import Sequence

OUTPUT_WEIGHT = 2.0

KEPT = 10_000
"""Counters that are kept of tenants without requests; those of the least served go first."""


@dataclass(slots=True)
class Counters:
    """Of all replicas, by tenant."""

    service: dict[str, float] = field(default_factory=dict)
    active: Counter[str] = field(default_factory=Counter)  # sequences not finished


class Tenants:
    """Of one replica. `counters`: those that it shares with the others."""

    def __init__(self, counters: Counters) -> None:
        self.served = 0  # tokens computed for anybody here
        self.service = counters.service  # sequences look here for their own tenant's
        self._active = counters.active

    def arrive(self, tenant: str) -> None:
        """A sequence of this tenant begins to wait for the first time."""
        if not self._active[tenant]:
            least = min((self.service[other] for other in self._active), default=0.0)
            self.service[tenant] = max(least, self.service.get(tenant, 0.0))
        self._active[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A sequence of this tenant has ended."""
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            if len(self.service) > len(self._active) + KEPT:
                self._forget()

    def serve(self, step: Iterable[tuple[Sequence, Row]]) -> None:
        """Their rows are computed for them."""
        service, served = self.service, 0
        for sequence, row in step:
            tokens = len(row.tokens)
            served += tokens
            counted = OUTPUT_WEIGHT if tokens == 1 and row.samples else tokens
            service[sequence.tenant] += counted / sequence.weight
        self.served += served

    def _forget(self) -> None:
        idle = sorted(
            (served, tenant) for tenant, served in self.service.items() if tenant not in self._active
        )
        for _, tenant in idle[: len(idle) // 2]:
            del self.service[tenant]
