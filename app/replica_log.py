"""Log lines of replicas, when one is lost, started again or could not be; and one a migration. Metrics count them."""

from structlog.stdlib import get_logger

from engine.events import MigrationOver

log = get_logger(__name__)


class ReplicaLog:
    """Give `observe` to `Engine.on_replica`, `observe_migration` to `Engine.on_migration`."""

    def __init__(self) -> None:
        self._down: set[int] = set()

    def observe(self, number: int, up: bool, reason: str) -> None:
        if up:
            self._down.discard(number)
            log.info("replica_started_again", replica=number)
        elif number in self._down:
            log.error("replica_not_started", replica=number, reason=reason)
        else:
            self._down.add(number)
            log.error(
                "replica_lost",
                replica=number,
                reason=reason,
                consequence="its requests go on at the others, from what of them lies below its device",
            )

    def observe_migration(self, over: MigrationOver) -> None:
        told = {
            "id": over.request_id,
            "choice": over.choice,
            "source": over.source,
            "target": over.target,
            "reason": over.reason,
            "detail": over.detail,
            "live": over.live,
            "seconds": round(over.seconds, 6),
        }
        if over.failure:
            log.info("migration_failed", **told, failure=over.failure)
        else:
            pause, transfer = round(over.pause.seconds, 6), round(over.pause.transfer_seconds, 6)
            log.info("migrated", **told, pause_seconds=pause, transfer_seconds=transfer)
