"""How the process logs: structlog, pretty on a terminal, a JSON object a line elsewhere; to standard error.

Nothing that clients wrote is ever logged, only counts, times and names; so tracebacks come without local
variables. Libraries' own logging joins ours. Lines are formatted and written on a thread of their own: who
reads standard error slowly never holds the event loop up.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from queue import Queue
from typing import TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from app.config import LogSection

MAX_UNWRITTEN = 10_000
"""Lines kept for a slow reader of the log; what comes on top is dropped."""


def _hold_exception(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """`exc_info=True` means "the one being handled", which only this thread knows."""
    if event.get("exc_info") is True:
        event["exc_info"] = sys.exc_info()
    return event


SHARED: list[Processor] = [
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


class BoundedQueueHandler(QueueHandler):
    """Hands records to the writing thread as they are, or drops them."""

    def __init__(self, records: Queue[logging.LogRecord]) -> None:
        super().__init__(records)
        self._records = records

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._records.qsize() < MAX_UNWRITTEN:  # else the log's reader is stuck: serving goes on
            self._records.put_nowait(record)


@contextmanager
def logging_to(stream: TextIO, log: LogSection) -> Iterator[None]:
    """Sets up structlog and the standard library's logging for the whole process, while the block runs."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *SHARED,
            _hold_exception,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    records: Queue[logging.LogRecord] = (
        Queue()
    )  # bounded by the handler: the writer's stop signal must get in
    writer = QueueListener(records, _writer(stream, log))
    root.handlers = [BoundedQueueHandler(records)]
    root.setLevel(log.level.upper())
    logging.getLogger("numba").setLevel(max(logging.WARNING, root.level))  # it logs each compiled instruction
    writer.start()
    try:
        yield
    finally:
        writer.stop()  # writes what is left
        root.handlers = handlers
        root.setLevel(level)
        structlog.reset_defaults()


def _writer(stream: TextIO, log: LogSection) -> logging.Handler:
    pretty = log.format == "console" or (log.format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=SHARED,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_pretty(stream) if pretty else _json()),
            ],
        )
    )
    return handler


def _pretty(stream: TextIO) -> list[Processor]:
    plain = structlog.dev.plain_traceback  # the default one shows local variables, and so prompts
    return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]


def _json() -> list[Processor]:
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    return [tracebacks, structlog.processors.JSONRenderer()]
