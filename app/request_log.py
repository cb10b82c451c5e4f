"""One log line a finished request: its accounts, never its text.

A request's choices end one by one; the line is written when the last has. Who registered a request with
`opened` need not come back: the engine reports every end, cancelled ones included.
"""

from dataclasses import dataclass, field

from structlog.stdlib import BoundLogger, get_logger

from engine.request import Finished

TENANT_DIGITS = 8
"""Of the hash of its API key: enough to tell tenants apart."""


@dataclass(slots=True)
class OpenRequest:
    endpoint: str
    model: str
    choices: int
    client_id: str | None  # the client's own x-request-id
    finished: list[Finished] = field(default_factory=list)


class RequestLog:
    def __init__(self, log: BoundLogger | None = None) -> None:
        self._log: BoundLogger = log or get_logger("sluice.requests")
        self._open: dict[str, OpenRequest] = {}

    def opened(self, request_id: str, request: OpenRequest) -> None:
        """Call it just before the request is submitted."""
        self._open[request_id] = request

    def refused(self, request_id: str) -> None:
        """The engine did not take it: no line."""
        del self._open[request_id]

    def finished(self, choice: Finished) -> None:
        """The engine's observer."""
        request = self._open.get(choice.request)
        if request is None:
            return  # not a client's: the engine's own warm-up, a test
        request.finished.append(choice)
        if len(request.finished) == request.choices:
            del self._open[choice.request]
            self._log.info("request_finished", **accounts(choice.request, request))


def accounts(request_id: str, request: OpenRequest) -> dict[str, object]:
    """The line's fields. Seconds count from arrival; tokens of all choices are added up."""
    choices = request.finished
    arrived = min(choice.arrived for choice in choices)
    first_tokens = [choice.first_token for choice in choices if choice.first_token is not None]
    e2e = max(choice.finished for choice in choices) - arrived
    output_tokens = sum(choice.output_tokens for choice in choices)
    return {
        "id": request_id,
        "client_id": request.client_id,
        "endpoint": request.endpoint,
        "model": request.model,
        "choices": request.choices,
        "prompt_tokens": choices[0].prompt_tokens,
        "cached_tokens": next(
            (c.cached_tokens for c in choices if c.choice == 0), 0
        ),  # had before the request came
        "output_tokens": output_tokens,
        "queued_seconds": round(max(choice.queued_seconds for choice in choices), 6),
        "ttft_seconds": round(min(first_tokens) - arrived, 6) if first_tokens else None,
        "e2e_seconds": round(e2e, 6),
        "tokens_per_second": round(output_tokens / e2e, 1) if e2e > 0 else None,
        "finish_reason": ",".join(sorted({choice.reason.value for choice in choices})),
        "preemptions": sum(choice.preemptions for choice in choices),
        "recomputed_tokens": sum(choice.recomputed_tokens for choice in choices),
        "reloaded_tokens": sum(choice.reloaded_tokens for choice in choices),
        "promotions": sum(choice.promotions for choice in choices),
        "replica": choices[-1].replica,  # where the last choice ended
        "migrations": sum(choice.migrations for choice in choices),
        "class": choices[0].service,
        "tenant": choices[0].tenant[:TENANT_DIGITS],
    }
