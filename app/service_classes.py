"""`[[class]]` tables: which service class a request is in, and what that class is promised.

Order in the file is rank, the first the most urgent. How the tables are read: `app/config_tables.py`. What becomes of
rank and weight is the policies' to say; objectives are only measured (`app/attainment.py`).
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.request import ServiceClass

INT32 = 2**31 - 1

ClassName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Priority = Annotated[int, Field(ge=-INT32, le=INT32)]
Objective = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ClassTable(BaseModel):
    """A bound of the range that is left out is open; without both, no priority falls into the class."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", str_max_length=4096)

    name: ClassName
    priority_min: Priority | None = None
    priority_max: Priority | None = None
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0  # what a second of delay costs
    ttft_seconds: Objective = 0.0  # to the first token; 0: none
    tpot_seconds: Objective = 0.0  # per token after it; 0: none
    api_keys: Annotated[list[Digest], Field(max_length=4096)] = []  # app/salt.py has the hash

    @model_validator(mode="after")
    def _range_is_one(self) -> "ClassTable":
        low, high = self.bounds
        if low > high:
            raise PydanticCustomError("empty_range", "priority_min is above priority_max")
        return self

    @property
    def ranged(self) -> bool:
        return self.priority_min is not None or self.priority_max is not None

    @property
    def bounds(self) -> tuple[int, int]:
        return (
            -INT32 if self.priority_min is None else self.priority_min,
            INT32 if self.priority_max is None else self.priority_max,
        )

    def takes(self, priority: int) -> bool:
        low, high = self.bounds
        return self.ranged and low <= priority <= high


def conflicts(tables: Sequence[ClassTable]) -> list[str]:
    """What no two classes may share: a name, a priority, an API key."""
    found = []
    for one, other in combinations(tables, 2):
        if one.name == other.name:
            found.append(f"two classes are named {one.name!r}: rename one")
        low, high = max(one.bounds[0], other.bounds[0]), min(one.bounds[1], other.bounds[1])
        if one.ranged and other.ranged and low <= high:
            found.append(
                f"classes {one.name!r} and {other.name!r} both take priority {low}: let their ranges part"
            )
        if both := sorted(set(one.api_keys) & set(other.api_keys)):
            found.append(f"classes {one.name!r} and {other.name!r} both list API key {both[0][:8]}…")
    return found


class Classes:
    """All of them. Without a table: one class without a name, of rank 0 and weight 1."""

    def __init__(self, tables: Sequence[ClassTable] = ()) -> None:
        self.tables = {table.name: table for table in tables}
        self._services = {
            table.name: ServiceClass(table.name, rank, table.weight) for rank, table in enumerate(tables)
        }
        self._by_key = {key: table.name for table in tables for key in table.api_keys}

    def of(self, tenant: str, priority: int) -> ServiceClass:
        """By the API key (its hash is the tenant's name), else by the priority, else the last of the file."""
        if not self.tables:
            return ServiceClass()
        by_priority = (name for name, table in self.tables.items() if table.takes(priority))
        name = self._by_key.get(tenant) or next(by_priority, None) or list(self.tables)[-1]
        return self._services[name]
