"""Metrics of one replica: its steps, its copies, and the requests that ended there; part of `app/metrics.py`.

A request that has migrated counts where it ended, whole; tokens and preemptions count where they happened.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from prometheus_client import Counter, Histogram

from app.metric_families import Families
from engine.core import CoreConfig
from engine.events import MigrationOver
from engine.member import Member
from engine.moves import REASONS
from engine.records import CopyRecord, StepRecord
from engine.request import Finished, FinishReason
from engine.state import TierBytes
from kvstore.copies import DEVICE, DISK, HOST

# vLLM's edges, in seconds and tokens (vllm/v1/metrics/buckets.py).
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)  # lag, GIL
COPY = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
MIGRATION = (*COPY, 30, 60)
TIERS = (DEVICE, HOST, DISK)
OUTCOMES = {True: "moved", False: "failed"}

_SUCCESS = {FinishReason.CANCELLED: "abort"}  # vLLM's word


def token_edges(context: int) -> tuple[int, ...]:
    """1, 2, 5, 10 … up to the longest context, as vLLM has them."""
    edges = (mantissa * 10**exponent for exponent in range(len(str(context))) for mantissa in (1, 2, 5))
    return tuple(edge for edge in edges if edge <= context)


class ReplicaMetrics:
    """`number`: the replica's; `context`: see Metrics."""

    def __init__(self, families: Families, number: int, core: CoreConfig, context: int) -> None:
        self._families = families
        self._number = number
        self._up = True
        self._make_gauges(core)
        self._make_counters()
        self._make_tier_metrics()
        self._make_histograms(token_edges(context))
        self._make_migrations()

    # --- what there is --------------------------------------------------------------------------------------------

    def _make_gauges(self, core: CoreConfig) -> None:
        families, number = self._families, self._number
        self._running = families.gauge(number, "vllm:num_requests_running", "Sequences in the running batch.")
        self._waiting = families.gauge(number, "vllm:num_requests_waiting", "Sequences that wait.")
        self._kv_usage = families.gauge(
            number, "vllm:kv_cache_usage_perc", "Share of KV blocks held, 0 to 1."
        )
        families.gauge(
            number,
            "vllm:cache_config_info",
            "The KV cache's configuration.",
            block_size=str(core.scheduler.block_size),
            num_gpu_blocks=str(core.scheduler.blocks),
            enable_prefix_caching="True",
        ).set(1)
        self._is_up = families.gauge(number, "sluice:replica_up", "Whether it has a device that works.")
        self._draining = families.gauge(
            number, "sluice:replica_draining", "Whether an operator wants it to take nothing more."
        )
        self._backlog = families.gauge(
            number, "sluice:replica_backlog_seconds", "Predicted device seconds of all that are there."
        )
        self._pace = families.gauge(
            number,
            "sluice:replica_pace",
            "Seconds of its steps over those of replicas like it, where the two differ for good, else 1.",
        )
        self._forecast = families.gauge(
            number,
            "sluice:replica_forecast_tokens",
            "KV positions that those who run are expected to hold, policies.balance.horizon_steps from now.",
        )
        self._forecast_error = families.gauge(
            number,
            "sluice:replica_forecast_error",
            "Sum of |forecast - actual| over sum of actual, so far.",
        )

    def _counter(self, name: str, text: str, **more: str) -> Counter:
        return self._families.counter(self._number, name, text, **more)

    def _histogram(self, name: str, text: str, edges: Sequence[float], **more: str) -> Histogram:
        return self._families.histogram(self._number, name, text, edges, **more)

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
        self._outages = self._counter("sluice:replica_outages", "How often it was lost.")
        self._restarts = self._counter("sluice:replica_restarts", "How often it was started again.")

    def _make_tier_metrics(self) -> None:
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

    def _make_histograms(self, tokens: tuple[int, ...]) -> None:
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
        self._gil = self._histogram("sluice:gil_held_seconds", "Interpreter lock held by a step.", SHORT)
        self._prompt_length = self._histogram("vllm:request_prompt_tokens", "Tokens in a prompt.", tokens)
        self._output_length = self._histogram("vllm:request_generation_tokens", "Tokens generated.", tokens)
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Positions computed in a step.", STEP_TOKENS
        )

    def _make_migrations(self) -> None:
        self._migrations = {
            (reason, outcome): self._counter(
                "sluice:migrations",
                "Sequences that were to go on at another replica, by the one they left.",
                reason=reason,
                outcome=outcome,
            )
            for reason in REASONS
            for outcome in OUTCOMES.values()
        }
        self._migration = self._histogram(
            "sluice:migration_seconds", "A live migration, from its beginning to its end.", MIGRATION
        )
        self._pause = self._histogram(
            "sluice:migration_pause_seconds", "Of it, the sequence in no replica's steps.", MIGRATION
        )

    # --- what happens ---------------------------------------------------------------------------------------------

    def observe_step(self, step: StepRecord) -> None:
        self._computed.inc(step.computed_tokens)
        self._recomputed.inc(step.recomputed_tokens)
        self._generated.inc(step.sampled_tokens)
        self._prompt_tokens.inc(step.prompt_tokens)
        for tier, tokens in step.hit_tokens.items():
            self._hit_tokens[tier].inc(tokens)
        self._dropped.inc(step.dropped_blocks)
        self._preemptions.inc(step.preemptions)
        self._queries.inc(step.prefix_queries)
        self._hits.inc(step.prefix_hits)
        if step.rows:  # none: what a lost replica had counted
            self._step_tokens.observe(step.computed_tokens)
            self._gil.observe(step.gil_seconds)

    def observe_copy(self, copy: CopyRecord) -> None:
        self._read[copy.source].inc(copy.bytes)
        self._written[copy.target].inc(copy.bytes)
        route = {"source": copy.source, "target": copy.target}
        self._histogram("sluice:kv_copy_seconds", "A copy between tiers, once begun.", COPY, **route).observe(
            copy.seconds
        )
        self._histogram(
            "sluice:kv_copy_queue_seconds", "A copy's wait for its thread.", COPY, **route
        ).observe(copy.queued_seconds)

    def observe_migration(self, over: MigrationOver) -> None:
        self._migrations[over.reason, OUTCOMES[not over.failure]].inc()
        if over.live and not over.failure:
            self._migration.observe(over.seconds)
            self._pause.observe(over.pause.seconds)

    def observe_fate(self, *, up: bool) -> None:
        """It is lost, or back; or still lost, as it could not be started again."""
        if up:
            self._restarts.inc()
        elif self._up:
            self._outages.inc()
        self._up = up

    def observe_finished(self, choice: Finished) -> None:
        self._successes[choice.reason].inc()
        if choice.choice == 0:  # a request's choices share its prompt
            self._prompt_length.observe(choice.prompt_tokens)
        self._output_length.observe(choice.output_tokens)
        self._e2e.observe(choice.finished - choice.arrived)
        self._queued.observe(choice.queued_seconds)
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

    # --- what is now ----------------------------------------------------------------------------------------------

    def show(self, member: Member) -> None:
        """Gauges are told now, not at the last step."""
        scheduler = member.core.scheduler
        self._running.set(len(scheduler.running))
        self._waiting.set(scheduler.waiting)
        self._kv_usage.set(scheduler.pool.held / scheduler.pool.blocks)
        self._is_up.set(member.up)
        self._draining.set(member.draining)
        self._backlog.set(member.backlog_seconds)
        self._pace.set(scheduler.valuation.costs.steps.pace)
        self._forecast.set(member.forecast_tokens)
        self._forecast_error.set(member.errors.mean_relative_error)

    def show_device(self, device: TierBytes) -> None:
        """Its KV, where there are tiers below it."""
        show_tier(self._families, self._number, DEVICE, device)


def show_tier(families: Families, engine: int, tier: str, found: TierBytes) -> None:
    """One without capacity is turned off."""
    up, capacity, used = found
    if not capacity:
        return
    tier_up(families, engine, tier, up=up)
    name, text = "sluice:kv_tier_bytes", "KV that a tier holds, and may hold."
    families.gauge(engine, name, text, tier=tier, kind="capacity").set(capacity)
    families.gauge(engine, name, text, tier=tier, kind="used").set(used)


def tier_up(families: Families, engine: int, tier: str, *, up: bool) -> None:
    text = "Whether a tier that is turned on is in use."
    families.gauge(engine, "sluice:kv_tier_up", text, tier=tier).set(up)


def _gaps(times: list[float]) -> Iterator[float]:
    return (later - earlier for earlier, later in pairwise(times))
