"""What a peer program and the bench say to each other: JSON lines over stdin and stdout.

A peer is started with a `Setup` as its only argument, says `{"ready": …}` once the model is loaded, then
answers every `Job` with one `Trace` a stream. It knows nothing of what is measured: bench/figures.py makes
figures of traces. Standard library only, since each peer lives in the Python of its engine.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

FIRST_PLAIN_ID = 16
"""Prompts are drawn from the ids from here on: below sit a tokenizer's special tokens."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a peer loads."""

    model: str  # a Hugging Face directory
    dtype: str  # float32 or bfloat16
    vocabulary: int
    kv_tokens: int  # what the KV cache must hold at least
    max_streams: int
    threads: int  # of the device's arithmetic


@dataclass(frozen=True, slots=True)
class Job:
    """`streams` prompts of `context` random tokens, `new_tokens` greedy ones after each, whatever they are.

    Prompts are a function of (seed, stream): two jobs of one seed share their prefixes, so that a peer with a
    prefix cache computes a context once.
    """

    streams: int
    context: int
    new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What came of a stream: its tokens, and when each came, in seconds since the job's submission."""

    tokens: list[int]
    times: list[float]


class Peer(Protocol):
    """A loaded engine."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader of the figures should know of it: its version, its settings."""

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Trace]:
        """All prompts at once, greedily, exactly `new_tokens` each -> one trace a prompt, in their order."""

    def close(self) -> None: ...


def prompts(job: Job, vocabulary: int) -> list[list[int]]:
    """The token ids of each stream's prompt."""
    ids = range(FIRST_PLAIN_ID, vocabulary)
    return [
        random.Random(f"{job.seed}/{stream}").choices(ids, k=job.context) for stream in range(job.streams)
    ]


def claim_stdout() -> TextIO:
    """Standard output for answers alone: what engines print goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def serve(load: Callable[[Setup], Peer], answers: TextIO | None = None) -> None:
    """A peer's whole life: load, then answer jobs until stdin ends."""
    answers = answers or claim_stdout()
    setup = Setup(**json.loads(sys.argv[1]))
    peer = load(setup)
    print(json.dumps({"ready": peer.facts}), file=answers)
    for line in sys.stdin:
        print(json.dumps({"traces": _answer(peer, setup, Job(**json.loads(line)))}), file=answers)
    peer.close()


def _answer(peer: Peer, setup: Setup, job: Job) -> list[dict[str, Any]]:
    traces = peer.generate(prompts(job, setup.vocabulary), job.new_tokens)
    assert all(len(t.tokens) == len(t.times) == job.new_tokens for t in traces), "a stream ended early"
    return [asdict(trace) for trace in traces]
