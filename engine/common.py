"""What the cores of one process have in common: the policies in force, what lies below all devices, arrival numbers,
what each tenant has been served.

What a policy has learned (lengths, which blocks are found again) it has learned for all replicas. What steps take is
learned by replicas that are alike: of one fingerprint, which says what model they have, on what kind of device, with
which kernels. What copies take is each replica's own (valuation.py). Pure.
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import count

from engine.events import PolicyFailed
from engine.policy_set import Catalog, PolicyConfig
from engine.tenants import Counters
from kvstore.below import Below, ResidencyConfig
from policies.cost import StepGroup


class Common:
    """`catalog`: of policies; None: ours alone."""

    def __init__(
        self, policies: PolicyConfig, residency: ResidencyConfig, catalog: Catalog | None = None
    ) -> None:
        self.catalog = catalog or Catalog()
        self.config = policies
        self._failures: list[PolicyFailed] = []
        self.policies = self.catalog.make(policies, self._failed)
        self.below = Below(residency, self.policies.eviction, self.policies.placement)
        self.steps: defaultdict[str, StepGroup] = defaultdict(StepGroup)  # by fingerprint
        self.arrivals = count(1)
        self.tenants = Counters()

    def use(self, names: Mapping[str, str]) -> None:
        """Other policies decide from now on, by family. Each core is told (Scheduler.use); the first changes them."""
        config = self.config.having(names)
        self.policies = self.catalog.change(self.policies, self.config, config, self._failed)
        self.config = config
        self.below.use(self.policies.eviction, self.policies.placement)

    def _failed(self, family: str, name: str, what: str) -> None:
        self._failures.append(PolicyFailed(family, name, what))

    def take_failures(self) -> list[PolicyFailed]:
        """Plug-ins that failed since the last call."""
        if not self._failures:
            return []
        failures, self._failures = self._failures, []
        return failures
