"""Metrics of what policies decided and what came of it; part of `app/metrics.py`, which has the registry."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.attainment import TPOT, TTFT, judged, refused
from app.service_classes import ClassTable
from engine.events import PolicyFailed, Resumed
from engine.records import StepRecord
from engine.request import Finished
from kvstore.copies import DEVICE, DISK, HOST

WAYS = ("reload", "split", "recompute")
TIERS = ("none", DEVICE, HOST, DISK)
NOT_FOR_BLOCKS = ("displaced", "operator")
"""Why somebody is preempted, if not by the victim policy."""

PROMOTIONS = ("wait", "service", "demotions", "resume_price", "kv_held")

RESUME = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
REGRET = (
    -10, -2.5, -1, -0.25, -0.1, -0.025, -0.01, -0.0025, 0, 0.0025, 0.01, 0.025, 0.1, 0.25, 1, 2.5, 10,
)  # fmt: skip


class PolicyMetrics:
    """`labels`: of what is the process's; what is a replica's has its number as `engine`. `replicas`: how many.

    `victims`: names of victim policies that may be in force.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        labels: Mapping[str, str],
        victims: Iterable[str],
        classes: Mapping[str, ClassTable],
        replicas: int = 1,
    ) -> None:
        self._registry = registry
        self._replicas = [dict(labels) | {"engine": str(number)} for number in range(replicas)]
        self._labels = dict(labels)
        self._classes = classes
        self._make_counters(victims)
        self._make_resume()
        self._info = Gauge(
            "sluice:policy_info", "The policies in force.", self._names("family", "policy"), registry=registry
        )
        self._slo = self._counter(
            "sluice:slo_requests",
            "Choices whose service class has an objective, by whether it was met.",
            "class",
            "objective",
            "met",
        )
        for name, table in classes.items():
            for objective, seconds in ((TTFT, table.ttft_seconds), (TPOT, table.tpot_seconds)):
                for met in ("true", "false") if seconds else ():
                    for here in self._replicas:
                        self._slo.labels(**here, **{"class": name}, objective=objective, met=met)

    def _make_counters(self, victims: Iterable[str]) -> None:
        self._preemptions = self._counter(
            "sluice:preemptions",
            "Preemptions, by victim policy, or by what else wanted them.",
            "victim_policy",
        )
        self._promotions = self._counter(
            "sluice:promotions", "Waiters that went before all others.", "reason"
        )
        self._resumptions = self._counter(
            "sluice:resumptions",
            "Sequences that came back after they had lost their place, by way and the lowest tier they took from.",
            "way",
            "tier",
        )
        self._saved_ahead = Counter(
            "sluice:saved_ahead_blocks",
            "Blocks saved of running sequences that were likely to be preempted soon.",
            self._names(),
            registry=self._registry,
        )
        self._failures = self._counter(
            "sluice:policy_failures", "Plug-ins that raised or returned nonsense.", "family", "policy"
        )
        self._make_samples([*victims, *NOT_FOR_BLOCKS])

    def _make_samples(self, victims: Iterable[str]) -> None:
        """So that they are there from the start."""
        victims = list(victims)
        for here in self._replicas:
            self._saved_ahead.labels(**here)
            for victim in victims:
                self._preemptions.labels(**here, victim_policy=victim)
            for reason in PROMOTIONS:
                self._promotions.labels(**here, reason=reason)
            for way in WAYS:
                for tier in TIERS:
                    self._resumptions.labels(**here, way=way, tier=tier)

    def _make_resume(self) -> None:
        self._resume = Histogram(
            "sluice:resume_seconds",
            "Ways back of sequences that had lost their place, from admission until all their KV is on the device.",
            self._names("kind", "way", "tier"),
            registry=self._registry,
            buckets=RESUME,
        )
        self._regret = Histogram(
            "sluice:resume_regret_seconds",
            "What a way back took, less what the best other way was predicted to take.",
            self._names(),
            registry=self._registry,
            buckets=REGRET,
        )
        for here in self._replicas:
            self._regret.labels(**here)

    def _names(self, *more: str) -> list[str]:
        return [*self._labels, *more]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, self._names(*labels), registry=self._registry)

    # --- what happens -------------------------------------------------------------------------------------

    def observe_step(self, step: StepRecord) -> None:
        here = self._replicas[step.replica]
        for by, count in step.preemptions_by.items():
            self._preemptions.labels(**here, victim_policy=by).inc(count)
        for reason, count in step.promotions.items():
            self._promotions.labels(**here, reason=reason).inc(count)
        for (way, tier), count in step.resumptions.items():
            self._resumptions.labels(**here, way=way, tier=tier).inc(count)
        self._saved_ahead.labels(**here).inc(step.saved_ahead_blocks)

    def observe_resumed(self, back: Resumed, replica: int) -> None:
        labels = self._replicas[replica] | {"way": back.way, "tier": back.tier}
        self._resume.labels(**labels, kind="predicted").observe(back.predicted_seconds)
        self._resume.labels(**labels, kind="actual").observe(back.actual_seconds)
        if back.regret_seconds is not None:
            self._regret.labels(**self._replicas[replica]).observe(back.regret_seconds)

    def observe_failure(self, failed: PolicyFailed) -> None:
        self._failures.labels(**self._labels, family=failed.family, policy=failed.name).inc()

    def observe_finished(self, choice: Finished) -> None:
        if table := self._classes.get(choice.service):
            self._count(table, judged(choice, table), self._replicas[choice.replica])

    def observe_refused(self, service: str, choices: int) -> None:
        """A request of so many choices found the queue full."""
        if table := self._classes.get(service):
            for _ in range(choices):
                self._count(table, refused(table), self._labels)

    def _count(
        self, table: ClassTable, judgements: Iterable[tuple[str, bool]], where: Mapping[str, str]
    ) -> None:
        for objective, met in judgements:
            labels = {"class": table.name, "objective": objective, "met": str(met).lower()}
            self._slo.labels(**where, **labels).inc()

    def show(self, in_force: Mapping[str, str]) -> None:
        """The policies in force now, by family."""
        self._info.clear()
        for family, policy in in_force.items():
            self._info.labels(**self._labels, family=family, policy=policy).set(1)
