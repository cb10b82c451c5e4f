"""`POST /admin/cache/verify`: reads and checks every record of the disk tier, beside whatever it is doing.

It runs on one of the tier's reading threads, one verification at a time. The answer is a line of JSON every now and
then, `{"checked", "total"}`, and a last one: `{"records", "corrupt", "lost"}`, or `{"error"}` where it did not get to
the end. What is corrupt is dropped, and so computed again when it is wanted. It ends early when its client leaves, or
the tier goes out of use.
"""

import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from threading import Event, Lock
from typing import Any

from aiohttp import web

from app.admin_cache import why_not_in_use
from app.admin_report import summary
from app.bodies import Nothing, read_json_if_any
from app.errors import ApiError
from app.metrics import METRICS, Metrics
from app.served import SERVED, Served
from engine.engine import Engine
from kvstore.block import Key
from kvstore.copies import DISK, Loss
from kvstore.disk import DiskTier
from kvstore.store import Store
from kvstore.tier import Tier

PROGRESS_SECONDS = 0.2
"""Between two lines, at least."""

VERIFYING: web.AppKey[Lock] = web.AppKey("verifying", Lock)
"""Held while a verification runs."""


class Stopped(Exception):
    """Nobody wants to know any more."""


class Verifying:
    """One verification: `work` is for a reading thread; `line` is what the event loop has last heard of it."""

    def __init__(self, store: Store, engine: Engine, metrics: Metrics, one_at_a_time: Lock) -> None:
        self.stop = Event()
        self._engine = engine
        self._metrics = metrics
        self._lost: tuple[tuple[Key, Loss], ...] = ()
        self._store = store
        self._one_at_a_time = one_at_a_time
        self._loop = asyncio.get_running_loop()
        self._line: dict[str, Any] | None = None
        self._told = asyncio.Event()
        self._told_at = float("-inf")
        self._ended = False

    def work(self, tier: Tier) -> None:
        """Whatever else it raises is for the store's log."""
        assert isinstance(tier, DiskTier)
        last: dict[str, Any] = {"error": ApiError(500, "it has failed; the log says why").body["error"]}
        try:
            found = tier.verify(self._progress)
            last = summary(found)
            self._lost = found.lost
        except Stopped:
            reason = self._store.down().get(DISK, "nobody was listening")
            last = {"error": ApiError(503, f"it was stopped: {reason}").body["error"]}
        finally:
            self._one_at_a_time.release()
            self._tell(last, ended=True)

    def _progress(self, checked: int, total: int) -> None:
        if self.stop.is_set():
            raise Stopped
        if time.monotonic() - self._told_at >= PROGRESS_SECONDS:
            if DISK in self._store.down():
                raise Stopped
            self._told_at = time.monotonic()
            self._tell({"checked": checked, "total": total})

    def _tell(self, line: dict[str, Any], *, ended: bool = False) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._hear, line, ended)

    def _hear(self, line: dict[str, Any], ended: bool) -> None:
        self._line, self._ended = line, ended
        if ended:
            self._engine.damaged(DISK, [key for key, _ in self._lost])
            losses = Counter(kind for _, kind in self._lost)
            self._store.count_losses(DISK, losses)
            self._metrics.observe_losses(DISK, losses)
        self._told.set()

    async def next_line(self) -> tuple[dict[str, Any], bool]:
        """The newest news, and whether it is the last. What a slow reader has not read is left out."""
        await self._told.wait()
        self._told.clear()
        assert self._line is not None
        return self._line, self._ended


async def verify(http: web.Request) -> web.StreamResponse:
    await read_json_if_any(http, Nothing)
    served = http.app[SERVED]
    verifying = _begin(http, served, http.app[VERIFYING])
    try:
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await answer.prepare(http)
        ended = False
        while not ended:
            line, ended = await verifying.next_line()
            await answer.write(json.dumps(line).encode() + b"\n")
        await answer.write_eof()
    finally:
        verifying.stop.set()
    return answer


def _begin(http: web.Request, served: Served, one_at_a_time: Lock) -> Verifying:
    """Raises ApiError 409: there is no disk in use, or another verification runs."""
    reason, store = why_not_in_use(served, DISK), served.store
    if reason or store is None:
        raise ApiError(409, f"the disk tier is not in use: {reason}", code="tier_not_in_use")
    if not one_at_a_time.acquire(blocking=False):
        raise ApiError(409, "a verification is running already", code="already_verifying")
    verifying = Verifying(store, served.engine, http.app[METRICS], one_at_a_time)
    if not store.run_among_reads(DISK, verifying.work):
        one_at_a_time.release()
        raise ApiError(409, "the disk tier has just gone out of use", code="tier_not_in_use")
    return verifying
