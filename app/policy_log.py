"""Log lines of plug-ins that fail: one for each thing that one does, not one for each time. Metrics count those."""

from structlog.stdlib import get_logger

from engine.events import PolicyFailed

REASONS = 20
"""Of one plug-in that are told: what it returns may be different each time."""

log = get_logger(__name__)


class PolicyLog:
    """Give `observe` to `Engine.on_policy_failed`."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], set[str]] = {}

    def observe(self, failed: PolicyFailed) -> None:
        told = self._told.setdefault((failed.family, failed.name), set())
        if failed.what in told or len(told) == REASONS:
            return
        told.add(failed.what)
        log.warning(
            "policy_failed",
            family=failed.family,
            policy=failed.name,
            what=failed.what,
            consequence="the plainest policy decided instead; the same again is only counted",
        )
