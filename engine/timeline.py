"""What was decided about each request, and when, and how it ended: of those at hand and of the last that ended."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace

from engine.request import Finished
from policies.decisions import Decision

KEPT_REQUESTS = 1_000
"""That have ended; the one that ended first is dropped first."""

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
    finished: list[Finished] = field(default_factory=list)  # choices that have ended, in that order

    def add(self, entry: Entry) -> None:
        self.dropped += len(self.entries) == KEPT_DECISIONS
        self.entries.append(entry)


class Timelines:
    def __init__(self) -> None:
        self._at_hand: dict[str, Timeline] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()

    def __len__(self) -> int:
        return len(self._at_hand) + len(self._ended)

    def note(self, request_id: str, choice: int, decision: Decision, at: float) -> None:
        """News of a request that has ended meanwhile still belongs to it."""
        timeline = self._ended.get(request_id) or self._at_hand.setdefault(request_id, Timeline())
        timeline.add(Entry(at, choice, decision))

    def settled(self, finished: Finished, *, last: bool) -> None:
        """A choice has ended; `last`: of its request."""
        timeline = self._at_hand.setdefault(finished.request, Timeline())
        timeline.finished.append(replace(finished, token_times=[]))  # of a thousand requests, megabytes
        if last:
            self._ended[finished.request] = self._at_hand.pop(finished.request)
            if len(self._ended) > KEPT_REQUESTS:
                self._ended.popitem(last=False)

    def ended_choices(self, request_id: str) -> list[Finished]:
        """Of a request that has not ended."""
        timeline = self._at_hand.get(request_id)
        return timeline.finished if timeline else []

    def get(self, request_id: str) -> Timeline | None:
        return self._at_hand.get(request_id) or self._ended.get(request_id)
