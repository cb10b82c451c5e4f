"""The composition root, second half: what needs an event loop. Parts → engine, metrics, application."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from structlog.stdlib import get_logger

from app.config import Config
from app.keys import Keys
from app.metrics import Metrics
from app.policy_log import PolicyLog
from app.replica_log import ReplicaLog
from app.served import Model, Served
from app.server import application
from app.service_classes import Classes
from app.tier_log import TierLog
from engine.core import Core
from engine.engine import Engine, Revive
from engine.fleet import Fleet
from engine.recording import FileRecorder
from engine.worker import QueueWorker
from kvstore.store import Store

STORE_STOP_SECONDS = 10.0
"""For copies under way when the engine has stopped: the engine's drain has waited for them already."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """All that needs no event loop."""

    config: Config
    model: Model
    fleet: Fleet
    workers: Sequence[QueueWorker]  # one a replica; the first is the main thread's
    exact: bool
    store: Store | None = None  # None: no tier below the device
    revive: Revive | None = None  # None: a replica that is lost stays lost

    @property
    def core(self) -> Core:
        """The first replica's."""
        return self.fleet.cores[0]

    @property
    def worker(self) -> QueueWorker:
        """The first replica's."""
        return self.workers[0]


@asynccontextmanager
async def serving(parts: Parts) -> AsyncIterator[tuple[Engine, web.Application]]:
    """The engine and its application, on this loop.

    At the end the workers stop, the tiers are closed when what is under way has ended, and so is a recording.
    """
    async with _recording(parts) as recorder:
        engine = Engine(
            parts.fleet,
            parts.workers,
            exact=parts.exact,
            recorder=recorder,
            store=parts.store,
            revive=parts.revive,
            hung_seconds=parts.config.engine.hung_seconds,
            restart_seconds=parts.config.engine.restart_seconds,
        )
        engine.on_copy.append(TierLog().observe)
        engine.on_policy_failed.append(PolicyLog().observe)
        replica_log = ReplicaLog()
        engine.on_replica.append(replica_log.observe)
        engine.on_migration.append(replica_log.observe_migration)
        ticking = asyncio.create_task(_tick(engine), name="engine's timer")
        try:
            config = parts.config
            classes = Classes(config.classes)
            served = Served(
                engine,
                parts.model,
                config.server,
                config.kvstore,
                parts.store,
                classes=classes,
                keys=Keys(config.keys),
            )
            yield engine, application(served, _metrics(parts, classes))
        finally:
            ticking.cancel()
            await asyncio.to_thread(engine.stop)  # it waits for workers
            if parts.store and not await asyncio.to_thread(parts.store.stop, STORE_STOP_SECONDS):
                log.warning("store_stopped_early", seconds=STORE_STOP_SECONDS)


async def _tick(engine: Engine) -> None:
    """Until the engine dies, of which everybody hears by `engine.dead`."""
    while engine.failure is None:
        await asyncio.sleep(engine.fleet.config.balance.period_seconds)
        try:
            engine.tick()
        except Exception:
            if engine.failure is None:
                log.exception("tick_failed")


def _metrics(parts: Parts, classes: Classes) -> Metrics:
    fleet = parts.fleet
    return Metrics(
        parts.model.name,
        cores=[core.config for core in fleet.cores],
        context=fleet.context,
        victims=fleet.common.catalog.names("victim"),
        classes=classes.tables,
    )


@asynccontextmanager
async def _recording(parts: Parts) -> AsyncIterator[FileRecorder | None]:
    path = parts.config.engine.record
    if not path:
        yield None
        return
    recorder = FileRecorder()
    async with recorder.writing(Path(path), parts.fleet.config):
        yield recorder
    if recorder.failure is not None:
        log.error("recording_incomplete", path=path, reason=str(recorder.failure))
