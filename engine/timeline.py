"""What was decided about each request, and when: kept for those at hand and for the last that ended."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from policies.decisions import Decision

KEPT_REQUESTS = 1_000
KEPT_DECISIONS = 200
"""Of a request; older ones than these are dropped, and counted."""


@dataclass(frozen=True, slots=True)
class Entry:
    at: float  # seconds of the engine's clock
    choice: int
    decision: Decision


@dataclass(slots=True)
class Timeline:
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=KEPT_DECISIONS))
    dropped: int = 0

    def add(self, entry: Entry) -> None:
        self.dropped += len(self.entries) == KEPT_DECISIONS
        self.entries.append(entry)


class Timelines:
    """The last requests that anything was decided about, the oldest dropped first."""

    def __init__(self) -> None:
        self._by_request: OrderedDict[str, Timeline] = OrderedDict()

    def note(self, request_id: str, choice: int, decision: Decision, at: float) -> None:
        timeline = self._by_request.setdefault(request_id, Timeline())
        self._by_request.move_to_end(request_id)
        timeline.add(Entry(at, choice, decision))
        if len(self._by_request) > KEPT_REQUESTS:
            self._by_request.popitem(last=False)

    def get(self, request_id: str) -> Timeline | None:
        return self._by_request.get(request_id)
