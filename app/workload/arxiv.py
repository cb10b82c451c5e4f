"""Lengths of a long-document summarisation set: CSV of `num_prefill_tokens`, `num_decode_tokens`, …; no arrivals.

Arrivals are a Poisson process at the drawing's rate (1/s without one), lengths in the order of the file.
Source: microsoft/vidur, Agrawal et al., MLSys 2024.
"""

from collections.abc import Mapping
from pathlib import Path

from app.workload.drawing import Drawing, poisson
from app.workload.reading import parsed, rows, tokens
from app.workload.trace import TraceRequest

COLUMNS = ("num_prefill_tokens", "num_decode_tokens")


def load(path: Path, drawing: Drawing) -> list[TraceRequest]:
    """Raises TraceError."""
    arrivals = poisson(drawing.random("arxiv"), drawing.rate or 1.0)
    lengths = parsed(path, rows(path, COLUMNS), _lengths)
    return [
        TraceRequest(number, str(number), arrival, prompt, output)
        for number, ((prompt, output), arrival) in enumerate(zip(lengths, arrivals, strict=False))
    ]


def _lengths(row: Mapping[str, str]) -> tuple[int, int]:
    return tokens(row["num_prefill_tokens"]), tokens(row["num_decode_tokens"])
