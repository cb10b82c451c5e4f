"""Lines of a trace file, gzip or plain, as JSON objects or CSV rows; what is wrong with one is told with its line."""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from app.workload.trace import TraceError

GZIP = b"\x1f\x8b"

T = TypeVar("T")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line that is not empty. Raises TraceError."""
    number = 0
    try:
        with path.open("rb") as probe:
            zipped = probe.read(len(GZIP)) == GZIP
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if text := raw.decode("utf-8-sig").strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(path, 0, f"it cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(path, number, "it is not UTF-8 text") from error


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(line number, values by column) of a CSV file that has at least these columns. Raises TraceError."""
    names: list[str] | None = None
    for number, text in lines(path):
        if names is None:
            names = header(text)
            if missing := [name for name in columns if name not in names]:
                raise TraceError(path, number, f"there is no column {', '.join(missing)}")
            continue
        fields = next(csv.reader([text]))
        if len(fields) != len(names):
            raise TraceError(path, number, f"{len(names)} fields wanted, {len(fields)} found")
        yield number, dict(zip(names, fields, strict=True))


def header(text: str) -> list[str]:
    """The columns' names of a CSV file, by its first line."""
    return [name.strip() for name in next(csv.reader([text]))]


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON Lines file. Raises TraceError."""
    for number, text in lines(path):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise TraceError(path, number, f"it is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise TraceError(path, number, "it is not a JSON object")
        yield number, found


def parsed(path: Path, items: Iterator[tuple[int, T]], parse: Callable[[T], Any]) -> Iterator[Any]:
    """What `parse` makes of each; a key that is not there, or a value that is none, is told with its line."""
    for number, item in items:
        try:
            yield parse(item)
        except KeyError as error:
            raise TraceError(path, number, f"there is no {error.args[0]!r}") from error
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            raise TraceError(path, number, str(error)) from error


def tokens(value: object, *, least: int = 1) -> int:
    """A count of tokens, from JSON or CSV. Raises ValueError."""
    number = _number(value, "number of tokens")
    if not number.is_integer():
        raise ValueError(f"{value!r} is no number of tokens")
    if number < least:
        raise ValueError(f"{value} tokens: at least {least} wanted")
    return int(number)


def seconds(value: object) -> float:
    """A time that is not negative. Raises ValueError."""
    number = _number(value, "time in seconds")
    if number < 0:
        raise ValueError(f"{value!r} is no time in seconds")
    return number


def _number(value: object, what: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no {what}")
    return number
