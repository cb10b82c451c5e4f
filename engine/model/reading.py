"""Typed reads from a JSON object that was written by others, all problems collected before any is raised.

No knowledge of models here: config.py and generation.py say what the fields mean.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from engine.model.errors import BrokenCheckpoint, ModelError

T = TypeVar("T")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; BrokenCheckpoint if it is absent, unreadable or something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist: model.path must be a Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{path} holds a {type(value).__name__}, not a JSON object; download it again")
    return value


class Fields:
    """Reads fields of one JSON object. A bad field adds to `problems` and yields its stand-in.

    The stand-in only keeps the reading going; whoever reads must raise when `problems` is not empty.
    """

    def __init__(self, raw: dict[str, Any], problems: list[str], prefix: str = "") -> None:
        self.raw = raw
        self.problems = problems
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(name) is not None

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._get(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        return self._refuse(name, value, f"a whole number of at least {least}", least)

    def number(self, name: str, default: float | None = None, *, low: float, high: float = math.inf) -> float:
        """A finite number in [low, high]."""
        value = self._get(name, default)
        if _is_number(value) and low <= value <= high:
            return float(value)
        limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        return self._refuse(name, value, f"a number {limits}", low)

    def numbers(self, name: str, *, low: float) -> tuple[float, ...]:
        """A list of finite numbers of at least `low`."""
        value = self._get(name, None)
        if isinstance(value, list) and value and all(_is_number(each) and each >= low for each in value):
            return tuple(float(each) for each in value)
        return self._refuse(name, value, f"a list of numbers of at least {low:g}", ())

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        return value if isinstance(value, bool) else self._refuse(name, value, "true or false", default)

    def table(self, name: str) -> "Fields":
        """A nested object; an absent one is empty."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            value = self._refuse(name, value, "an object", {})
        return Fields(value, self.problems, f"{self._prefix}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self._get(name, [])
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            return tuple(ids)
        return self._refuse(name, value, "a token id or a list of them", ())

    def only(self, name: str, supported: tuple[Any, ...], default: Any) -> None:
        """Adds a problem unless the field (absent: `default`) is one of `supported`."""
        value = self._get(name, default)
        if value not in supported:
            options = " or ".join(json.dumps(option) for option in supported)
            self._refuse(name, value, f"{options} only", None)

    def refuse(self, name: str, wanted: str) -> None:
        """Adds a problem: the field as it is, and what would be supported."""
        self._refuse(name, self.raw.get(name), wanted, None)

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        return default if value is None else value

    def _refuse(self, name: str, value: Any, wanted: str, stand_in: T) -> T:
        found = "is missing" if value is None else f"is {json.dumps(value)[:80]}"
        self.problems.append(f"{self._prefix}{name} {found}; supported: {wanted}")
        return stand_in


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
