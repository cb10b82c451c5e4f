"""Metrics: the names that dashboards know, values that follow the engine, and a format that parsers read."""

import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engine.state import tier_bytes
from tests.app.lives import Served, configuration, served
from tests.app.rig import Rig, rig

PROMPT = "Once upon a time there was a little fox who lived in a house by the river. " * 4
TEXT = "/v1/completions"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

NAMES = [
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:num_preemptions_total", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
    "vllm:request_success_total", "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket", "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket",
    "vllm:iteration_tokens_total_bucket", "sluice:computed_tokens_total", "sluice:recomputed_tokens_total",
    "sluice:preemptions_total", "sluice:resumptions_total", "sluice:event_loop_lag_seconds_bucket",
    "sluice:gil_held_seconds_bucket", "vllm:request_params_n_bucket", "vllm:request_params_max_tokens_bucket",
    "vllm:request_prefill_time_seconds_bucket", "vllm:request_decode_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket", "sluice:promotions_total", "sluice:slow_readers_total",
    "sluice:connections_refused_total", "sluice:saved_ahead_blocks_total",
]  # fmt: skip


async def scrape(server: Rig) -> Samples:
    async with server.client.get("/metrics") as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = text_string_to_metric_families(await response.text())
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    wanted = frozenset({"model_name": "otter", "engine": "0", **labels}.items())
    return samples[name, wanted]


async def test_every_name_is_there_from_the_start_with_both_labels() -> None:
    async with rig() as server:
        samples = await scrape(server)
    assert set(NAMES) <= {name for name, _ in samples}
    assert all({"model_name", "engine"} <= dict(labels).keys() for _, labels in samples)
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 0
    assert value(samples, "sluice:preemptions_total", victim_policy="last_admitted") == 0


async def test_counters_and_histograms_follow_finished_requests() -> None:
    async with rig() as server:
        await server.post(TEXT, prompt="a" * 40, max_tokens=10, n=2)
        await server.post(TEXT, prompt="a" * 40, max_tokens=10)
        samples = await scrape(server)
    assert value(samples, "vllm:prompt_tokens_total") == 80
    assert value(samples, "vllm:generation_tokens_total") == 30
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 3
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 3
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 27
    assert value(samples, "vllm:prefix_cache_queries_total") == 120
    assert value(samples, "vllm:prefix_cache_hits_total") == 64
    computed = value(samples, "sluice:computed_tokens_total")
    assert computed == value(samples, "vllm:iteration_tokens_total_sum") == 120 - 64 + 27
    assert value(samples, "vllm:num_requests_running") == value(samples, "vllm:kv_cache_usage_perc") == 0


async def test_gauges_show_what_runs_and_waits_now() -> None:
    """No step ends while they are read."""
    async with rig(max_sequences=1) as server:
        server.worker.gate.clear()
        calls = [asyncio.ensure_future(server.post(TEXT, prompt="a" * 40, max_tokens=9)) for _ in range(3)]
        await server.until(running=3)
        samples = await scrape(server)
        server.worker.gate.set()
        await asyncio.gather(*calls)
    assert value(samples, "vllm:num_requests_running") == 1
    assert value(samples, "vllm:num_requests_waiting") == 2
    assert value(samples, "vllm:kv_cache_usage_perc") == 3 / 64


async def test_preemptions_and_recomputed_tokens_are_counted() -> None:
    """Four sequences of some 13 blocks each over a pool of 20."""
    async with rig(blocks=20, context=320) as server:
        await server.post(TEXT, prompt=["a" * 40, "b" * 40, "c" * 40, "d" * 40], max_tokens=160)
        samples = await scrape(server)
    preemptions = value(samples, "vllm:num_preemptions_total")
    assert preemptions > 0
    assert value(samples, "sluice:preemptions_total", victim_policy="last_admitted") == preemptions
    ways = [("recompute", "none"), ("recompute", "device"), ("reload", "device")]
    resumed = [value(samples, "sluice:resumptions_total", way=way, tier=tier) for way, tier in ways]
    assert sum(resumed) == preemptions
    assert value(samples, "sluice:recomputed_tokens_total") > 0


async def test_edges_are_vllms() -> None:
    """Of lengths: 1, 2, 5 … up to the longest context. From vllm/v1/metrics/buckets.py, main of November 2026."""
    async with rig(context=512) as server:
        samples = await scrape(server)

    def edges(name: str) -> list[float]:
        found = [dict(labels)["le"] for sample, labels in samples if sample == f"{name}_bucket"]
        return sorted(float(edge) for edge in found)[:-1]

    lengths = [1, 2, 5, 10, 20, 50, 100, 200, 500]
    for name in ("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"):
        assert edges(f"vllm:{name}") == lengths
    assert edges("vllm:iteration_tokens_total") == [1, *(2**power for power in range(3, 15))]
    assert edges("vllm:request_params_n") == [1, 2, 5, 10, 20]
    assert (edges("vllm:time_to_first_token_seconds")[0], edges("vllm:time_to_first_token_seconds")[-1]) == (
        0.001,
        2560,
    )
    assert (edges("vllm:inter_token_latency_seconds")[0], edges("vllm:inter_token_latency_seconds")[-1]) == (
        0.01,
        80,
    )
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert (edges(f"vllm:{name}_seconds")[0], edges(f"vllm:{name}_seconds")[-1]) == (0.3, 7680)


async def test_answers_are_counted_by_route_and_status() -> None:
    """Not by what clients write: they could make up any number of paths."""
    async with rig() as server:
        await server.post(TEXT, prompt="x", max_tokens=1)
        await server.post(TEXT, prompt="")
        for path in ("/v1/models/a", "/v1/models/b", "/nothing", "/at/all"):
            await server.client.get(path)
        samples = await scrape(server)
    name = "sluice:http_responses_total"
    assert value(samples, name, path=TEXT, status="200") == value(samples, name, path=TEXT, status="400") == 1
    assert value(samples, name, path="/v1/models/{name}", status="404") == 2
    assert value(samples, name, path="other", status="404") == 2


async def test_a_cancelled_request_is_an_abort() -> None:
    async with rig() as server:
        async with server.client.post(
            TEXT, json={"prompt": "x", "max_tokens": 300, "stream": True}
        ) as response:
            await response.content.readuntil(b"\n\n")
            response.close()
            await server.until(running=0)
        samples = await scrape(server)
    assert value(samples, "vllm:request_success_total", finished_reason="abort") == 1


# --- the KV store's, on a whole server with host and disk -------------------------------------------------------------

STORE_NAMES = {
    "sluice:kv_tier_up", "sluice:kv_tier_bytes", "sluice:kv_tier_read_bytes_total",
    "sluice:kv_tier_write_bytes_total", "sluice:kv_tier_hit_tokens_total", "sluice:kv_tier_errors_total",
    "sluice:kv_tier_outages_total", "sluice:unsaved_blocks_total", "sluice:kv_copy_seconds_bucket",
    "sluice:kv_copy_queue_seconds_bucket",
}  # fmt: skip


async def test_tier_metrics_tell_what_was_saved_found_and_copied(tmp_path: Path) -> None:
    """A prompt is saved in host and disk, and found in each when those above have forgotten it."""
    config = configuration(tmp_path / "kv", host_bytes=4 * 2**20)
    async with served(config) as server:
        await server.asked(prompt=PROMPT)
        await until_quiet(server)
        blocks = len(server.engine.core.scheduler.residency.disk)
        size = tier_bytes(server.engine.fleet, server.engine.block_bytes)["disk"][2]
        for kind in ("used", "capacity"):
            assert await server.metric("sluice:kv_tier_bytes", tier="device", kind=kind) >= size
            assert await server.metric("sluice:kv_tier_bytes", tier="host", kind=kind) >= size
        assert await server.metric("sluice:kv_tier_bytes", tier="disk", kind="used") == size > 0
        for tier in ("host", "disk"):
            assert await server.metric("sluice:kv_tier_write_bytes_total", tier=tier) == size
            assert await server.metric("sluice:kv_tier_hit_tokens_total", tier=tier) == 0
        found = {}
        for forgotten, tier in ((["device"], "host"), (["device", "host"], "disk")):
            for each in forgotten:
                server.engine.prune(each, 0)
            before = await server.metric("sluice:kv_tier_read_bytes_total", tier=tier)
            _, cached = await server.cached(prompt=PROMPT)
            found[tier] = cached
            assert cached > 0
            assert await server.metric("sluice:kv_tier_hit_tokens_total", tier=tier) == cached
            read = await server.metric("sluice:kv_tier_read_bytes_total", tier=tier) - before
            assert read >= size // blocks * (cached // 16)
            await until_quiet(server)
        assert await server.metric("sluice:kv_tier_hit_tokens_total") == sum(found.values())
        assert await server.metric("vllm:prefix_cache_hits_total") == sum(found.values())
        assert await server.metric("sluice:kv_tier_up") == 3
        assert await server.metric("sluice:kv_tier_errors_total") == 0
        assert await server.metric("sluice:kv_copy_seconds_count", source="host", target="disk") > 0
        async with server.http.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            assert {sample.name for family in families for sample in family.samples} >= STORE_NAMES


async def test_a_tier_that_is_turned_off_is_not_down_and_one_that_fails_is(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("a file, no directory")
    async with served(configuration(tmp_path / "kv")) as server:
        async with server.http.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            up = {
                s.labels["tier"]: s.value
                for f in families
                for s in f.samples
                if s.name == "sluice:kv_tier_up"
            }
        assert up == {"device": 1, "disk": 0}, "the host is turned off"
        assert await server.metric("sluice:kv_tier_outages_total", tier="disk") == 1


async def until_quiet(server: Served) -> None:
    async with asyncio.timeout(20):
        await server.engine._quiet.wait()
