"""The policies in force: names and parameters → instances, plug-ins guarded.

A plug-in (a policy that is not ours) may raise or return nonsense: it is then reported, and the family's plainest
policy decides in its place, for that decision alone. Ours are not guarded: their bugs must show. Where plug-ins come
from: app/plugins.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, SupportsIndex

from policies.admission import Admission
from policies.decisions import Alternative
from policies.eviction import EVICTIONS, Eviction, MakeEviction, Scored, lru
from policies.order import ORDERS, Order
from policies.placement import PLACEMENTS, Placement
from policies.prediction import PREDICTIONS, Predictor, survival_by
from policies.preemption import VICTIMS, Victim
from policies.promotion import Promotion
from policies.rebalancing import REBALANCINGS, Rebalancing, Round
from policies.resume import RECOMPUTE, RELOAD, RESUMES, SPLIT, Resume
from policies.routing import ROUTINGS, Placed, Routing

Parameters = Mapping[str, Mapping[str, Any]]
Failed = Callable[[str, str, str], None]
"""(family, policy, what it did)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Names by family, and the parameters of those that have some, by the policy's name."""

    order: str = "fcfs"
    victim: str = "last_admitted"
    resume: str = "reload"
    prediction: str = "max_tokens"
    eviction: str = "lru"
    placement: str = "write_through"
    routing: str = "least_load"
    rebalancing: str = "none"
    parameters: Parameters = field(default_factory=dict)

    def having(self, names: Mapping[str, str]) -> "PolicyConfig":
        """With other names for some families."""
        chosen = {family: names.get(family, getattr(self, family)) for family in FAMILIES}
        return PolicyConfig(**chosen, parameters=self.parameters)


FAMILIES = ("order", "victim", "resume", "prediction", "eviction", "placement", "routing", "rebalancing")
"""The scheduler asks the first four, the residency the next two, the fleet the last."""

BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "order": ORDERS,
    "victim": VICTIMS,
    "resume": RESUMES,
    "prediction": PREDICTIONS,
    "eviction": EVICTIONS,
    "placement": PLACEMENTS,
    "routing": ROUTINGS,
    "rebalancing": REBALANCINGS,
}

SIMULATED = {"oracle"}
"""These know what no server can."""

PLAINEST = {
    "order": "fcfs",
    "victim": "last_admitted",
    "resume": "reload",
    "prediction": "max_tokens",
    "eviction": "lru",
    "placement": "write_through",
    "routing": "least_load",
    "rebalancing": "none",
}
"""Who decides where a plug-in fails."""


@dataclass(frozen=True, slots=True)
class Policies:
    order: Order
    victim: Victim
    resume: Resume
    prediction: Predictor
    eviction: MakeEviction
    placement: Placement
    routing: Routing
    rebalancing: Rebalancing
    promotion: Promotion
    admission: Admission


class UnknownPolicy(Exception):
    """A name that is neither ours nor a plug-in's in the catalog."""


class Catalog:
    """All policies that may be chosen: ours, and plug-ins by dotted path, made and loaded at start only.

    `plugins`: by family and name. A plug-in keeps what it has learned while another is in force.
    """

    def __init__(self, plugins: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._plugins = plugins or {}

    def names(self, family: str) -> list[str]:
        return sorted({*BUILT_IN[family], *self._plugins.get(family, ())} - SIMULATED)

    def make(self, config: PolicyConfig, failed: Failed) -> Policies:
        """Raises TypeError for parameters that a policy has not; the configuration has checked ours."""
        return Policies(
            **{family: self._make(family, config, failed) for family in FAMILIES},
            promotion=Promotion(**config.parameters.get("promotion", {})),
            admission=Admission(**config.parameters.get("admission", {})),
        )

    def change(
        self, policies: Policies, before: PolicyConfig, after: PolicyConfig, failed: Failed
    ) -> Policies:
        """Other names for some families. The others stay as they are, with all they have learned."""
        changed = [family for family in FAMILIES if getattr(before, family) != getattr(after, family)]
        return replace(policies, **{family: self._make(family, after, failed) for family in changed})

    def _make(self, family: str, config: PolicyConfig, failed: Failed) -> Any:
        """Raises UnknownPolicy."""
        name = getattr(config, family)
        if name in BUILT_IN[family]:
            return instance(BUILT_IN[family][name], config.parameters.get(name, {}))
        if name not in self._plugins.get(family, {}):
            raise UnknownPolicy(
                f"there is no {family} policy {name!r}; a plug-in must be loaded at the start"
            )
        policy = self._plugins[family][name]
        plainest = instance(BUILT_IN[family][PLAINEST[family]], {})
        return GUARDS[family](policy, plainest, lambda what: failed(family, name, what))


def instance(policy: Any, parameters: Mapping[str, Any]) -> Any:
    """A policy is a function, or a class whose instances are called and whose parameters have defaults."""
    return policy(**parameters) if isinstance(policy, type) else policy


class Guarded:
    """A plug-in that is called. `sound`: whether an answer can be used."""

    def __init__(self, policy: Any, plainest: Any, failed: Callable[[str], None]) -> None:
        self._policy = policy
        self._plainest = plainest
        self._failed = failed

    def __call__(self, *asked: Any) -> Any:
        return self._ask(lambda policy: policy(*asked), self.sound, *asked)

    def _ask(self, question: Callable[[Any], Any], sound: Callable[..., bool], *asked: Any) -> Any:
        """The plug-in's answer to a question that is asked of a policy, or else the plainest one's."""
        try:
            answer = question(self._policy)
            if sound(answer, *asked):
                return answer
            what = f"returned {answer!r}"[:200]
        except Exception as error:  # noqa: BLE001 (whatever a plug-in raises, the engine must go on)
            what = f"raised {type(error).__name__}: {error}"[:200]
        self._failed(what)
        return question(self._plainest)

    def sound(self, answer: Any, *asked: Any) -> bool:
        """A sort key: numbers that can be compared."""
        return isinstance(answer, tuple) and all(isinstance(n, int | float) and n == n for n in answer)


class GuardedOrder(Guarded):
    def displaces(self, waiter: Any, runner: Any) -> bool:
        """False where the plug-in does not say."""
        if not hasattr(self._policy, "displaces"):
            return False
        return bool(self._ask(lambda policy: policy.displaces(waiter, runner), _is_bool))


class GuardedResume(Guarded):
    """A plug-in without `enabled` may choose among all ways."""

    @property
    def enabled(self) -> tuple[str, ...]:
        if not hasattr(self._policy, "enabled"):
            return RESUMES["cheapest"]().enabled
        return tuple(self._ask(lambda policy: policy.enabled, _are_ways))

    def sound(self, answer: Any, *asked: Any) -> bool:
        return any(answer is way for way in asked[0])


class GuardedPredictor(Guarded):
    """A length beyond what is left of max_tokens counts as that."""

    def remaining(self, view: Any) -> float:
        return self._length(view, lambda policy: policy.remaining(view))

    def quantile(self, view: Any, q: float) -> float:
        return self._length(view, lambda policy: policy.quantile(view, q))

    def _length(self, view: Any, question: Callable[[Any], Any]) -> float:
        left = max(0, view.max_tokens - view.output_tokens)
        return float(min(left, self._ask(question, _is_length)))

    def survival(self, view: Any, steps: float) -> float:
        """From its quantiles where the plug-in does not say."""
        if not hasattr(self._policy, "survival"):
            return survival_by(lambda q: self.quantile(view, q), steps)
        return float(self._ask(lambda policy: policy.survival(view, steps), _is_share))

    def observe(self, view: Any) -> None:
        self._ask(lambda policy: policy.observe(view), lambda answer: True)


class GuardedEviction(Guarded):
    """A plug-in is a score (policies/eviction.py); called, this makes the policy of one tier, as ours are made."""

    def __init__(self, policy: Any, plainest: Any, failed: Callable[[str], None]) -> None:
        super().__init__(policy, lru, failed)

    def __call__(self, *asked: Any) -> Eviction:
        return Scored(self._score)

    def _score(self, block: Any) -> tuple[float, ...]:
        answer: tuple[float, ...] = self._ask(lambda policy: policy(block), self.sound, block)
        return answer


class GuardedPlacement(Guarded):
    def sound(self, answer: Any, *asked: Any) -> bool:
        return _is_bool(answer)


class GuardedRouting(Guarded):
    def sound(self, answer: Any, *asked: Any) -> bool:
        return (
            isinstance(answer, Placed)
            and _is_one_of({each.number for each in asked[0]}, answer.replica)
            and isinstance(answer.score, int | float)
            and isinstance(answer.reason, str)
            and isinstance(answer.alternatives, tuple)
            and all(isinstance(each, Alternative) for each in answer.alternatives)
        )


class GuardedRebalancing(Guarded):
    def sound(self, answer: Any, *asked: Any) -> bool:
        if not isinstance(answer, Round):
            return False
        if not isinstance(answer.moves, tuple) or not isinstance(answer.stayed, int) or answer.stayed < 0:
            return False
        if not answer.moves:
            return True
        loads, movables, *_ = asked
        numbers, known = {each.number for each in loads}, {(each.request, each.choice) for each in movables}
        return all(
            _is_one_of(numbers, move.target) and (move.request, move.choice) in known for move in answer.moves
        )


def _is_one_of(numbers: set[int], answer: Any) -> bool:
    """1.0 is in {1}, but no index."""
    return isinstance(answer, SupportsIndex) and answer in numbers


def _is_bool(answer: Any) -> bool:
    return isinstance(answer, bool)


def _is_length(answer: Any) -> bool:
    return isinstance(answer, int | float) and isfinite(answer) and answer >= 0


def _is_share(answer: Any) -> bool:
    return _is_length(answer) and answer <= 1


def _are_ways(answer: Any) -> bool:
    return isinstance(answer, tuple | list) and bool(answer) and set(answer) <= {RELOAD, SPLIT, RECOMPUTE}


GUARDS = {
    "order": GuardedOrder,
    "victim": Guarded,
    "resume": GuardedResume,
    "prediction": GuardedPredictor,
    "eviction": GuardedEviction,
    "placement": GuardedPlacement,
    "routing": GuardedRouting,
    "rebalancing": GuardedRebalancing,
}
