"""BurstGPT: CSV of `Timestamp` (s), `Model`, `Request tokens`, `Response tokens`, `Total tokens`, `Log Type`.

Rows without response tokens are requests that failed, by the source's description; they are left out. No prefix
identity, no sessions. Source: HPMLL/BurstGPT, Wang et al., arXiv 2401.17644.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from app.workload.drawing import Drawing
from app.workload.reading import parsed, rows, seconds, tokens
from app.workload.trace import TraceRequest, from_first

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")


def load(path: Path, drawing: Drawing) -> list[TraceRequest]:
    """Nothing is drawn; arrivals count from the first. Raises TraceError."""
    numbers = count()
    found = parsed(path, rows(path, COLUMNS), lambda row: _request(row, numbers))
    return from_first(request for request in found if request is not None)


def _request(row: Mapping[str, str], numbers: "count[int]") -> TraceRequest | None:
    output = tokens(row["Response tokens"], least=0)
    if output == 0:
        return None
    number = next(numbers)
    return TraceRequest(
        number=number,
        session=str(number),
        arrival=seconds(row["Timestamp"]),
        prompt_tokens=tokens(row["Request tokens"]),
        output_tokens=output,
    )
