"""A whole server without a model: the real engine and application over a scripted runner, on loopback.

Steps run on the event loop, one at a time, and only while the gate is open: tests decide when tokens come.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from aiohttp import web

from app.config import KVStoreSection, ServerSection
from app.keys import Keys, KeyTable
from app.listening import bind
from app.metrics import Metrics
from app.policy_log import PolicyLog
from app.replica_log import ReplicaLog
from app.served import Model, Served
from app.server import application, listen
from app.service_classes import Classes, ClassTable
from engine.chat_template import ChatTemplateError
from engine.core import CoreConfig
from engine.engine import Engine, Revived
from engine.fleet import Fleet, FleetConfig, ReplicaConfig
from engine.model.generation import GenerationDefaults
from engine.plan import Plan
from engine.policy_set import Catalog, PolicyConfig
from engine.scheduler import SchedulerConfig
from engine.worker import Report
from tests.engine.driving import UNFORESEEN
from tests.fakes import Script, ScriptedRunner, saying

EOS = 256
VOCABULARY = (*(bytes([byte]) for byte in range(256)), b"")
STORY = "Once upon a time there was a small, brave otter — ünïcödé 🦦 and all. ".encode()

UNFORESEEN_POLICIES = PolicyConfig(parameters=UNFORESEEN)


class ByteTokenizer:
    """A token a byte."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        if messages[0]["content"] == "forbidden":
            raise ChatTemplateError("the template refuses these messages")
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


class GatedWorker:
    """Runs a plan on the loop, when the gate is open. `explode()` makes the next step fail."""

    def __init__(self, runner: ScriptedRunner) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.stopped = False
        self._runner = runner
        self._failure: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, report: Report) -> None:
        self._report = report

    def abandon(self) -> None:
        self.stopped = True

    def submit(self, plan: Plan) -> None:
        task = asyncio.ensure_future(self._run(plan))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, plan: Plan) -> None:
        await self.gate.wait()
        if self._failure is not None:
            self._report(self._failure)
        else:
            self._report(self._runner.launch(plan).collect())

    def explode(self) -> None:
        self._failure = RuntimeError("the device is on fire")
        self.gate.set()

    def stop(self) -> None:
        self.stopped = True
        for task in self._tasks:
            task.cancel()


def gated(script: Script | None = None, max_sequences: int = 8) -> GatedWorker:
    """With a runner of its own."""
    return GatedWorker(ScriptedRunner(script or saying(STORY), block_size=16, max_sequences=max_sequences))


@dataclass(slots=True)
class Rig:
    """`client` speaks to the server at `url`."""

    url: str
    listener: socket.socket
    client: aiohttp.ClientSession
    engine: Engine
    workers: list[GatedWorker]  # one a replica
    served: Served
    metrics: Metrics

    @property
    def worker(self) -> GatedWorker:
        """The first replica's."""
        return self.workers[0]

    async def post(self, path: str, **body: object) -> tuple[int, dict[str, Any]]:
        async with self.client.post(path, json=body) as response:
            return response.status, await response.json()

    async def stream(self, path: str, **body: object) -> list[dict[str, Any]]:
        """The frames of a streamed answer, [DONE] checked and left out."""
        async with self.client.post(path, json=body | {"stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            frames = (await response.text()).split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert all(frame.startswith("data: ") for frame in frames[:-2])
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]

    async def get(self, path: str) -> dict[str, Any]:
        async with self.client.get(path) as response:
            assert response.status == 200, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    async def until(self, running: int) -> None:
        """Waits, turn by turn of the loop, until so many requests are at hand."""
        async with asyncio.timeout(5):
            while len(self.engine.requests()) != running:  # noqa: ASYNC110 - no event says that a request came or went
                await asyncio.sleep(0)


@asynccontextmanager
async def rig(
    script: Script | None = None,
    *,
    replicas: int = 1,
    last_blocks: int | None = None,
    revive: Callable[[int], Awaitable[Revived]] | None = None,
    blocks: int = 64,
    context: int = 512,
    max_sequences: int = 8,
    max_queue: int = 8,
    server: ServerSection | None = None,
    kvstore: KVStoreSection | None = None,
    defaults: GenerationDefaults | None = None,
    token_ids: int = len(VOCABULARY),
    policies: PolicyConfig | None = None,
    plugins: Mapping[str, Mapping[str, Any]] | None = None,
    classes: Sequence[ClassTable] = (),
    keys: Sequence[KeyTable] = (),
) -> AsyncIterator[Rig]:
    """At the end: nothing runs, no block is held, the books balance.

    last_blocks: of the last replica, where it has not as many as the others.
    """
    server = server or ServerSection(port=0, max_body_bytes=100_000)
    scheduler = SchedulerConfig(
        16,
        blocks,
        max_batch_tokens=256,
        max_sequences=max_sequences,
        policies=policies or UNFORESEEN_POLICIES,
    )
    catalog = Catalog(plugins)
    core = CoreConfig(scheduler, context, max_queue, eos_token_ids=(EOS,))
    last = replace(core, scheduler=replace(scheduler, blocks=last_blocks or blocks))
    cores = (*[core] * (replicas - 1), last)
    fleet = Fleet(FleetConfig(tuple(ReplicaConfig(each) for each in cores)), VOCABULARY, catalog)
    workers = [gated(script, max_sequences) for _ in range(replicas)]
    engine = Engine(fleet, workers, exact=True, revive=revive)
    model = Model(
        "otter",
        ByteTokenizer(),
        VOCABULARY,
        {EOS: "<eos>"},
        defaults or GenerationDefaults((EOS,)),
        created=1,
        token_ids=token_ids,
    )
    engine.on_policy_failed.append(PolicyLog().observe)
    replica_log = ReplicaLog()
    engine.on_replica.append(replica_log.observe)
    engine.on_migration.append(replica_log.observe_migration)
    served = Served(
        engine, model, server, kvstore or KVStoreSection(), classes=Classes(classes), keys=Keys(keys)
    )
    metrics = Metrics(
        "otter",
        cores=cores,
        context=served.context,
        victims=catalog.names("victim"),
        classes=served.classes.tables,
    )
    with bind(server.host, 0) as listener:
        site: web.AppRunner = await listen(application(served, metrics), server, listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with aiohttp.ClientSession(url) as client:
                yield Rig(url, listener, client, engine, workers, served, metrics)
        finally:
            await site.cleanup()
            engine.stop()
    if engine.failure is None:
        assert not engine.requests(), "a request outlived its client"
        fleet.check()
