"""What the scheduler counts, for metrics. Who reads it: app/metrics.py, simulation.py."""

from collections import Counter
from dataclasses import dataclass, field, fields, replace


@dataclass(slots=True)
class Counts:
    """What has happened since the start."""

    prompt_tokens: int = 0  # of requests admitted, each counted once
    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the tiers, and of these …
    prefix_hits: int = 0  # … found, both at first admissions alone
    reload_failures: int = 0
    saved_ahead_blocks: int = 0  # of running sequences, as they were likely to be preempted
    preemptions_by: Counter[str] = field(
        default_factory=Counter
    )  # by the victim policy, or "displaced", "operator"
    promotions: Counter[str] = field(default_factory=Counter)  # by reason
    hit_tokens: Counter[str] = field(default_factory=Counter)  # by tier, at every admission
    resumptions: Counter[tuple[str, str]] = field(
        default_factory=Counter
    )  # by way, and the lowest tier it took from

    def add(self, other: "Counts") -> None:
        """Another replica's too."""
        for each in fields(self):
            mine, its = getattr(self, each.name), getattr(other, each.name)
            setattr(self, each.name, mine + its)

    def copy(self) -> "Counts":
        return replace(
            self,
            preemptions_by=self.preemptions_by.copy(),
            promotions=self.promotions.copy(),
            hit_tokens=self.hit_tokens.copy(),
            resumptions=self.resumptions.copy(),
        )
