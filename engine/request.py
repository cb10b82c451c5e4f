"""What a client asked for, and what it gets back: the engine's border, in plain data.

Nothing of HTTP here (see app/), nothing of a sequence's inner state (see engine/sequence.py).
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from engine.plan import Logprob, Sampling


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"  # the client left, or an operator cancelled it
    ERROR = "error"  # its replica was lost, and no other could take it


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a sequence ends. Tokens that stop are counted in usage; their text is never sent out."""

    max_tokens: int
    min_tokens: int = (
        0  # before this many, neither end-of-sequence nor stop tokens are drawn, nor stop strings heeded
    )
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str: bool = False  # leave the stop string in the text


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """How urgent a request is beside others; `rank` 0 is the most urgent."""

    name: str = ""
    rank: int = 0
    weight: float = 1.0  # what a second of its delay costs


@dataclass(frozen=True, slots=True)
class Request:
    """A validated request. `prompt` is not empty; `sampling.choice` is 0, the engine counts choices up."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    n: int = 1
    priority: int = 0  # lower first
    salt: str = ""  # separates tenants in the prefix cache
    tenant: str = ""  # whose it is, for fairness: one name per API key
    service: ServiceClass = ServiceClass()
    expected_output_tokens: int | None = None  # the client's hint
    session: str = ""  # requests of one session are best served where the last one was


class Delta(NamedTuple):
    """News of one choice. Texts of a choice's deltas, joined, are its whole text."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()  # one a token when asked for, else empty
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it, if any


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int  # of all choices
    cached_tokens: int  # of the prompt, had before the request came


@dataclass(slots=True)
class Finished:
    """The accounts of one sequence (choice) at its end. Times are seconds of the engine's clock; None: never came."""

    request: str
    choice: int
    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    recomputed_tokens: int  # positions computed again after a preemption
    arrived: float
    admitted: float | None
    first_token: float | None
    finished: float
    queued_seconds: float  # waiting in all, before and between admissions
    reloaded_tokens: int = 0  # positions brought up from below the device after a preemption
    promotions: int = 0
    migrations: int = 0
    replica: int = 0  # where it ended
    service: str = ""  # the class's name
    tenant: str = ""
    token_times: list[float] = field(default_factory=list)  # when each token came, for inter-token latency


class Refused(Exception):
    """The engine cannot take a request. `param` names the field to change, `code` is the API's."""

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class QueueFull(Refused):
    """Too many requests wait already (engine.max_queue): come back later."""


class EngineDead(Exception):
    """The engine has died; the process is about to end."""
