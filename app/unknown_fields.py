"""Fields of calls that Sluice does not know: ignored, but each is logged once, so that nobody wonders for long.

Names are the clients' words, and the log has none of those: a name that does not look like one is not logged.
"""

import re
from collections.abc import Iterable

from structlog.stdlib import BoundLogger, get_logger

from app.schema import NEUTRAL

MAX_NAMES = 256
"""More names are forgotten at once: somebody makes them up."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)


class UnknownFields:
    def __init__(self, log: BoundLogger | None = None) -> None:
        self._log: BoundLogger = log or get_logger("sluice.requests")
        self._seen: set[str] = set(NEUTRAL)

    def note(self, names: Iterable[str]) -> None:
        """Fields that were in a call and mean nothing."""
        for name in names:
            if name not in self._seen and len(self._seen) < MAX_NAMES and _NAME.fullmatch(name):
                self._seen.add(name)
                self._log.info("unknown_field_ignored", field=name)
