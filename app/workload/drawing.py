"""What is drawn where a source has no requests but their statistics: how fast, for how long, by which seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Drawing:
    """Formats that record arrivals ignore it."""

    seed: int = 0
    rate: float | None = None  # requests (of sessions: sessions) per second; None: the source's own, else 1
    seconds: float = 600.0  # how much of the source's time, where it has one

    def random(self, *what: object) -> Random:
        """A generator of its own for each purpose, so that drawing more of one does not change the others."""
        return Random(" ".join(map(str, (self.seed, *what))))  # noqa: S311 (the same again for the same seed is what it is for)


def poisson(random: Random, rate: float) -> Iterator[float]:
    """Arrival times of a Poisson process, without end."""
    now = 0.0
    while True:
        now += random.expovariate(rate)
        yield now
