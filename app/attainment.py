"""Whether requests got what their service class is promised: `sluice:slo_requests_total{class,objective,met}`.

Counted by choice, over all that were attempted: one that is refused as the queue is full, or leaves after its objective
has passed without a token, has not been served as promised. One that leaves before could not be judged.
"""

from collections.abc import Iterator

from app.service_classes import ClassTable
from engine.request import Finished

TTFT = "ttft"
TPOT = "tpot"


def judged(choice: Finished, table: ClassTable) -> Iterator[tuple[str, bool]]:
    """(objective, met) of a choice that has ended, for each objective of its class that can be judged."""
    if table.ttft_seconds:
        end = choice.finished if choice.first_token is None else choice.first_token
        waited = end - choice.arrived
        if choice.first_token is not None or waited > table.ttft_seconds:
            yield TTFT, waited <= table.ttft_seconds
    if table.tpot_seconds and choice.first_token is not None and choice.output_tokens > 1:
        seconds = (choice.finished - choice.first_token) / (choice.output_tokens - 1)
        yield TPOT, seconds <= table.tpot_seconds


def refused(table: ClassTable) -> Iterator[tuple[str, bool]]:
    """Of a choice that the queue had no room for."""
    if table.ttft_seconds:
        yield TTFT, False
