"""The formats by name, and which of them a file has."""

import json
from collections.abc import Callable
from pathlib import Path

from app.workload import agentic, arxiv, azure, burstgpt, mooncake, servegen
from app.workload.drawing import Drawing
from app.workload.reading import header, lines
from app.workload.trace import TraceError, TraceRequest

Loader = Callable[[Path, Drawing], list[TraceRequest]]

FORMATS: dict[str, Loader] = {
    "agentic": agentic.load,
    "arxiv": arxiv.load,
    "azure": azure.load,
    "burstgpt": burstgpt.load,
    "mooncake": mooncake.load,
    "servegen": servegen.load,
}
DRAWN = ("agentic", "arxiv", "servegen")
"""Formats whose arrivals are drawn at the wanted rate; the others record them."""

_KEYS = {"hash_ids": "mooncake", "requests": "agentic", "arrivals": "servegen"}
_COLUMNS = {"ContextTokens": "azure", "num_prefill_tokens": "arxiv", "Request tokens": "burstgpt"}


def load(path: Path, drawing: Drawing, name: str | None = None) -> list[TraceRequest]:
    """The requests of a file, by arrival; `name` None: as `detect` finds. Raises TraceError, also when it has none."""
    requests = FORMATS[name or detect(path)](path, drawing)
    if not requests:
        raise TraceError(path, 0, "there is no request in it")
    return requests


def detect(path: Path) -> str:
    """The format's name, by the first line. Raises TraceError."""
    for number, text in lines(path):
        if text.startswith("{"):
            found = _match(_keys(path, number, text), _KEYS)
        else:
            found = _match(set(header(text)), _COLUMNS)
        if found is None:
            raise TraceError(path, number, f"of no known format; known: {', '.join(FORMATS)}")
        return found
    raise TraceError(path, 0, "it is empty")


def _keys(path: Path, number: int, text: str) -> set[str]:
    try:
        return set(json.loads(text))
    except ValueError as error:
        raise TraceError(path, number, f"it is not JSON: {error}") from error


def _match(names: set[str], known: dict[str, str]) -> str | None:
    return next((form for name, form in known.items() if name in names), None)
