"""Mooncake's traces: JSON Lines of `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (of 512 tokens).

Equal leading ids mean a prefix that can be used again. The conversation trace's timestamps come in steps of about 3 s.
Source: kvcache-ai/Mooncake, Qin et al., FAST 2025.
"""

from itertools import count
from pathlib import Path
from typing import Any

from app.workload.drawing import Drawing
from app.workload.reading import objects, parsed, seconds, tokens
from app.workload.trace import TraceRequest, from_first, runs

BLOCK_TOKENS = 512


def load(path: Path, drawing: Drawing) -> list[TraceRequest]:
    """Nothing is drawn; arrivals count from the first. Raises TraceError."""
    numbers = count()
    return from_first(parsed(path, objects(path), lambda row: _request(row, next(numbers))))


def _request(row: dict[str, Any], number: int) -> TraceRequest:
    prompt, ids = tokens(row["input_length"]), [int(each) for each in row["hash_ids"]]
    if not 0 <= len(ids) * BLOCK_TOKENS - prompt < BLOCK_TOKENS:
        raise ValueError(f"{len(ids)} hash ids do not fit {prompt} tokens in blocks of {BLOCK_TOKENS}")
    return TraceRequest(
        number=number,
        session=str(number),
        arrival=seconds(row["timestamp"]) / 1000,
        prompt_tokens=prompt,
        output_tokens=tokens(row["output_length"]),
        block_runs=runs(ids),
        block_size=BLOCK_TOKENS,
    )
