"""The composition root, second half: what needs an event loop. Parts → engine, metrics, application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from structlog.stdlib import get_logger

from app.config import Config
from app.metrics import Metrics
from app.served import Model, Served
from app.server import application
from engine.core import Core
from engine.engine import Engine
from engine.recording import FileRecorder
from engine.worker import QueueWorker

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """All that needs no event loop."""

    config: Config
    model: Model
    core: Core
    worker: QueueWorker
    exact: bool


@asynccontextmanager
async def serving(parts: Parts) -> AsyncIterator[tuple[Engine, web.Application]]:
    """The engine and its application, on this loop. At the end the worker stops and a recording is closed."""
    async with _recording(parts) as recorder:
        engine = Engine(parts.core, parts.worker, exact=parts.exact, recorder=recorder)
        try:
            yield engine, application(Served(engine, parts.model, parts.config.server), _metrics(parts))
        finally:
            engine.stop()


def _metrics(parts: Parts) -> Metrics:
    scheduler, policies = parts.core.config.scheduler, parts.config.policies
    return Metrics(
        parts.model.name,
        block_size=scheduler.block_size,
        kv_blocks=scheduler.blocks,
        victim_policy=policies.victim,
        way=policies.resume,
    )


@asynccontextmanager
async def _recording(parts: Parts) -> AsyncIterator[FileRecorder | None]:
    path = parts.config.engine.record
    if not path:
        yield None
        return
    recorder = FileRecorder()
    async with recorder.writing(Path(path), parts.core.config):
        yield recorder
    if recorder.failure is not None:
        log.error("recording_incomplete", path=path, reason=str(recorder.failure))
