"""`sluice check-config`: every value in force, and where it came from."""

import json

from rich.console import Console
from rich.table import Table

from app.config_sources import DEFAULT, Loaded, all_keys, value_of
from app.config_tables import ARRAYS


def rows(loaded: Loaded) -> list[tuple[str, object, str]]:
    """(section.key, value, source) in the order of the file; then arrays of tables, each as a list."""
    keys: list[tuple[str, object, str]] = [
        (name, value_of(loaded.config, name), loaded.sources[name]) for name in all_keys()
    ]
    return keys + [
        (name, loaded.config.model_dump()[array.field], loaded.sources[name])
        for name, array in ARRAYS.items()
    ]


def as_json(loaded: Loaded) -> str:
    return json.dumps(
        {name: {"value": value, "source": source} for name, value, source in rows(loaded)}, indent=2
    )


def print_table(loaded: Loaded, console: Console | None = None) -> None:
    table = Table("key", "value", "source", box=None, pad_edge=False)
    for name, value, source in rows(loaded):
        for line, shown in _lines(name, value):
            table.add_row(line, json.dumps(shown), source, style="dim" if source == DEFAULT else "")
    (console or Console()).print(table)


def _lines(name: str, value: object) -> list[tuple[str, object]]:
    """A line a table of an array."""
    if name not in ARRAYS or not isinstance(value, list) or not value:
        return [(name, value)]
    return [(f"{name} {number}", table) for number, table in enumerate(value, 1)]
