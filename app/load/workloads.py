"""From arguments to what is played at a rate: a recorded trace or made-up sessions, with arrivals. No network."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from app.load.synthetic import Lengths, Synthetic, synthetic
from app.workload.drawing import Drawing
from app.workload.formats import DRAWN, detect, load
from app.workload.playing import Playing
from app.workload.trace import TraceRequest, in_order, openings
from app.workload.transform import CannotTransform, retimed

SYNTHETIC_REQUESTS = 100


class Workloads:
    """The same for the same arguments, at each rate."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._arrivals: str = options.arrivals or ("recorded" if options.trace else "poisson")
        if self._arrivals == "recorded" and not options.trace:
            raise CannotTransform("--arrivals recorded needs a --trace")
        if self._arrivals in ("poisson", "constant") and not options.rate:
            raise CannotTransform(f"{self._arrivals} arrivals need a --rate")

    def at(self, rate: float | None) -> list[TraceRequest]:
        """Raises TraceError, CannotTransform."""
        found = self._recorded(rate) if self._options.trace else self._made_up(rate)
        if not found:
            raise CannotTransform("nothing is left to send: raise the rate or the limits")
        if self._arrivals == "at_once":
            return _opened(found, iter(lambda: 0.0, None))
        if self._arrivals == "constant":
            assert rate is not None
            return _opened(found, (number / rate for number in count()))
        return found

    def _recorded(self, rate: float | None) -> list[TraceRequest]:
        options = self._options
        form = options.format or detect(options.trace)
        playing = Playing(
            form=form,
            seed=options.seed,
            poisson=self._arrivals == "poisson",
            seconds=options.seconds,
            requests=options.requests,
            scale_blocks=options.scale_blocks,
            clip=options.context is not None,
        )
        drawn = rate if form in DRAWN else None
        thinned = rate if self._arrivals in ("poisson", "recorded") else None
        loaded = load(options.trace, playing.drawing(drawn), form)
        return playing.played(loaded, thinned, options.context or 0)

    def _made_up(self, rate: float | None) -> list[TraceRequest]:
        options = self._options
        requests = options.requests or SYNTHETIC_REQUESTS
        what = Synthetic(
            sessions=-(-requests // options.turns),
            input=Lengths(*options.input_tokens),
            output=Lengths(*options.output_tokens),
            turns=options.turns,
            turn_input=Lengths(*options.turn_tokens),
            think_seconds=options.think,
            shared_tokens=options.shared_tokens,
        )
        made = synthetic(what, Drawing(options.seed))
        return retimed(made, rate, options.seed) if rate and self._arrivals == "poisson" else made


def _opened(trace: list[TraceRequest], arrivals: Iterator[float]) -> list[TraceRequest]:
    """Openings at these times, in their order; a follow-up waits for its predecessor anyway."""
    at = {each.number: next(arrivals) for each in openings(trace)}
    return in_order(replace(each, arrival=at.get(each.number, each.arrival)) for each in trace)
