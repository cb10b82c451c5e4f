"""Prometheus metrics under vLLM's names, so that its dashboards and routers work, and a few of our own.

Fed by the engine's observers (`observe_step`, `observe_finished`) on the event-loop thread. Each server has a
registry of its own. The loop's lag is measured by `app/lag.py`; of policies and service classes:
`app/policy_metrics.py`; of HTTP: `app/http_metrics.py`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from app.config import KVStoreSection
from app.http_metrics import HttpMetrics
from app.policy_metrics import PolicyMetrics
from app.service_classes import ClassTable
from engine.fleet import Fleet
from engine.records import CopyRecord, StepRecord
from engine.request import Finished, FinishReason, Request
from kvstore.copies import DEVICE, DISK, HOST, Loss

ENGINE = "0"  # the replica; there is one so far

# vLLM's edges, in seconds and tokens (vllm/v1/metrics/buckets.py).
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
CHOICES = (1, 2, 5, 10, 20)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)  # lag, GIL

COPY = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
TIERS = (DEVICE, HOST, DISK)

_SUCCESS = {FinishReason.CANCELLED: "abort"}  # vLLM's word


def token_edges(context: int) -> tuple[int, ...]:
    """1, 2, 5, 10 … up to the longest context, as vLLM has them."""
    edges = (mantissa * 10**exponent for exponent in range(len(str(context))) for mantissa in (1, 2, 5))
    return tuple(edge for edge in edges if edge <= context)


class Metrics:
    """`context`: tokens that a prompt and its answer may have together. `victims`: names of victim policies that may be
    in force. `classes`: service classes, by name.
    """

    def __init__(
        self,
        model_name: str,
        *,
        block_size: int,
        kv_blocks: Sequence[int],
        context: int,
        victims: Iterable[str] = (),
        classes: Mapping[str, ClassTable] | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": ENGINE}
        self._families: dict[str, Counter] = {}
        self._make_gauges(block_size, sum(kv_blocks))
        self._make_counters()
        self._make_histograms()
        self._make_lengths(token_edges(context))
        self._make_tier_metrics()
        self.policies = PolicyMetrics(self._registry, self._labels, victims, classes or {})
        self.http = HttpMetrics(self._registry, self._labels)

    # --- what there is ------------------------------------------------------------------------------------

    def _make_gauges(self, block_size: int, kv_blocks: int) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Sequences in the running batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks held, 0 to 1.")
        facts = {
            "block_size": str(block_size),
            "num_gpu_blocks": str(kv_blocks),
            "enable_prefix_caching": "True",
        }
        info = Gauge(
            "vllm:cache_config_info",
            "The KV cache's configuration.",
            [*self._labels, *facts],
            registry=self._registry,
        )
        info.labels(**self._labels, **facts).set(1)

    def _make_counters(self) -> None:
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts, counted when admitted.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("vllm:num_preemptions", "Preemptions.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self._computed = self._counter("sluice:computed_tokens", "Positions computed.")
        self._recomputed = self._counter("sluice:recomputed_tokens", "Of these, computed once before.")
        self._successes = {
            reason: self._counter(
                "vllm:request_success",
                "Choices that ended.",
                finished_reason=_SUCCESS.get(reason, reason.value),
            )
            for reason in FinishReason
        }
        self._make_tier_counters()

    def _make_tier_counters(self) -> None:
        self._dropped = self._counter(
            "sluice:unsaved_blocks", "Blocks not saved below the device: no room, or too much on its way."
        )
        self._hit_tokens, self._read, self._written = (
            {tier: self._counter(name, text, tier=tier) for tier in TIERS}
            for name, text in (
                ("sluice:kv_tier_hit_tokens", "Tokens found cached at an admission, by tier."),
                ("sluice:kv_tier_read_bytes", "Bytes copied out of a tier."),
                ("sluice:kv_tier_write_bytes", "Bytes copied into a tier."),
            )
        )
        self._outages = {
            tier: self._counter("sluice:kv_tier_outages", "How often a tier went out of use.", tier=tier)
            for tier in TIERS
        }
        self._tier_errors = {
            (tier, kind): self._counter(
                "sluice:kv_tier_errors", "Blocks that a tier lost or refused.", tier=tier, kind=kind.value
            )
            for tier in TIERS
            for kind in Loss
        }

    def _make_tier_metrics(self) -> None:
        labels = [*self._labels, "tier"]
        self._tier_up = Gauge(
            "sluice:kv_tier_up",
            "Whether a tier that is turned on is in use.",
            labels,
            registry=self._registry,
        )
        self._tier_bytes = Gauge(
            "sluice:kv_tier_bytes",
            "KV that a tier holds, and may hold.",
            [*labels, "kind"],
            registry=self._registry,
        )
        routes = [*self._labels, "source", "target"]
        self._copies, self._copy_queue = (
            Histogram(name, text, routes, registry=self._registry, buckets=COPY)
            for name, text in (
                ("sluice:kv_copy_seconds", "A copy between tiers, once begun."),
                ("sluice:kv_copy_queue_seconds", "A copy's wait for its thread."),
            )
        )

    def _make_histograms(self) -> None:
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT
        )
        self._itl = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", ITL
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "(End - first token) ÷ (tokens - 1), per sequence.",
            ITL,
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self._queued = self._histogram("vllm:request_queue_time_seconds", "Waiting, in all.", WHOLE)
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From admission to the first token.", WHOLE
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the end.", WHOLE
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "From admission to the end.", WHOLE
        )
        self.lag = self._histogram(
            "sluice:event_loop_lag_seconds", "How late the event loop runs a timer.", SHORT
        )
        self._gil = self._histogram("sluice:gil_held_seconds", "Interpreter lock held by a step.", SHORT)

    def _make_lengths(self, tokens: tuple[int, ...]) -> None:
        self._prompt_length = self._histogram("vllm:request_prompt_tokens", "Tokens in a prompt.", tokens)
        self._output_length = self._histogram("vllm:request_generation_tokens", "Tokens generated.", tokens)
        self._max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Tokens that a request may generate.", tokens
        )
        self._choices = self._histogram("vllm:request_params_n", "Choices of a request.", CHOICES)
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Positions computed in a step.", STEP_TOKENS
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, edges: Sequence[float]) -> Histogram:
        metric = Histogram(name, text, list(self._labels), registry=self._registry, buckets=edges)
        return metric.labels(**self._labels)

    def _counter(self, name: str, text: str, **more: str) -> Counter:
        labels = self._labels | more
        metric = self._families.get(name) or Counter(name, text, list(labels), registry=self._registry)
        self._families[name] = metric
        return metric.labels(**labels)

    # --- what happens -------------------------------------------------------------------------------------

    def observe_step(self, step: StepRecord) -> None:
        self._computed.inc(step.computed_tokens)
        self._recomputed.inc(step.recomputed_tokens)
        self._generated.inc(step.sampled_tokens)
        self._prompt_tokens.inc(step.prompt_tokens)
        for tier, tokens in step.hit_tokens.items():
            self._hit_tokens[tier].inc(tokens)
        self._dropped.inc(step.dropped_blocks)
        self._preemptions.inc(step.preemptions)
        self.policies.observe_step(step)
        self._queries.inc(step.prefix_queries)
        self._hits.inc(step.prefix_hits)
        self._step_tokens.observe(step.computed_tokens)
        self._gil.observe(step.gil_seconds)

    def observe_copy(self, copy: CopyRecord) -> None:
        self._read[copy.source].inc(copy.bytes)
        self._written[copy.target].inc(copy.bytes)
        labels = self._labels | {"source": copy.source, "target": copy.target}
        self._copies.labels(**labels).observe(copy.seconds)
        self._copy_queue.labels(**labels).observe(copy.queued_seconds)
        self.observe_losses(copy.failed_tier, copy.losses)

    def observe_losses(self, tier: str, losses: Mapping[Loss, int]) -> None:
        """Blocks that a tier has lost."""
        for kind, count in losses.items():
            self._tier_errors[tier, kind].inc(count)

    def expect_tiers(self, kvstore: KVStoreSection) -> None:
        """Tiers that are turned on are down until `observe_tiers` knows better: one may never come up."""
        for tier, wanted in ((HOST, kvstore.host.bytes), (DISK, kvstore.disk.bytes)):
            if wanted:
                self._tier_up.labels(**self._labels, tier=tier).set(0)

    def observe_tier(self, tier: str, up: bool, reason: str) -> None:
        """A tier has gone out of use, or come back. The reason is for the log."""
        if not up:
            self._outages[tier].inc()

    def observe_tiers(self, capacity_and_use: Mapping[str, tuple[bool, int, int]]) -> None:
        """By tier: whether it is up, the bytes it may hold, and those it holds. One without capacity is turned off."""
        for tier, (up, capacity, used) in capacity_and_use.items():
            if not capacity:
                continue
            labels = self._labels | {"tier": tier}
            self._tier_up.labels(**labels).set(up)
            self._tier_bytes.labels(**labels, kind="capacity").set(capacity)
            self._tier_bytes.labels(**labels, kind="used").set(used)

    def observe_submitted(self, request: Request) -> None:
        """The engine has taken it."""
        self._max_tokens.observe(request.stopping.max_tokens)
        self._choices.observe(request.n)

    def observe_finished(self, choice: Finished) -> None:
        self._successes[choice.reason].inc()
        self.policies.observe_finished(choice)
        if choice.choice == 0:  # a request's choices share its prompt
            self._prompt_length.observe(choice.prompt_tokens)
        self._output_length.observe(choice.output_tokens)
        self._e2e.observe(choice.finished - choice.arrived)
        self._queued.observe(choice.queued_seconds)
        self._observe_tokens(choice)

    def _observe_tokens(self, choice: Finished) -> None:
        if choice.admitted is not None:
            self._inference.observe(choice.finished - choice.admitted)
        if choice.first_token is None:
            return
        self._ttft.observe(choice.first_token - choice.arrived)
        if choice.admitted is not None:
            self._prefill.observe(choice.first_token - choice.admitted)
        self._decode.observe(choice.finished - choice.first_token)
        for gap in _gaps(choice.token_times):
            self._itl.observe(gap)
        if choice.output_tokens > 1:
            self._tpot.observe((choice.finished - choice.first_token) / (choice.output_tokens - 1))

    def exposition(self, fleet: Fleet) -> tuple[bytes, str]:
        """The classic text format and its content type. Gauges are told now, not at the last step."""
        pools = [core.scheduler.pool for core in fleet.cores]
        self._running.set(sum(len(core.scheduler.running) for core in fleet.cores))
        self._waiting.set(fleet.waiting)
        self._kv_usage.set(sum(pool.held for pool in pools) / sum(pool.blocks for pool in pools))
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


def _gaps(times: list[float]) -> Iterator[float]:
    return (later - earlier for earlier, later in pairwise(times))


METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)
