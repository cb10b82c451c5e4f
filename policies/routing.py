"""Which replica a request is placed on: one score in seconds, the lowest wins.

The score is the work that the request adds (prefill and decode), less the prefill that the replica's device saves,
plus the load that is there. Each part has a named weight; a routing policy is a choice of weights and nothing else.

- *Saturated*: sequences wait there, or what it is expected to hold and the request's size are beyond its capacity.
  Such a replica gets no credit for its cache and its sessions. So a hot prefix spills to other replicas, which then
  have it too, rather than pile up where it was first. A replica where nothing is held is not saturated.
- *Headroom*: for a request that is not urgent, a share of every capacity counts as taken.
- *Pools*: sizes above the `burst` replicas' limit belong to the `long` ones, the others to `burst`; `any` takes both.
  Of replicas of one role with several limits, a size belongs to the smallest that it fits in. When all replicas that
  a request belongs to are saturated, it spills to those that are not, either way.
- A prompt that a device can never hold has an infinite score there.

Ties, under all weights: fewer requests, then fewer ever placed, then the lowest number. The same candidates give the
same answer. How sequences move later: rebalancing.py. What a replica is expected to hold: forecast.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Protocol

from policies.decisions import Alternative
from policies.views import CandidateView

DECISIVE = 1e6
"""A weight that no load outweighs."""

HEADROOM = 0.1


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a request goes. `alternatives`: one a replica, named "replica N", `price` its score."""

    replica: int
    score: float
    reason: str
    alternatives: tuple[Alternative, ...]


class Routing(Protocol):
    def __call__(self, candidates: Sequence[CandidateView], /) -> Placed:
        """One of `candidates`, which are not empty."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a second of each part counts; 0 leaves it out. None is negative: the score knows which are credits."""

    work: float = 0.0  # prefill of the whole prompt, and its decode steps in that replica's batch
    saved: float = 0.0  # credit: prefill that the device's cached tokens save
    session: float = 0.0  # credit: prefill of the whole prompt, where its session was last
    charged: float = 0.0  # what was charged for those there when they were placed
    backlog: float = 0.0  # what all that are there are predicted to take yet
    wait: float = 0.0  # the backlog, for as much of the request as lacks room
    ahead: float = 0.0  # what is computed before its prompt
    behind: float = 0.0  # what its prefill delays those who wait for their first tokens
    disturbed: float = 0.0  # what its prefill, and its rows, delay those who have a place
    misplaced: float = 0.0  # a second where it does not belong by its size
    turns: float = 0.0  # a second for each request ever placed there

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) >= 0:
                raise ValueError(f"{each.name} must not be negative")


@dataclass(frozen=True, slots=True)
class Scored:
    """The routing policy of these weights. `headroom`: share of a capacity kept for the urgent, from 0 to below 1."""

    weights: Weights
    headroom: float = HEADROOM

    def __post_init__(self) -> None:
        if not 0.0 <= self.headroom < 1.0:
            raise ValueError("headroom must be at least 0 and below 1")

    def __call__(self, candidates: Sequence[CandidateView], /) -> Placed:
        return route(candidates, self.weights, self.headroom)


ROUND_ROBIN = Weights(turns=1.0)
"""Each replica in turn: the one on which fewest requests were ever placed.

Assumes requests and replicas that are alike. Worst case: every m-th request is a long one, and all of these meet;
and one replica that comes new gets all requests until it has had as many. Source: as old as queues.
"""

LEAST_LOAD = Weights(charged=1.0)
"""The least charged load, greedily.

Assumes that what is charged is what it costs, on devices that are alike. Worst case: 2 - 1/m times the least possible
makespan on m replicas, whatever the order of arrival: many small ones, spread evenly, and then a large one.
Source: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969.
"""

PREDICTED_LOAD = Weights(work=1.0, backlog=1.0)
"""The least backlog after it is placed, each replica's as predicted now: what has run for long is known better by then.

Assumes predictions that are right in the sum. Worst case: a prediction that is wrong the same way for all of one
replica; then all goes there, until it learns. Source: greedy again (see LEAST_LOAD), on unlike machines by
completion time; its error is the predictor's.
"""

CACHE_AWARE = Weights(saved=DECISIVE, backlog=1.0)
"""Where the device's cache saves most, whatever the load, until that replica is saturated; else the least backlog.

Assumes that prefill is what costs. Worst case: one prefix that all share: a replica is filled before the next is
asked, so time per token is high on one and low on the others. Source: longest prefix match across replicas, as in
SGLang's cache-aware router (2024) and Preble (Srivatsa et al., 2024).
"""

SESSION = Weights(session=DECISIVE, backlog=1.0)
"""Where the session's last request was, until that replica is saturated; else, and for new ones, the least backlog.

Assumes sessions that are alike. Worst case: a few long sessions meet on a replica and stay. Source: the sticky
sessions of web load balancers.
"""

SIZE_CLASSES = Weights(misplaced=DECISIVE, backlog=1.0)
"""By its size (see *Pools* above); within the replicas that it belongs to, the least backlog.

Assumes sizes that can be predicted, and limits under which classes carry load as they have room (sizes.py). Worst
case: a day whose sizes are of one class: replicas idle until the others are saturated. Source: size intervals,
Harchol-Balter, Crovella and Murta, "On Choosing a Task Assignment Policy for a Distributed Server System", 1999.
"""

HYBRID = Weights(
    work=1.0,
    saved=6.0,
    session=0.1,
    ahead=1.0,
    behind=3.0,
    disturbed=0.1,
    wait=1.0,
    backlog=0.3,
    misplaced=DECISIVE,
)
"""All in seconds: what the request takes there, and what it takes from those there.

It waits for prompts that are computed before its own, and for room. Its prefill, less what the cache saves, delays the
first tokens of those who wait there. Each of them counts three times: for itself, and for those who come before the
line is empty, who are delayed as well. Where prompts take a share r of the device's time, one who waits stands for
1 / (1 - r), and r is about two thirds on devices that are well used. That and its rows in their steps delay all who
have a place; a tenth of it counts, as it is spread over their answers. So a cached prefix is worth more where many
are, long prompts go to where few are, and short ones keep away from these. What a cache saves counts six times: who
comes where its prefix is leaves the room elsewhere to other prefixes, and its next turn finds it there as well. The
backlog counts a third: the rest of it is in the other parts. The session's home counts a tenth of the prefill beside:
the last turn's blocks may be there soon.

Assumes an order by which short ones go before long ones (policies/order.py), and seconds that are about right beside
each other; an error common to all replicas changes nothing. Worst case: long prompts alone; they meet where fewest
are, and wait for each other. Source: ours; a newcomer is charged for those whom it delays, as in Naor, "The Regulation
of Queue Size by Levying Tolls", 1969; weighing cache against load in one cost is Preble's and Dynamo's (NVIDIA, 2025).
"""

ROUTINGS: Mapping[str, Scored] = {
    "hybrid": Scored(HYBRID),
    "round_robin": Scored(ROUND_ROBIN),
    "least_load": Scored(LEAST_LOAD),
    "predicted_load": Scored(PREDICTED_LOAD),
    "cache_aware": Scored(CACHE_AWARE),
    "session": Scored(SESSION),
    "size_classes": Scored(SIZE_CLASSES),
}


def route(
    candidates: Sequence[CandidateView], weights: Weights = HYBRID, headroom: float = HEADROOM
) -> Placed:
    """The candidate with the lowest score, and why. O(n); `candidates` are not empty."""
    own = belonging(candidates)
    has_room = any(each.number in own and not saturated(each, headroom) for each in candidates)
    scores = [_Score(each, weights, headroom, each.number in own, has_room) for each in candidates]
    scores.sort(key=_Score.rank)
    prices = tuple(Alternative(f"replica {each.number}", each.total) for each in scores)
    return Placed(scores[0].number, scores[0].total, _reason(scores), prices)


class _Score:
    """The weighted parts of one candidate's score, and what it forfeits because it is saturated."""

    __slots__ = ("forfeited", "number", "parts", "spills", "total", "view")

    def __init__(
        self, view: CandidateView, weights: Weights, headroom: float, belongs: bool, pool_has_room: bool
    ) -> None:
        full = saturated(view, headroom)
        misplaced = not belongs and (pool_has_room or full)
        credit = {
            "saved": weights.saved * view.saved_seconds,
            "session": weights.session * view.prefill_seconds if view.session_home else 0.0,
        }
        self.view, self.number = view, view.number
        self.spills = weights.misplaced > 0 and not belongs and not misplaced
        self.forfeited = sum(credit.values()) if full else 0.0
        self.parts = {
            "capacity": inf if view.prompt_tokens >= view.capacity_tokens else 0.0,
            "misplaced": weights.misplaced if misplaced else 0.0,
            "work": weights.work * (view.prefill_seconds + view.decode_seconds),
            "charged": weights.charged * view.charged_seconds,
            "backlog": weights.backlog * view.backlog_seconds,
            "wait": weights.wait * wait_seconds(view, headroom),
            "ahead": weights.ahead * view.ahead_seconds,
            "behind": weights.behind * view.behind_seconds,
            "disturbed": weights.disturbed * view.disturbed_seconds,
            "turns": weights.turns * view.placed,
            **{name: 0.0 if full else -seconds for name, seconds in credit.items()},
        }
        self.total = sum(self.parts.values())

    def rank(self) -> tuple[float, int, int, int]:
        return self.total, self.view.requests, self.view.placed, self.number


def belonging(candidates: Sequence[CandidateView]) -> set[int]:
    """The numbers of the replicas that the request belongs to by its size.

    A pool without its counterpart takes all sizes; a size above all limits of a role belongs to its largest.
    """
    bursts = [_limit(each) for each in candidates if each.role == "burst"]
    longs = any(each.role == "long" for each in candidates)
    size = candidates[0].size_tokens
    pool = "long" if longs and size > max(bursts, default=0.0) else "burst"
    found: set[int] = set()
    for role in ("any", pool):
        members = [each for each in candidates if each.role == role]
        limits = {_limit(each) for each in members}
        smallest = min((limit for limit in limits if limit >= size), default=max(limits, default=0.0))
        found.update(each.number for each in members if _limit(each) == smallest)
    return found


def saturated(view: CandidateView, headroom: float) -> bool:
    """Whether the request would wait there, or make others wait."""
    return view.waiting > 0 or _lacking(view, headroom) > 0


def wait_seconds(view: CandidateView, headroom: float) -> float:
    """The backlog, for as much of the request as has no room: what ends sooner is not in the forecast any more."""
    lacking = _lacking(view, headroom)
    return view.backlog_seconds * min(1.0, lacking / view.size_tokens) if lacking else 0.0


def _lacking(view: CandidateView, headroom: float) -> float:
    """KV positions; 0 where nothing is held, as there is nothing to wait for."""
    if view.forecast_tokens <= 0:
        return 0.0
    room = view.capacity_tokens * (1.0 if view.urgent else 1.0 - headroom)
    return max(0.0, view.forecast_tokens + view.size_tokens - room)


def _limit(view: CandidateView) -> float:
    return view.limit_tokens or inf


def _reason(scores: Sequence[_Score]) -> str:
    """What decided: of the first beside the second, unless it was somebody's being saturated."""
    best, *others = scores
    if best.total == inf:
        return "no device could hold its prompt"
    if not others:
        return "the only replica"
    if best.spills:
        return "those for its size are saturated"
    wanted = min(others, key=lambda each: each.total - each.forfeited)
    if wanted.total - wanted.forfeited < best.total - best.forfeited:
        return f"replica {wanted.number}, which has its prefix or session, is saturated"
    second = others[0]
    if second.total == best.total:
        return _tie(best, second)
    decided = max(best.parts, key=lambda part: second.parts[part] - best.parts[part])
    return _REASONS[decided].format(view=best.view)


_REASONS = {
    "capacity": "no other device could hold its prompt",
    "misplaced": "it is for such sizes",
    "work": "least work added",
    "charged": "least load charged",
    "backlog": "least load predicted",
    "wait": "room soonest",
    "ahead": "least to be computed before",
    "behind": "its prefill delays least who waits",
    "disturbed": "its prefill delays others least",
    "turns": "its turn",
    "saved": "{view.cached_tokens} of {view.prompt_tokens} prompt tokens are on its device",
    "session": "its session was there",
}


def _tie(best: _Score, second: _Score) -> str:
    if best.view.requests != second.view.requests:
        return "a tie: fewest requests"
    return "a tie: fewest ever placed" if best.view.placed != second.view.placed else "a tie: lowest number"
