"""One model and dtype, all peers side by side: loads them, runs every cell, yields raw rows.

All peers stay loaded; one at a time has work, the others sleep on their input. Their order turns round with
every repeat, so that none always follows the same neighbour.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import figures
from bench.cells import Cell, Kind
from bench.machine import Others
from bench.peers.wire import Job, Setup, Trace
from bench.process import PeerFailed, PeerProcess, Program

REFERENCE = "generate"
"""The peer whose tokens are compared with: plain transformers."""

PREFILL_NEW_TOKENS = 1
SETTLING_SECONDS = 0.5
"""Before each timed run: the threads of who ran before it may spin on for 0.2 s (OpenMP's), on the cores it needs."""
PROBE_TOKENS = 8
"""New tokens of the untimed run that brings a decode's context into the cache and shows the peer's speed."""


class ModelChanged(Exception):
    """Peers may have loaded different weights."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much time goes into a cell."""

    repeats: int = 5
    seconds: float = 1.0  # aimed at for a peer's decode: its new tokens follow from its speed
    min_tokens: int = 8
    max_tokens: int = 64
    patience_seconds: float = (
        90.0  # a peer that would take longer to compute a cell's prompts leaves that cell out
    )

    def within(self, cell: Cell, max_positions: int) -> Cell:
        """The cell as a model of so many positions runs it: what is generated has room after the context."""
        new_tokens = PREFILL_NEW_TOKENS if cell.kind is Kind.PREFILL else self.max_tokens
        return cell.within(max_positions, new_tokens)


class Session:
    """`parent` is the bench's own process; `note` is told in words what happens, for whoever watches."""

    def __init__(
        self, setup: Setup, max_positions: int, effort: Effort, parent: int, note: Callable[[str], None]
    ) -> None:
        self.setup = setup
        self.absent: dict[str, str] = {}  # peer -> why
        self._max_positions = max_positions
        self._effort = effort
        self._parent = parent
        self._note = note
        self._peers: list[PeerProcess] = []
        self._prefill_rates: dict[str, float] = {}  # tokens/s, as last seen
        self._probe_rates: dict[str, float] = {}  # the same of decodes' contexts, part of which may be cached

    def load(self, programs: Sequence[Program]) -> None:
        """A peer that cannot be started is absent, with the reason. Raises ModelChanged."""
        before = weights_state(Path(self.setup.model))
        for program in programs:
            self._note(f"loading {program.name}")
            try:
                self._peers.append(PeerProcess(program, self.setup))
            except (PeerFailed, OSError) as error:
                self.absent[program.name] = str(error)
        if weights_state(Path(self.setup.model)) != before:
            raise ModelChanged(f"{self.setup.model} was written while it was loaded: measure a copy")

    def close(self) -> None:
        for peer in self._peers:
            peer.close()

    @property
    def facts(self) -> dict[str, Any]:
        return {peer.name: peer.facts for peer in self._peers}

    def rows(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """`effort.repeats` rows a peer, as they come."""
        jobs = {}
        for peer in list(self._peers):
            self._note(f"{cell.kind} {cell.streams} x {cell.context}: warming {peer.name}")
            if (job := self._prepared(peer, cell)) is not None:
                jobs[peer] = job
        for repeat in range(self._effort.repeats):
            self._note(f"{cell.kind} {cell.streams} x {cell.context}: repeat {repeat + 1}")
            order = [peer for peer in self._peers if peer in jobs]
            turned = order[::-1] if repeat % 2 else order
            yield from self._repeat(cell, repeat, {peer: jobs[peer] for peer in turned})

    def _prepared(self, peer: PeerProcess, cell: Cell) -> Job | None:
        """An untimed run, and the job that follows from it; None when the peer is too slow for the cell."""
        first = self._job(cell, repeat=-1)
        if (expected := self._expected_seconds(peer, first)) > self._effort.patience_seconds:
            self._note(f"{peer.name} leaves out {cell}: its prompts would take {expected:.0f} s")
            return None
        traces = self._asked(peer, first)
        if traces is None:
            return None
        if cell.kind is Kind.PREFILL:
            return first
        self._probe_rates[peer.name] = _prefill_rate(first, traces)
        # Computing the contexts may have taken the last stream longer than the first one's few tokens. They
        # are cached now, so that more tokens are enough.
        again = replace(first, new_tokens=self._effort.max_tokens)
        return self._timed(first, traces) or self._timed(again, self._asked(peer, again))

    def _expected_seconds(self, peer: PeerProcess, job: Job) -> float:
        """For the prompts, by what prefills showed; by decodes where none was run; 0 as long as none was."""
        rate = self._prefill_rates.get(peer.name, self._probe_rates.get(peer.name))
        return 0.0 if rate is None else job.streams * job.context / rate

    def _timed(self, job: Job, traces: Sequence[Trace] | None) -> Job | None:
        """The job with as many new tokens as fill the time aimed at; None when its decode was not seen."""
        if traces is None:
            return None
        try:
            seconds, tokens = figures.decode_window(traces)
        except figures.Unmeasurable as error:
            self._note(f"{job} tells nothing of decoding: {error}")
            return None
        steps = round(self._effort.seconds / seconds * tokens / job.streams)
        return replace(job, new_tokens=min(self._effort.max_tokens, max(self._effort.min_tokens, steps)))

    def _job(self, cell: Cell, repeat: int) -> Job:
        """Prefills compute new prompts each time; decodes share theirs, so contexts are cached."""
        context = self._effort.within(cell, self._max_positions).context
        if cell.kind is Kind.PREFILL:
            # By the cell's own context: of two shortened alike, the second must not find the first's cached.
            seed = (cell.context * 1000 + cell.streams) * 100 + repeat + 2
            return Job(cell.streams, context, PREFILL_NEW_TOKENS, seed)
        return Job(cell.streams, context, PROBE_TOKENS, 0)

    def _asked(self, peer: PeerProcess, job: Job) -> Sequence[Trace] | None:
        """None when the peer died of it; it is absent from then on."""
        try:
            traces = peer.ask(job)
        except PeerFailed as error:
            self.absent[peer.name] = str(error)
            self._note(f"{peer.name} failed: {error}")
            self._peers.remove(peer)
            peer.close()
            return None
        if job.new_tokens == PREFILL_NEW_TOKENS:
            self._prefill_rates[peer.name] = _prefill_rate(job, traces)
        return traces

    def _repeat(self, cell: Cell, repeat: int, jobs: dict[PeerProcess, Job]) -> Iterator[dict[str, Any]]:
        """Runs one repeat of each peer; rows come after all ran, since they need the reference's tokens."""
        done: list[tuple[str, Sequence[Trace], dict[str, Any]]] = []
        for place, (peer, job) in enumerate(jobs.items()):
            asked = replace(job, seed=self._job(cell, repeat).seed)
            time.sleep(SETTLING_SECONDS)
            others = Others(self._parent, peer.pid)
            at, traces = time.time(), self._asked(peer, asked)
            if traces is None:
                continue
            cores = round(others.cores(), 3)
            facts = {"at": at, "place": place, "others_cores": cores, "job": asdict(asked)}
            try:
                done.append((peer.name, traces, facts | _figure(asked, traces)))
            except figures.Unmeasurable as error:
                self._note(f"{peer.name}, {asked} tells nothing of decoding: {error}")
        reference = next((traces for name, traces, _ in done if name == REFERENCE), None)
        for name, traces, facts in done:
            agrees = None if reference is None else figures.agreement(traces, reference)
            yield row(self.setup, cell, name) | {"repeat": repeat, "agrees": agrees} | facts


def weights_state(directory: Path) -> dict[str, int]:
    """When each file that says what the weights are, or how to use them, was written."""
    files = [directory / "config.json", *directory.glob("*.safetensors*")]  # an index of shards too
    return {path.name: path.stat().st_mtime_ns for path in sorted(files)}


def row(setup: Setup, cell: Cell, peer: str) -> dict[str, Any]:
    """What says which cell and whose figure a row is."""
    which = {"dtype": setup.dtype, "kind": cell.kind, "streams": cell.streams, "context": cell.context}
    return {"model": setup.model, "peer": peer} | which


def _prefill_rate(job: Job, traces: Sequence[Trace]) -> float:
    """Tokens of prompts a second."""
    return job.streams * job.context / figures.prefill_seconds(traces)


def _figure(job: Job, traces: Sequence[Trace]) -> dict[str, Any]:
    if job.new_tokens == PREFILL_NEW_TOKENS:
        seconds, tokens = figures.prefill_seconds(traces), job.streams * job.context
    else:
        seconds, tokens = figures.decode_window(traces)
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
