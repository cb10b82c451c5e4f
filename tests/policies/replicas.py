"""Replicas and what may be moved between them, made by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from policies.routing import Placed, Routing


@dataclass(frozen=True)
class Candidate:
    """Implements policies.views.CandidateView: an idle replica, and a request of 100 prompt tokens."""

    number: int
    role: str = "any"
    limit_tokens: int = 0
    capacity_tokens: int = 10_000
    used_tokens: int = 0
    requests: int = 0
    placed: int = 0
    charged_seconds: float = 0.0
    backlog_seconds: float = 0.0
    forecast_tokens: float = 0.0
    waiting: int = 0
    prompt_tokens: int = 100
    size_tokens: float = 150.0
    urgent: bool = False
    cached_tokens: int = 0
    prefill_seconds: float = 1.0
    saved_seconds: float = 0.0
    decode_seconds: float = 1.0
    ahead_seconds: float = 0.0
    behind_seconds: float = 0.0
    disturbed_seconds: float = 0.0
    session_home: bool = False

    def charged(self, seconds: float, tokens: float = 0.0) -> "Candidate":
        """With one request more."""
        return replace(
            self,
            requests=self.requests + 1,
            placed=self.placed + 1,
            charged_seconds=self.charged_seconds + seconds,
            backlog_seconds=self.backlog_seconds + seconds,
            forecast_tokens=self.forecast_tokens + tokens,
        )


def place_all(
    policy: Routing, replicas: Sequence[Candidate], seconds: Sequence[float], tokens: float = 0.0
) -> list[Placed]:
    """Requests of so many seconds, one after the other, each charged where it is placed; none ends."""
    replicas = list(replicas)
    placed = []
    for each in seconds:
        placed.append(policy([replace(replica, decode_seconds=each) for replica in replicas]))
        replicas = [
            replica.charged(each, tokens) if replica.number == placed[-1].replica else replica
            for replica in replicas
        ]
    return placed


@dataclass(frozen=True)
class Load:
    """Implements policies.rebalancing.LoadView."""

    number: int
    backlog_seconds: float = 0.0
    role: str = "any"
    limit_tokens: int = 0
    capacity_tokens: int = 10_000
    used_tokens: int = 0
    slots_left: int = 100
    accepting: bool = True
    waiting: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Movable:
    """Implements policies.rebalancing.MovableView."""

    request: str
    replica: int
    load_seconds: float = 1.0
    choice: int = 0
    tokens: int = 100
    size_tokens: float = 150.0
    remaining_tokens: float = 50.0
    cost_seconds: float = 0.0
    moves: int = 0
    moved_at: float = -inf
    waits: bool = False
    crossed: bool = False
    disturbs_seconds: float = 0.0
