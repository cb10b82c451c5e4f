"""How much one API key may ask for: calls at once, and calls a minute. Pure; time is the caller's.

Calls a minute are a bucket of tokens that holds a minute's worth: a key that was silent may ask for them all at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from app.keys import KeyTable

MINUTE = 60.0
BUSY_RETRY_SECONDS = 1


class OverLimit(Exception):
    """The key has used up what it may; `retry_after` in whole seconds."""

    def __init__(self, message: str, code: str, retry_after: int) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


@dataclass(slots=True)
class Allowance:
    """One key's. `now` never goes back."""

    key: KeyTable
    now: float
    running: int = 0
    left: float = 0.0  # of this minute's calls

    def __post_init__(self) -> None:
        self.left = float(self.key.requests_per_minute)

    def take(self, now: float) -> None:
        """Counts a call in; `give_back` when it has ended. Raises OverLimit, and counts nothing then."""
        most, rate = self.key.max_concurrent, self.key.requests_per_minute
        self.left = min(rate, self.left + (now - self.now) * rate / MINUTE)
        self.now = now
        if most and self.running >= most:
            message = f"this API key may have {most} calls at once"
            raise OverLimit(message, "concurrency_limit", BUSY_RETRY_SECONDS)
        if rate and self.left < 1:
            message = f"this API key may make {rate} calls a minute"
            raise OverLimit(message, "rate_limit_exceeded", ceil((1 - self.left) * MINUTE / rate))
        self.left -= 1
        self.running += 1

    def give_back(self) -> None:
        self.running -= 1


class Allowances:
    """Of all keys, by name; one is made when its key first asks."""

    def __init__(self) -> None:
        self._by_name: dict[str, Allowance] = {}

    @contextmanager
    def taking(self, key: KeyTable, now: float) -> Iterator[None]:
        """Counts a call while the block runs. Raises OverLimit."""
        allowance = self._by_name.get(key.name)
        if allowance is None:
            allowance = self._by_name[key.name] = Allowance(key, now)
        allowance.take(now)
        try:
            yield
        finally:
            allowance.give_back()
