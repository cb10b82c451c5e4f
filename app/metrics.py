"""Prometheus metrics under vLLM's names, so that its dashboards and routers work, and a few of our own.

Fed by the engine's observers on the event-loop thread. Each server has a registry of its own. The label `engine` is
the replica's number for all that is a replica's: what it runs, computes, copies to and from its device, and what ended
there (`app/replica_metrics.py`). It is 0 for what is the whole process's: tiers below the devices and copies between
them, requests as they come, HTTP (`app/http_metrics.py`), the event loop (`app/lag.py`), the policies in force and
refusals by service class (`app/policy_metrics.py`).
"""

from collections.abc import Iterable, Mapping, Sequence

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from app.config import KVStoreSection
from app.http_metrics import HttpMetrics
from app.metric_families import Families
from app.policy_metrics import PolicyMetrics
from app.replica_metrics import SHORT, TIERS, ReplicaMetrics, show_tier, tier_up, token_edges
from app.service_classes import ClassTable
from engine.core import CoreConfig
from engine.events import MigrationOver
from engine.fleet import Fleet
from engine.records import CopyRecord, StepRecord
from engine.request import Finished, Request
from engine.state import TierBytes
from kvstore.copies import DISK, HOST, Loss

PROCESS = 0
"""The label `engine` of what is no replica's."""

CHOICES = (1, 2, 5, 10, 20)


class Metrics:
    """`cores`: of the replicas, by number. `context`: tokens that a prompt and its answer may have together. `victims`:
    names of victim policies that may be in force. `classes`: service classes, by name.
    """

    def __init__(
        self,
        model_name: str,
        *,
        cores: Sequence[CoreConfig],
        context: int,
        victims: Iterable[str] = (),
        classes: Mapping[str, ClassTable] | None = None,
    ) -> None:
        self._families = families = Families(CollectorRegistry(), model_name)
        self._stayed_told = 0
        self._make_lengths(token_edges(context))
        self._make_tier_counters()
        self.lag = families.histogram(
            PROCESS, "sluice:event_loop_lag_seconds", "How late the event loop runs a timer.", SHORT
        )
        self._stayed = families.counter(
            PROCESS,
            "sluice:stayed",
            "Sequences that had outgrown their replica and found no room elsewhere, in each comparison.",
        )
        self.replicas = [ReplicaMetrics(families, number, core, context) for number, core in enumerate(cores)]
        labels = families.labels(PROCESS)
        self.policies = PolicyMetrics(families.registry, labels, victims, classes or {}, len(cores))
        self.http = HttpMetrics(families.registry, labels)

    def _make_lengths(self, tokens: tuple[int, ...]) -> None:
        self._max_tokens = self._families.histogram(
            PROCESS, "vllm:request_params_max_tokens", "Tokens that a request may generate.", tokens
        )
        self._choices = self._families.histogram(
            PROCESS, "vllm:request_params_n", "Choices of a request.", CHOICES
        )

    def _make_tier_counters(self) -> None:
        self._outages = {
            tier: self._families.counter(
                PROCESS, "sluice:kv_tier_outages", "How often a tier went out of use.", tier=tier
            )
            for tier in TIERS
        }
        self._tier_errors = {
            (tier, kind): self._families.counter(
                PROCESS,
                "sluice:kv_tier_errors",
                "Blocks that a tier lost or refused.",
                tier=tier,
                kind=kind.value,
            )
            for tier in TIERS
            for kind in Loss
        }

    # --- what happens -------------------------------------------------------------------------------------

    def observe_step(self, step: StepRecord) -> None:
        self.replicas[step.replica].observe_step(step)
        self.policies.observe_step(step)

    def observe_finished(self, choice: Finished) -> None:
        self.replicas[choice.replica].observe_finished(choice)
        self.policies.observe_finished(choice)

    def observe_migration(self, over: MigrationOver) -> None:
        self.replicas[over.source].observe_migration(over)

    def observe_replica(self, number: int, up: bool, reason: str) -> None:
        """The reason is for the log."""
        self.replicas[number].observe_fate(up=up)

    def observe_copy(self, copy: CopyRecord) -> None:
        self.replicas[copy.replica].observe_copy(copy)
        self.observe_losses(copy.failed_tier, copy.losses)

    def observe_losses(self, tier: str, losses: Mapping[Loss, int]) -> None:
        """Blocks that a tier has lost."""
        for kind, count in losses.items():
            self._tier_errors[tier, kind].inc(count)

    def expect_tiers(self, kvstore: KVStoreSection) -> None:
        """Tiers that are turned on are down until `observe_tiers` knows better: one may never come up."""
        for tier, wanted in ((HOST, kvstore.host.bytes), (DISK, kvstore.disk.bytes)):
            if wanted:
                tier_up(self._families, PROCESS, tier, up=False)

    def observe_tier(self, tier: str, up: bool, reason: str) -> None:
        """A tier has gone out of use, or come back. The reason is for the log."""
        if not up:
            self._outages[tier].inc()

    def observe_tiers(self, devices: Sequence[TierBytes], below: Mapping[str, TierBytes]) -> None:
        """What the replicas' devices hold, and the tiers below."""
        for replica, device in zip(
            self.replicas, devices, strict=False
        ):  # none, where there is no tier below
            replica.show_device(device)
        for tier, found in below.items():
            show_tier(self._families, PROCESS, tier, found)

    def observe_submitted(self, request: Request) -> None:
        """The engine has taken it."""
        self._max_tokens.observe(request.stopping.max_tokens)
        self._choices.observe(request.n)

    def exposition(self, fleet: Fleet) -> tuple[bytes, str]:
        """The classic text format and its content type."""
        for replica, member in zip(self.replicas, fleet.members, strict=True):
            replica.show(member)
        self._stayed.inc(fleet.stayed - self._stayed_told)
        self._stayed_told = fleet.stayed
        return generate_latest(self._families.registry), CONTENT_TYPE_PLAIN_0_0_4


METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)
