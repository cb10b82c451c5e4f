"""A queue before a server that batches, in virtual time: enough of an engine to compare orders by, in seconds.

One step computes a token for everyone who decodes and fills the rest of its budget with prompts, and takes a fixed
time and a time per token. A request keeps its place once it has one. No memory, no cache, no preemption: see
engine/ for these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from policies.order import Order
from policies.prediction import Predictor


@dataclass(frozen=True, slots=True)
class Server:
    places: int = 32
    budget: int = 512  # tokens a step
    step_seconds: float = 0.01
    token_seconds: float = 0.0001

    def faster(self, factor: float) -> "Server":
        return Server(self.places, self.budget, self.step_seconds / factor, self.token_seconds / factor)


@dataclass(slots=True, eq=False)
class Job:
    """A request, as policies see it (policies.views.SequenceView), with its true length, which only an oracle reads."""

    number: int
    arrived: float
    prompt_tokens: int
    length: int
    class_name: str = ""
    expected_remaining_tokens: float = 0.0
    output_tokens: int = 0
    finished: float = -1.0

    max_tokens: int = 2**20
    waiting_since: float = 0.0
    admissions: int = 0
    admitted_as: int = -1
    preemptions: int = 0
    expected_output_tokens: int | None = None
    priority: int = 0
    tenant: str = ""
    class_rank: int = 0
    weight: float = 1.0
    computed_tokens: int = 0
    held_blocks: int = 0
    kept_tokens: int = 0
    matched_tokens: int = 0
    resume_seconds: float = 0.0
    tenant_service: float = 0.0

    @property
    def normalised_seconds(self) -> float:
        """Latency per token that came."""
        return (self.finished - self.arrived) / self.length


@dataclass(slots=True)
class Queue:
    """Serves jobs by arrival, once. Predicts as each arrives, and learns as each ends."""

    server: Server
    order: Order
    predictor: Predictor
    now: float = 0.0
    _rounds: int = 0  # of decoding, so far
    _waiting: list[tuple[tuple[float, ...], int, Job]] = field(default_factory=list)
    _prefilling: list[tuple[int, Job]] = field(default_factory=list)  # positions left to compute, in order
    _decoding: list[tuple[int, int, Job]] = field(default_factory=list)  # the round in which each ends

    def serve(self, jobs: Sequence[Job]) -> None:
        """Sets `finished` of all. `jobs` come by arrival."""
        coming = list(reversed(jobs))
        while coming or self._waiting or self._prefilling or self._decoding:
            if not (self._waiting or self._prefilling or self._decoding):
                self.now = max(self.now, coming[-1].arrived)
            while coming and coming[-1].arrived <= self.now:
                self._arrive(coming.pop())
            self._admit()
            self._step(coming[-1].arrived if coming else None)

    def _arrive(self, job: Job) -> None:
        job.expected_remaining_tokens = self.predictor.remaining(job)
        heappush(self._waiting, (self.order(job), job.number, job))

    def _admit(self) -> None:
        budget = self.server.budget - len(self._decoding) - sum(left for left, _ in self._prefilling)
        while self._waiting and budget > 0 and self._free_places:
            job = heappop(self._waiting)[-1]
            self._prefilling.append((job.prompt_tokens, job))
            budget -= job.prompt_tokens

    @property
    def _free_places(self) -> int:
        return self.server.places - len(self._prefilling) - len(self._decoding)

    def _step(self, next_arrival: float | None) -> None:
        """One step; or as many as are alike, where nobody prefills."""
        decoding = len(self._decoding)
        chunks = self._prefill(self.server.budget - decoding) if self._prefilling else 0
        seconds = self.server.step_seconds + self.server.token_seconds * (decoding + chunks)
        alike = 1 if chunks else self._steps_alike(seconds, next_arrival)
        self.now += alike * seconds
        self._rounds += alike
        self._end()

    def _steps_alike(self, seconds: float, next_arrival: float | None) -> int:
        until_the_first_ends = self._decoding[0][0] - self._rounds
        if next_arrival is None or not self._free_places:
            return until_the_first_ends
        return max(1, min(until_the_first_ends, int((next_arrival - self.now) / seconds) + 1))

    def _prefill(self, budget: int) -> int:
        """Computes prompts, the first first. With a prompt's last token comes the first of the answer."""
        computed = 0
        still: list[tuple[int, Job]] = []
        for left, job in self._prefilling:
            chunk = min(left, budget - computed)
            computed += chunk
            if chunk < left:
                still.append((left - chunk, job))
            else:
                heappush(self._decoding, (self._rounds + job.length, job.number, job))
        self._prefilling = still
        return computed

    def _end(self) -> None:
        while self._decoding and self._decoding[0][0] <= self._rounds:
            job = heappop(self._decoding)[-1]
            job.output_tokens, job.finished = job.length, self.now
            self.predictor.observe(job)
