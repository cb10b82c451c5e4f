"""Azure's inference traces: CSV of `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`. No prefix identity.

Source: Azure/AzurePublicDataset, Patel et al., ISCA 2024.
"""

from collections.abc import Mapping
from datetime import datetime
from itertools import count
from pathlib import Path

from app.workload.drawing import Drawing
from app.workload.reading import parsed, rows, tokens
from app.workload.trace import TraceRequest, from_first

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def load(path: Path, drawing: Drawing) -> list[TraceRequest]:
    """Nothing is drawn; arrivals count from the first. Raises TraceError."""
    numbers = count()
    return from_first(parsed(path, rows(path, COLUMNS), lambda row: _request(row, next(numbers))))


def _request(row: Mapping[str, str], number: int) -> TraceRequest:
    return TraceRequest(
        number=number,
        session=str(number),
        arrival=_epoch_seconds(row["TIMESTAMP"]),
        prompt_tokens=tokens(row["ContextTokens"]),
        output_tokens=tokens(row["GeneratedTokens"]),
    )


def _epoch_seconds(text: str) -> float:
    """From some fixed day on. Raises ValueError."""
    at = datetime.fromisoformat(text).replace(tzinfo=None)  # all of one file are of one zone
    return (at - datetime(2020, 1, 1)).total_seconds()
