"""Whole servers of several replicas, the shipped model on each: live migration and death over HTTP, bits compared."""

import asyncio
import gc
import weakref
from typing import Any

from app.config import Config
from app.replica_tables import ReplicaTable
from bench.client import Answer
from tests.app.lives import Served, configuration, served

PROMPT = "Once upon a time there was a little fox who lived in a house by the river. " * 6
TOKENS = 120


def several(**more: Any) -> Config:
    return configuration(replicas=[ReplicaTable(), ReplicaTable()], kv_blocks=64, max_sequences=4, **more)


async def in_its_midst(server: Served, output: int = 10) -> tuple["asyncio.Task[Answer]", str, int]:
    """A request that has so many tokens, its id, and where it is."""
    task = asyncio.ensure_future(server.asked(prompt=PROMPT, max_tokens=TOKENS))
    async with asyncio.timeout(20):
        while True:
            async with server.http.get("/admin/requests") as response:
                for each in (await response.json())["requests"]:
                    if each["output_tokens"] >= output:
                        return task, each["id"], each["replica"]


async def truth() -> Answer:
    async with served(configuration(kv_blocks=64, max_sequences=4)) as server:
        return await server.asked(prompt=PROMPT, max_tokens=TOKENS)


async def test_a_request_migrates_live_and_says_what_it_would_have_said() -> None:
    expected = await truth()
    async with served(several(host_bytes=8 * 2**20)) as server:
        task, name, here = await in_its_midst(server)
        path = f"/admin/requests/{name}/migrate"
        async with server.http.post(path, json={"replica": 1 - here}) as response:
            assert response.status == 200, await response.text()
        answer = await task
        async with server.http.get(f"/admin/requests/{name}") as response:
            timeline = await response.json()
        assert answer.text == expected.text
        assert (timeline["replica"], timeline["migrations"]) == (1 - here, 1)
        assert timeline["recomputed_tokens"] == 0, "nothing is computed again"
        (moved,) = [each for each in timeline["decisions"] if each["kind"] == "migrated"]
        assert "live, paused" in moved["reason"]
        labels = {"engine": str(here), "reason": "operator", "outcome": "moved"}
        assert await server.metric("sluice:migrations_total", **labels) == 1
        assert await server.metric("sluice:migration_pause_seconds_count", engine=str(here)) == 1
        for engine in ("0", "1"):
            assert (
                await server.metric("sluice:kv_tier_bytes", engine=engine, tier="device", kind="capacity") > 0
            )
            assert await server.metric("vllm:generation_tokens_total", engine=engine) > 0


async def test_a_replica_that_dies_is_made_anew_and_nobody_notices() -> None:
    """The first one, on the main thread: its request goes on at the other; then it serves again, on another thread."""
    expected = await truth()
    async with served(several(host_bytes=8 * 2**20)) as server:
        back, lost = asyncio.Event(), weakref.ref(server.parts.workers[0].runner)
        server.engine.on_replica.append(lambda number, up, reason: back.set() if up else None)
        task, _, here = await in_its_midst(server)
        server.engine._lose(server.engine.replicas[here], RuntimeError("a test"))
        assert here == 0
        assert (await task).text == expected.text
        path = f"/admin/replicas/{here}"
        async with server.http.post(f"{path}/resume", json={}) as response:
            assert (response.status, (await response.json())["state"]) == (200, "starting")
        await asyncio.wait_for(back.wait(), 30)
        async with server.http.post(f"/admin/replicas/{1 - here}/drain", json={}) as response:
            assert response.status == 200
        task, _, where = await in_its_midst(server)
        assert where == here
        assert (await task).text == expected.text
        gc.collect()
        assert lost() is None, "its memory is free"
