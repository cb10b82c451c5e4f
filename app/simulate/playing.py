"""A trace as the simulator's workload: requests made when they arrive, followers when their predecessors have ended."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from app.workload.prompts import Prompts
from app.workload.trace import Trace
from engine.plan import Sampling
from engine.request import Request, Stopping
from engine.simulation import VOCABULARY_SIZE, Job


class TraceWorkload:
    """`context`: of the engine. `lengths_known`: clients ask for just as many tokens as will come (max_tokens).

    `cap`: what clients ask for at most; None: for all that the context has room for. `tenants`: whose a request is,
    by number; others are nobody's.
    """

    def __init__(
        self,
        trace: Trace,
        context: int,
        *,
        lengths_known: bool = False,
        cap: int | None = None,
        tenants: Mapping[int, str] | None = None,
    ) -> None:
        self._trace = {each.number: each for each in trace}
        self._prompts = Prompts(trace, VOCABULARY_SIZE)
        self._context = context
        self._lengths_known = lengths_known
        self._cap = cap
        self._tenants = tenants or {}
        self._followers: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for each in trace:
            if each.after is not None:
                self._followers[each.after].append((each.think_seconds, each.number))

    def openings(self) -> Iterable[tuple[float, int]]:
        return [(each.arrival, each.number) for each in self._trace.values() if each.after is None]

    def followers(self, number: int) -> Iterable[tuple[float, int]]:
        return self._followers.get(number, ())

    def job(self, number: int) -> Job:
        """An answer that the context has no room for is cut; a prompt that it has no room for will be refused."""
        each = self._trace[number]
        room = max(1, self._context - each.prompt_tokens)
        room = room if self._cap is None else min(room, self._cap)
        output = min(each.output_tokens, room)
        stopping = Stopping(output if self._lengths_known else room, ignore_eos=self._lengths_known)
        request = Request(
            id=str(number),
            prompt=tuple(self._prompts.tokens(each)),
            sampling=Sampling(seed=number),
            stopping=stopping,
            tenant=self._tenants.get(number, ""),
            session=each.session,
        )
        return Job(request, output, self._prompts.answer(each))
