"""Arrays of tables of the configuration file, `[[class]]` …: strict like its sections, and set in the file only.

Each table is checked alone, then all of an array beside each other. Sections and their keys: `app/config_sources.py`.
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app import keys, replica_tables, service_classes


@dataclass(frozen=True, slots=True)
class Array:
    """`conflicts`: what is wrong with tables that are right one by one."""

    field: str  # of Config
    model: type[BaseModel]
    conflicts: Callable[[Sequence[Any]], list[str]]


ARRAYS = {
    "class": Array("classes", service_classes.ClassTable, service_classes.conflicts),
    "replica": Array("replicas", replica_tables.ReplicaTable, replica_tables.conflicts),
}
"""By the name in the file."""

KEYS = Array("keys", keys.KeyTable, keys.conflicts)
"""`[[key]]`, in a file of its own."""


def read(name: str, value: object, file: str, problems: list[str]) -> list[BaseModel]:
    """The tables of the array `name`, as far as they can be used; else every reason why not."""
    return _read(ARRAYS[name], name, value, file, problems)


def read_keys(path: Path, problems: list[str]) -> list[BaseModel]:
    """The keys of `server.keys_file`, as far as they can be used; else every reason why not."""
    try:
        tables = tomllib.loads(path.expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(f"server.keys_file {path}: {error}")
        return []
    problems += [f"{path}: unknown {name}; it holds [[key]] tables" for name in tables if name != "key"]
    if not tables.get("key"):
        problems.append(f"{path}: there is no [[key]] in it, so nobody could be let in")
        return []
    return _read(KEYS, "key", tables["key"], str(path), problems)


def _read(array: Array, name: str, value: object, file: str, problems: list[str]) -> list[BaseModel]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        problems.append(f"{file}: {name} is an array of tables: write [[{name}]] above each")
        return []
    tables = [
        table
        for number, raw in enumerate(value, 1)
        if (table := _table(array.model, raw, f"{file}: [[{name}]] {number}", problems)) is not None
    ]
    problems += [f"{file}: [[{name}]]: {conflict}" for conflict in array.conflicts(tables)]
    return tables


def _table(
    model: type[BaseModel], raw: Mapping[str, Any], where: str, problems: list[str]
) -> BaseModel | None:
    try:
        return model.model_validate(raw)
    except ValidationError as invalid:
        problems += [f"{where}: {_reason(error, model)}" for error in invalid.errors(include_url=False)]
        return None


def _reason(error: ErrorDetails, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.5)
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["loc"][:1] in (
        ("api_keys",),
        ("sha256",),
    ):  # perhaps the key itself, which is to stand in no log
        return f"{key} is no hash of an API key: printf %s 'bearer KEY' | sha256sum makes one"
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"{key} = {json.dumps(error['input'], default=str)}: {message}" if key else message


def array_of(section: str) -> str | None:
    """The array that a dotted section name means, if it means one."""
    name = section.partition(".")[0]
    return name if name in ARRAYS else None
