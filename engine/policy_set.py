"""The policies in force: names and parameters → instances, plug-ins guarded.

A plug-in (a policy that is not ours) may raise or return nonsense: it is then reported, and the family's plainest
policy decides in its place, for that decision alone. Ours are not guarded: their bugs must show.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from policies.admission import Admission
from policies.order import ORDERS, Order
from policies.prediction import PREDICTIONS, Predictor
from policies.preemption import VICTIMS, Victim
from policies.promotion import Promotion
from policies.resume import RESUMES, Resume

Parameters = Mapping[str, Mapping[str, Any]]
Failed = Callable[[str, str, str], None]
"""(family, policy, what it did)"""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Names by family, and the parameters of those that have some, by the policy's name."""

    order: str = "fcfs"
    victim: str = "last_admitted"
    resume: str = "reload"
    prediction: str = "max_tokens"
    parameters: Parameters = field(default_factory=dict)

    def having(self, names: Mapping[str, str]) -> "PolicyConfig":
        """With other names for some families."""
        chosen = {family: names.get(family, getattr(self, family)) for family in FAMILIES}
        return PolicyConfig(**chosen, parameters=self.parameters)


FAMILIES = ("order", "victim", "resume", "prediction")
"""What the scheduler asks. (Eviction and placement are the residency's.)"""

BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "order": ORDERS,
    "victim": VICTIMS,
    "resume": RESUMES,
    "prediction": PREDICTIONS,
}

PLAINEST = {"order": "fcfs", "victim": "last_admitted", "resume": "reload", "prediction": "max_tokens"}
"""Who decides where a plug-in fails."""


@dataclass(frozen=True, slots=True)
class Policies:
    order: Order
    victim: Victim
    resume: Resume
    prediction: Predictor
    promotion: Promotion
    admission: Admission


class Catalog:
    """All policies that may be chosen: ours, and plug-ins by dotted path, which are loaded at start only."""

    def __init__(self, plugins: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._plugins = plugins or {}

    def names(self, family: str) -> list[str]:
        return sorted({*BUILT_IN[family], *self._plugins.get(family, ())})

    def make(self, config: PolicyConfig, failed: Failed) -> Policies:
        """Raises TypeError for parameters that a policy has not; the configuration has checked ours."""
        return Policies(
            **{family: self._make(family, config, failed) for family in FAMILIES},
            promotion=Promotion(**config.parameters.get("promotion", {})),
            admission=Admission(**config.parameters.get("admission", {})),
        )

    def _make(self, family: str, config: PolicyConfig, failed: Failed) -> Any:
        name = getattr(config, family)
        if name in BUILT_IN[family]:
            return instance(BUILT_IN[family][name], config.parameters.get(name, {}))
        policy = instance(self._plugins[family][name], config.parameters.get(name, {}))
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
        return self._ask(self._policy, self._plainest, *asked)

    def _ask(self, policy: Any, plainest: Any, *asked: Any) -> Any:
        try:
            answer = policy(*asked)
            if self.sound(answer, *asked):
                return answer
            what = f"returned {answer!r}"[:200]
        except Exception as error:  # noqa: BLE001 (whatever a plug-in raises, the engine must go on)
            what = f"raised {type(error).__name__}: {error}"[:200]
        self._failed(what)
        return plainest(*asked)

    def sound(self, answer: Any, *asked: Any) -> bool:
        """A sort key: numbers that can be compared."""
        return isinstance(answer, tuple) and all(isinstance(n, int | float) and n == n for n in answer)


class GuardedOrder(Guarded):
    def displaces(self, waiter: Any, runner: Any) -> bool:
        displaces = getattr(self._policy, "displaces", self._plainest.displaces)
        try:
            return bool(displaces(waiter, runner))
        except Exception as error:  # noqa: BLE001 (as above)
            self._failed(f"raised {type(error).__name__}: {error}"[:200])
            return False


class GuardedResume(Guarded):
    @property
    def enabled(self) -> tuple[str, ...]:
        return tuple(getattr(self._policy, "enabled", RESUMES["cheapest"]().enabled))

    def sound(self, answer: Any, *asked: Any) -> bool:
        return any(answer is way for way in asked[0])


class GuardedPredictor(Guarded):
    def sound(self, answer: Any, *asked: Any) -> bool:
        return isinstance(answer, int | float) and isfinite(answer) and answer >= 0

    def remaining(self, view: Any) -> float:
        return float(self._ask(self._policy.remaining, self._plainest.remaining, view))

    def quantile(self, view: Any, q: float) -> float:
        return float(self._ask(self._policy.quantile, self._plainest.quantile, view, q))

    def observe(self, view: Any) -> None:
        try:
            self._policy.observe(view)
        except Exception as error:  # noqa: BLE001 (as above)
            self._failed(f"raised {type(error).__name__}: {error}"[:200])


GUARDS = {"order": GuardedOrder, "victim": Guarded, "resume": GuardedResume, "prediction": GuardedPredictor}
