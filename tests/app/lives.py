"""Whole servers in this process, one after another: the shipped model, real tiers, HTTP on loopback. No fakes.

Deaths by SIGKILL need a process of their own: bench/server.py has that.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from app.compose import load
from app.config import (
    Config,
    DiskSection,
    EngineSection,
    HostSection,
    KVStoreSection,
    ModelSection,
    PoliciesSection,
)
from app.listening import bind
from app.replica_tables import ReplicaTable
from app.server import listen
from app.serving import Parts, serving
from bench.client import Answer, complete
from bench.server import total
from engine.engine import Engine

DRAIN_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs."""

    engine: Engine
    http: aiohttp.ClientSession
    parts: Parts

    async def asked(self, **body: object) -> Answer:
        return await complete(self.http, {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | body)

    async def cached(self, **body: object) -> tuple[Answer, int]:
        """The answer, and how many tokens of its prompt were cached, in whichever tier."""
        asked = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True} | body
        async with self.http.post("/v1/completions", json=asked) as response:
            assert response.status == 200, await response.text()
            payload = await response.json()
        answer = Answer()
        answer.take(payload, 0.0)
        return answer, payload["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def metric(self, name: str, **labels: str) -> float:
        async with self.http.get("/metrics") as response:
            return total(await response.text(), name, **labels)

    def check(self) -> None:
        """Asserts that nothing is held, pinned or on its way, and that the books balance."""
        assert not self.engine.requests(), "a request outlived its client"
        for core in self.engine.fleet.cores:
            assert core.scheduler.pool.held == 0, "blocks leaked"
            assert core.scheduler.residency.quiet, "copies are under way"
            assert core.scheduler.residency.pinned == 0, "a snapshot outlived its sequence"
        self.engine.fleet.check()


def configuration(
    store: Path | None = None,
    *,
    model: Path | str = "",
    dtype: str = "auto",
    block_size: int = 16,
    kv_blocks: int = 256,
    max_sequences: int = 8,
    host_bytes: int = 0,
    disk_bytes: int = 16 * 2**20,
    replicas: Sequence[ReplicaTable] = (),
) -> Config:
    """A server of the shipped model, which admits whatever fits now; `store` None: no disk tier."""
    disk = DiskSection(path=str(store), bytes=disk_bytes) if store else DiskSection()
    return Config(
        model=ModelSection.model_validate({"path": str(model), "dtype": dtype}),
        engine=EngineSection(block_size=block_size, kv_blocks=kv_blocks, max_sequences=max_sequences),
        kvstore=KVStoreSection(host=HostSection(bytes=host_bytes), disk=disk),
        policies=PoliciesSection.model_validate(
            {"resume": "reload", "admission": {"risk": 1.0, "wait_steps": 0}}
        ),
        replicas=list(replicas),
    )


@asynccontextmanager
async def served(config: Config) -> AsyncIterator[Served]:
    """From start to an orderly end, as SIGTERM's: what is on its way to the tiers gets there."""
    parts = await asyncio.to_thread(load, config)
    steps = asyncio.ensure_future(asyncio.to_thread(parts.worker.run_forever))
    try:
        async with serving(parts) as (engine, app):
            with bind("127.0.0.1", 0) as listener:
                site = await listen(app, config.server, listener)
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                try:
                    async with aiohttp.ClientSession(url) as http:
                        this = Served(engine, http, parts)
                        yield this
                        assert await engine.drain(DRAIN_SECONDS), "requests had not ended"
                        this.check()
                finally:
                    await site.cleanup()
    finally:
        parts.worker.stop()
        await steps


def settings(store: Path, **more: Any) -> dict[str, object]:
    """For a server in a process of its own: short of room everywhere."""
    return {
        "engine.kv_blocks": 48,
        "engine.max_sequences": 4,
        "kvstore.host.bytes": 16 * 49152,
        "kvstore.disk.path": store,
        "kvstore.disk.bytes": 16 * 2**20,
        "checkpoint.every_tokens": 16,
        "policies.admission.risk": 1.0,
        "policies.resume": "reload",
    } | more
