"""From a simulated run of several replicas to figures of the fleet: how even it was, and who moved. Pure arithmetic."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.simulate.figures import Spread, spread
from engine.simulation import Outcome


@dataclass(frozen=True, slots=True)
class FleetFigures:
    busy: tuple[float, ...]  # share of the time that each device computed
    imbalance: float  # busy seconds: the most ÷ the mean; 1 is even
    live: int  # migrations of who ran on meanwhile …
    from_snapshots: int  # … and of who waited, or gave up its place
    failed: int
    stayed: int  # had outgrown their replica, and found no room
    pauses: Spread | None  # seconds, of live migrations
    forecast_errors: tuple[float, ...]  # by replica: Σ |predicted − actual| ÷ Σ actual KV positions

    def row(self) -> dict[str, Any]:
        return asdict(self)


def fleet_figures(outcome: Outcome) -> FleetFigures:
    moved = [each for each in outcome.migrations if not each.failure]
    live = [each for each in moved if each.live]
    seconds = outcome.seconds or 1.0
    return FleetFigures(
        busy=tuple(each / seconds for each in outcome.busy_by_replica),
        imbalance=imbalance(outcome.busy_by_replica),
        live=len(live),
        from_snapshots=len(moved) - len(live),
        failed=len(outcome.migrations) - len(moved),
        stayed=outcome.stayed,
        pauses=spread(each.pause.seconds for each in live),
        forecast_errors=tuple(outcome.forecast_errors),
    )


def imbalance(busy_seconds: Sequence[float]) -> float:
    """The most ÷ the mean; 1 where nothing was computed."""
    total = sum(busy_seconds)
    return max(busy_seconds) * len(busy_seconds) / total if total else 1.0
