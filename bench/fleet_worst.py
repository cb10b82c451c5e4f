"""Why: the requests whose first tokens came latest in a simulated run, and what was decided about them."""

from itertools import chain

from rich.console import Console

from engine.events import Decided, Event
from engine.fleet import Told
from engine.simulation import Outcome


class Decisions:
    """A recorder that keeps what was decided, by request."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[float, Decided]]] = {}

    def __call__(self, now: float, event: Event, told: list[Told]) -> None:
        for each in chain.from_iterable(instructions for _, instructions in told):
            if isinstance(each, Decided):
                self.of.setdefault(each.request_id, []).append((now, each))


def show_worst(outcome: Outcome, decisions: Decisions, count: int, to: Console) -> None:
    timed = [
        (each.first_token - each.arrived, each) for each in outcome.served if each.first_token is not None
    ]
    for ttft, each in sorted(timed, key=lambda pair: -pair[0])[:count]:
        admitted = each.arrived if each.admitted is None else each.admitted
        to.print(
            f"  request {each.number} at {each.arrived:.2f} s: {each.prompt_tokens} + {each.output_tokens} tokens, "
            f"{each.cached_tokens} cached; first token after {ttft:.3f} s, admitted after "
            f"{admitted - each.arrived:.3f} s, preempted {each.preemptions} times",
            highlight=False,
        )
        for now, told in decisions.of.get(str(each.number), ()):
            decision = told.decision
            prices = ", ".join(f"{way.name[8:]}: {way.price:.2f}" for way in decision.alternatives[:4])
            to.print(
                f"    {now - each.arrived:8.3f} s  {decision.kind} {decision.chosen}: {decision.reason} ({prices})",
                highlight=False,
            )
