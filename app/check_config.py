"""`sluice check-config`: every value in force, and where it came from."""

import json

from rich.console import Console
from rich.table import Table

from app.config_sources import DEFAULT, Loaded, all_keys, value_of


def rows(loaded: Loaded) -> list[tuple[str, object, str]]:
    """(section.key, value, source) in the order of the file."""
    return [(name, value_of(loaded.config, name), loaded.sources[name]) for name in all_keys()]


def as_json(loaded: Loaded) -> str:
    return json.dumps(
        {name: {"value": value, "source": source} for name, value, source in rows(loaded)}, indent=2
    )


def print_table(loaded: Loaded, console: Console | None = None) -> None:
    table = Table("key", "value", "source", box=None, pad_edge=False)
    for name, value, source in rows(loaded):
        table.add_row(name, json.dumps(value), source, style="dim" if source == DEFAULT else "")
    (console or Console()).print(table)
