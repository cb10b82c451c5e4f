"""A sequence: the engine's state of one choice of a request. Only the core changes it.

Three positions matter, always in this order: *computed* (KV is on the device), *scheduled* (computed, or told to be
by a step under way), *known + pending* (all tokens there are, the one being sampled included).
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from engine.plan import Sampling
from engine.request import Finished, FinishReason, Request, ServiceClass
from engine.snapshot import Snapshot, tail_of
from engine.text import OutputText
from kvstore.block import Key, extend_keys
from kvstore.shelf import Entry


class State(StrEnum):
    WAITING = "waiting"
    LOADING = "loading"  # its blocks and slot are reserved; some blocks are still on their way up
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Return:
    """A preempted sequence's way back, under way. `seconds` as predicted when the step was built that it begins in."""

    way: str
    tier: str  # the lowest that it takes from
    since: float
    target: int  # positions that it must have again
    seconds: float
    alternative_seconds: float | None  # of the best way not taken, as predicted when the way was chosen
    loading_seconds: float = 0.0  # of these, until what is loaded is there; it runs in the next step
    rest_seconds: float = 0.0  # and to compute what no tier has


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    number: int  # order of arrival
    sampling: Sampling  # of this choice
    text: OutputText
    root: Key  # parent of its first block's key
    arrived: float
    tokens: list[int]  # prompt and output, as far as known
    prompt_tokens: int  # how many of these are the prompt
    service: dict[str, float] = field(default_factory=dict)  # every tenant's, shared by all sequences

    state: State = State.WAITING
    ticket: int = 0  # of its entry in the waiting line that counts
    promoted: str = ""  # why it goes before all others; "" while it does not
    served_before: int = 0  # tokens served to anybody when it began to wait, and of its own prompt since
    snapshot: Snapshot | None = None  # taken when it was preempted, until it runs again
    way_back: Return | None = None
    pins: list[Entry] = field(default_factory=list)  # blocks below the device that are kept for it
    prefetched: bool = False  # since it began to wait
    held_back: bool = False  # since it began to wait
    epoch: int = 0  # grows when it loses its place: rows of steps under way are then void
    slot: int = -1  # of the runner, while running
    table: list[int] = field(default_factory=list)  # device blocks, held
    saved: int = 0  # blocks of the table that the store has, or was offered
    saved_at: float = 0.0
    told: int = 0  # length of the table's part that the runner has and that is still true
    keys: list[Key] = field(default_factory=list)  # of its full blocks, filled on demand
    published: int = 0  # blocks of the table cached under their keys
    head_end: int = (
        0  # in a split: positions below it are computed, while those up to `loaded_end` load; else 0
    )
    loaded_end: int = 0  # known when they have come
    loaded_full: int = 0  # full blocks up to there
    scheduled: int = 0
    computed: int = 0
    pending: int = 0  # tokens being sampled, at most one a step under way
    arriving: bool = False  # from another replica, where it is still served; its place here is reserved
    paused: bool = False  # it keeps its place, but computes nothing: it is about to go on elsewhere

    admissions: int = 0
    preemptions: int = 0
    waits: int = 0  # steps it sat out for want of blocks, since it was admitted
    admitted_as: int = -1
    computed_before: int = 0  # highest position + 1 ever computed for it: below this, work is done again
    cached_tokens: int = 0  # of the prompt, at the first admission
    recomputed_tokens: int = 0
    reloaded_tokens: int = 0  # brought up from below the device after a preemption
    promotions: int = 0
    migrations: int = 0  # times that it has gone on elsewhere
    migrated_at: float = float("-inf")  # the last time, or when it could not
    crossed: bool = False  # it has moved as it had become too long for its replica
    admitted: float | None = None
    waiting_since: float = 0.0
    queued_seconds: float = 0.0
    token_times: list[float] = field(default_factory=list)

    matched_tokens: int = 0  # when it was last looked up
    resume_seconds: float = 0.0  # predicted, when it was preempted
    expected_remaining_tokens: float = 0.0

    # of the request and the sampling: what is asked of all who run, in every step
    choice: int = field(init=False)
    max_tokens: int = field(init=False)
    priority: int = field(init=False)
    tenant: str = field(init=False)
    class_rank: int = field(init=False)
    weight: float = field(init=False)

    def __post_init__(self) -> None:
        self.choice = self.sampling.choice
        self._serve(self.request)

    def _serve(self, request: Request) -> None:
        """This is what it is asked for from now on."""
        self.request, self.max_tokens = request, request.stopping.max_tokens
        self.priority, self.tenant = request.priority, request.tenant
        self.class_rank, self.weight = request.service.rank, request.service.weight

    @classmethod
    def of(cls, snapshot: Snapshot, number: int, root: Key, vocabulary: tuple[bytes, ...]) -> "Sequence":
        """A sequence that goes on where the snapshot was taken; it has no place yet. `vocabulary`: see Core."""
        stopping = snapshot.request.stopping
        text = OutputText(vocabulary, stopping.stop, stopping.include_stop_str)
        sequence = cls(
            snapshot.request,
            number,
            snapshot.sampling,
            text,
            root,
            snapshot.arrived,
            [],
            len(snapshot.request.prompt),
        )
        sequence.restore(snapshot)
        if snapshot.admitted is None:
            sequence.snapshot = None  # it has never run: there is nothing to come back to
        else:
            sequence.admissions = 1
        return sequence

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def computed_tokens(self) -> int:
        return self.computed

    @property
    def held_blocks(self) -> int:
        return len(self.table)

    @property
    def kept_tokens(self) -> int:
        """All of its pins but the last are full blocks; without the first of them the others are no use."""
        if not self.pins or self.pins[0].doomed:
            return 0
        return self.pins[0].tokens * (len(self.pins) - 1) + self.pins[-1].tokens

    @property
    def expected_output_tokens(self) -> int | None:
        return self.request.expected_output_tokens

    @property
    def class_name(self) -> str:
        return self.request.service.name

    @property
    def tenant_service(self) -> float:
        return self.service.get(self.tenant, 0.0)

    @property
    def remaining(self) -> int:
        """Positions that a step could compute now. The last token allowed needs no KV: nobody reads it."""
        if self.paused:
            return 0
        if self.head_end:
            return self.head_end - self.scheduled
        known = len(self.tokens) + self.pending
        if known - self.prompt_tokens >= self.max_tokens:
            return 0
        return known - self.scheduled

    def block_keys(self, block_size: int) -> list[Key]:
        """Keys of all full blocks of the known tokens."""
        extend_keys(self.keys, self.root, self.tokens, block_size)
        return self.keys

    def take_snapshot(self, block_size: int) -> Snapshot:
        """All that it is now. Changes nothing."""
        full = self.computed // block_size
        keys = tuple(self.block_keys(block_size)[:full])
        return Snapshot(
            request=self.request,
            sampling=self.sampling,
            tokens=tuple(self.tokens),
            computed=self.computed,
            keys=keys,
            tail=tail_of(self.root, keys, tuple(self.tokens[full * block_size : self.computed])),
            text=self.text.state,
            arrived=self.arrived,
            admitted=self.admitted,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed_tokens,
            reloaded_tokens=self.reloaded_tokens,
            promotions=self.promotions,
            migrations=self.migrations,
            computed_before=max(self.computed_before, self.scheduled),
            queued_seconds=self.queued_seconds,
            token_times=tuple(self.token_times),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Becomes what the snapshot was taken of, as far as that does not depend on its place."""
        stopping = snapshot.request.stopping
        self._serve(snapshot.request)
        self.sampling, self.snapshot = snapshot.sampling, snapshot
        self.tokens, self.keys = list(snapshot.tokens), list(snapshot.keys)
        self.prompt_tokens = len(snapshot.request.prompt)
        self.text = OutputText(self.text.vocabulary, stopping.stop, stopping.include_stop_str, snapshot.text)
        self.arrived, self.admitted = snapshot.arrived, snapshot.admitted
        self.cached_tokens, self.preemptions = snapshot.cached_tokens, snapshot.preemptions
        self.recomputed_tokens, self.queued_seconds = snapshot.recomputed_tokens, snapshot.queued_seconds
        self.reloaded_tokens, self.promotions = snapshot.reloaded_tokens, snapshot.promotions
        self.migrations, self.computed_before = snapshot.migrations, snapshot.computed_before
        self.token_times = list(snapshot.token_times)

    def reprioritise(self, priority: int, service: ServiceClass) -> None:
        """It is as urgent as this from now on; its snapshot, if it has one, says so too."""
        self._serve(replace(self.request, priority=priority, service=service))
        if self.snapshot is not None:
            self.snapshot = replace(self.snapshot, request=self.request)

    def lose_place(self) -> None:
        """Its blocks and its slot are somebody else's from now on, and rows of steps under way are void."""
        self.table, self.slot, self.epoch = [], -1, self.epoch + 1
        self.scheduled = self.computed = self.pending = self.published = self.saved = self.told = 0
        self.head_end = self.loaded_end = self.loaded_full = self.waits = 0
        self.paused = False
        self.way_back = None

    def accounts(self, reason: FinishReason, now: float, replica: int) -> Finished:
        return Finished(
            request=self.request.id,
            choice=self.choice,
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed_tokens,
            arrived=self.arrived,
            admitted=self.admitted,
            first_token=self.token_times[0] if self.token_times else None,
            finished=now,
            queued_seconds=self.queued_seconds,
            reloaded_tokens=self.reloaded_tokens,
            promotions=self.promotions,
            migrations=self.migrations,
            replica=replica,
            service=self.class_name,
            tenant=self.tenant,
            token_times=self.token_times,
        )
