"""How a trace is played, in virtual time or against a server: at which rate, how much of it, how large."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.workload.drawing import Drawing
from app.workload.formats import DRAWN
from app.workload.trace import TraceRequest
from app.workload.transform import at_rate, clipped, first, retimed, scaled, until


@dataclass(frozen=True, slots=True)
class Playing:
    """What is done to a trace before it is played."""

    form: str  # of the trace file
    seed: int = 0
    poisson: bool = False  # new arrivals at the rate, instead of thinning
    seconds: float | None = None  # sessions that open before
    requests: int | None = None
    scale_blocks: int | None = None  # tokens of what was a recorded block
    clip: bool = False  # to the context

    def drawing(self, rate: float | None) -> Drawing:
        return Drawing(self.seed, rate, self.seconds or Drawing().seconds)

    def played(self, trace: Sequence[TraceRequest], rate: float | None, context: int) -> list[TraceRequest]:
        """The trace at a rate, cut and scaled. Raises CannotTransform."""
        played = list(trace)
        if rate is not None and self.poisson:
            played = retimed(played, rate, self.seed)
        elif rate is not None and self.form not in DRAWN:
            played = at_rate(played, rate, self.seed)
        if self.seconds is not None:
            played = until(played, self.seconds)
        if self.requests is not None:
            played = first(played, self.requests)
        if self.scale_blocks is not None:
            played = scaled(played, self.scale_blocks)
        return clipped(played, context) if self.clip else played
