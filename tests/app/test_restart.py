"""What a restart keeps, and for whom: hits from disk for the same tenant and the same model, none for any other.

Orderly restarts here are of servers in this process; one is killed, in a process of its own. Hundreds of kills:
bench/crashes.py.
"""

import asyncio
import shutil
from functools import partial
from pathlib import Path

import pytest
from aiohttp import ClientSession

from app.compose import SHIPPED
from bench import client, server
from engine.model import fingerprint
from tests.app.lives import configuration, served, settings

PROMPT = "Once upon a time there was a little fox who lived in a house by the river. " * 8
OTHER = "The old king found a small red boat and went to see the girl who ran by the sea. " * 8
SAME_CHAIN = 5
"""Blocks that a prompt must find, at least, to count as found."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints of the models written here are not left in the user's cache."""
    monkeypatch.setattr(fingerprint, "default_cache", lambda: tmp_path / "fingerprints.json")


async def test_a_tenant_finds_its_prefix_after_a_restart_and_nobody_elses(tmp_path: Path) -> None:
    store = tmp_path / "kv"
    async with served(configuration(store)) as first:
        truth, cached = await first.cached(prompt=PROMPT, cache_salt="A")
        assert cached == 0
    async with served(configuration(store)) as second:
        for salt in ("B", "", "A "):
            answer, cached = await second.cached(prompt=PROMPT, cache_salt=salt)
            assert (answer.tokens, cached) == (truth.tokens, 0), f"salt {salt!r} found another's prefix"
        assert await second.metric("sluice:kv_tier_hit_tokens_total", tier="disk") == 0
        answer, cached = await second.cached(prompt=PROMPT, cache_salt="A")
        assert answer.tokens == truth.tokens
        assert cached >= SAME_CHAIN * 16
        assert await second.metric("sluice:kv_tier_hit_tokens_total", tier="disk") == cached


def _changed_weights(where: Path) -> Path:
    """A copy of the shipped model, one bit of one weight different."""
    shutil.copytree(SHIPPED, where)
    file = where / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + 2 * (len(content) - header) // 4] ^= 1  # the lowest bit of a bf16's mantissa
    file.write_bytes(content)
    return where


@pytest.mark.parametrize("change", ["weights", "dtype", "block_size"])
async def test_another_model_dtype_or_block_size_finds_nothing_and_answers_right(
    change: str, tmp_path: Path
) -> None:
    store = tmp_path / "kv"
    model = _changed_weights(tmp_path / "changed") if change == "weights" else ""
    changed = {
        "weights": partial(configuration, model=model),
        "dtype": partial(configuration, dtype="float32"),
        "block_size": partial(configuration, block_size=32),
    }[change]
    async with served(configuration(store)) as before:
        await before.asked(prompt=PROMPT)
    async with served(changed(None)) as fresh:
        truth = await fresh.asked(prompt=PROMPT)
    async with served(changed(store)) as after:
        assert after.engine.core.scheduler.residency.disk.up
        answer, cached = await after.cached(prompt=PROMPT)
        assert (answer.tokens, cached) == (truth.tokens, 0)
        assert await after.metric("sluice:kv_tier_hit_tokens_total", tier="disk") == 0
        assert await after.metric("sluice:kv_tier_errors_total") == 0
    async with served(changed(store)) as again:  # it is not that nothing would ever be found
        answer, cached = await again.cached(prompt=PROMPT)
        assert answer.tokens == truth.tokens
        assert cached >= SAME_CHAIN * 16


async def test_a_server_killed_under_load_is_warm_when_it_is_started_again(tmp_path: Path) -> None:
    """Real processes; more than fits is asked at once, so that the kill comes among spills and writes."""
    bodies = [
        {
            "prompt": PROMPT + f" The {n}th day. " + OTHER,
            "max_tokens": 48,
            "seed": n,
            "temperature": n % 2,
            "ignore_eos": True,
        }
        for n in range(8)
    ]
    async with served(configuration(max_sequences=8, kv_blocks=512)) as unpressured:
        truths = await asyncio.gather(*(client.complete(unpressured.http, body) for body in bodies))
    where = settings(tmp_path / "kv")
    async with server.running(where) as killed, server.session(killed) as http:
        asking = [asyncio.ensure_future(client.complete(http, body)) for body in bodies]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        await _until_written(http)
        await killed.kill()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        assert sum(task.cancelled() or task.exception() is not None for task in asking) > 0, "too late"
    async with server.running(where) as again, server.session(again) as http:
        (up,) = (line for line in again.events("tier_up") if line["tier"] == "disk")
        assert up["records"] > 0
        answers = await asyncio.gather(*(client.complete(http, body) for body in bodies))
        assert all(answer.same(truth) for answer, truth in zip(answers, truths, strict=True))
        text = await server.metrics(http)
        assert server.total(text, "sluice:kv_tier_hit_tokens_total", tier="disk") > 0
        assert server.total(text, "vllm:num_preemptions_total") > 0
        assert server.total(text, "sluice:kv_tier_errors_total") == 0


async def _until_written(http: ClientSession) -> None:
    async with asyncio.timeout(30):
        while not server.total(await server.metrics(http), "sluice:kv_tier_write_bytes_total", tier="disk"):
            pass
