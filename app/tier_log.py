"""One log line for each kind of failure of a tier, not one for each block: metrics count those."""

import time
from collections.abc import Callable

from structlog.stdlib import get_logger

from engine.records import CopyRecord
from kvstore.copies import Loss

SILENCE_SECONDS = 60.0
"""After a line, for the same tier and kind."""

MEANING = {
    Loss.MISSING: "records that the index promised are not there",
    Loss.CORRUPT: "checksums do not hold: the disk, or somebody else, has changed the store",
    Loss.IO: "the system refuses to read or write",
    Loss.FULL: "there is no room: the file system, or kvstore.disk.bytes, is full",
    Loss.DOWN: "the tier is out of use",
}

log = get_logger(__name__)


class TierLog:
    """Give `observe` to `Engine.on_copy`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._silent_until: dict[tuple[str, Loss], float] = {}

    def observe(self, copy: CopyRecord) -> None:
        for kind, blocks in copy.losses.items():
            key, now = (copy.failed_tier, kind), self._clock()
            if now >= self._silent_until.get(key, now):
                self._silent_until[key] = now + SILENCE_SECONDS
                log.warning(
                    "kv_blocks_lost",
                    tier=copy.failed_tier,
                    kind=kind.value,
                    meaning=MEANING[kind],
                    blocks=blocks,
                    consequence="they are computed again when they are needed; more of the kind is only counted",
                )
