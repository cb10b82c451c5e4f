"""The life of a serving process: its threads, signals, draining, and the exit code.

The main thread loads the model and then runs the first replica's steps (torch on a second thread measured 25–35 %
slower); the event loop, with HTTP and the engine's core, has the second thread, and signals too (`app/signals.py`).
Other replicas, and a first one that was started again, have a thread each (engine/worker.py). The process ends by a
signal, or with the last replica. Nothing here knows what is served: see `app/compose.py`.
"""

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import Any

from structlog.stdlib import get_logger

from app.config import ServerSection
from app.loop import new_event_loop
from app.server import listen
from app.serving import Parts, serving
from app.signals import stop_signals
from engine.engine import Engine

EXIT_OK = 0
EXIT_ENGINE_DIED = 1
EXIT_AT_ONCE = 130  # as after Ctrl-C

TOKENIZER_THREADS = 2
DEATH_NOTICE_SECONDS = 1.0
"""After the engine has died, for the handlers to tell their clients."""

LEAVING_SECONDS = 60.0
"""For the main thread to end its step when all else has ended; then it hangs, and the process ends without it."""

LAST_WORDS_SECONDS = 1.0
"""For the log to be written then."""

log = get_logger(__name__)


def run(parts: Parts, listener: socket.socket) -> int:
    """Serves until a signal, or until the engine dies; returns the exit code. Call it on the main thread."""
    with stop_signals() as signals:
        service = Service(parts, listener, signals)
        service.thread.start()
        try:
            parts.worker.run_forever()  # a first replica that is lost ends it: the others go on
        finally:
            service.left.set()
            service.thread.join()
    return service.exit_code


class Service:
    """The event loop's thread and all that runs on it."""

    def __init__(self, parts: Parts, listener: socket.socket, signals: socket.socket) -> None:
        self.exit_code = EXIT_ENGINE_DIED
        self.left = Event()  # the main thread has no steps to run any more
        self.thread = Thread(target=self._run, name="event loop")
        self._parts = parts
        self._listener = listener
        self._signals = signals
        self._loop = new_event_loop()
        self._stop = asyncio.Event()

    def _signalled(self) -> None:
        """The first signal drains; the second ends the process on the spot."""
        count = len(self._signals.recv(16))
        if self._stop.is_set() or count > 1:
            os._exit(EXIT_AT_ONCE)
        self._stop.set()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            self._loop.set_default_executor(ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer"))
            try:
                self.exit_code = runner.run(self._serve())
            except Exception:
                log.exception("server_failed")
            finally:
                self._parts.worker.stop()
        self._end_without_main_thread()

    def _end_without_main_thread(self) -> None:
        """If it hangs in a step: a first replica that was given up may do so for ever."""
        if self.left.wait(LEAVING_SECONDS):
            return
        log.critical("runner_hangs", seconds=LEAVING_SECONDS)
        if not self.left.wait(LAST_WORDS_SECONDS):
            os._exit(self.exit_code)

    async def _serve(self) -> int:
        self._loop.add_reader(self._signals, self._signalled)
        server = self._parts.config.server
        async with serving(self._parts) as (engine, app):
            site = await listen(app, server, self._listener)
            log.info("ready", url=_url(self._listener), model=self._parts.model.name)
            try:
                return await self._until_the_end(engine, server)
            finally:
                await site.cleanup()

    async def _until_the_end(self, engine: Engine, server: ServerSection) -> int:
        stop = asyncio.ensure_future(self._stop.wait())
        ends: set[asyncio.Future[Any]] = {stop, engine.dead}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if engine.failure is None:
            log.info("draining", running=len(engine.requests()), seconds=server.drain_seconds)
            finished = await engine.drain(server.drain_seconds)
            log.info("drained", all_finished=finished)
        if engine.failure is None:
            return EXIT_OK
        log.critical("engine_died", exc_info=engine.failure)
        await asyncio.sleep(DEATH_NOTICE_SECONDS)
        return EXIT_ENGINE_DIED


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
