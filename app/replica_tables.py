"""`[[replica]]` tables: on which device each replica runs, what it is for, and how much KV it may hold.

Order in the file is the replica's number. How the tables are read: `app/config_tables.py`. What becomes of roles and
limits is the policies' to say; runners are made from the tables in `app/replica_runners.py`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

DEVICE = r"auto|cpu|cuda(:\d+)?"
"""What `model.device` may be."""

MAX_REPLICAS = 64
"""Each has a thread and a pool of its own."""

Role = Literal["any", "long", "burst"]
Limit = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ReplicaTable(BaseModel):
    """One `[[replica]]`. A table without keys is what a server without tables has one of."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", str_max_length=4096)

    device: Annotated[str, Field(pattern=f"^({DEVICE})?$")] = ""  # "": model.device
    role: Role = "any"
    kv_blocks: Limit = 0  # 0: engine.kv_blocks; if that is 0 too, a share of the memory at hand
    limit_tokens: Limit = 0  # longer sequences belong elsewhere (size classes); 0: none is too long


def conflicts(tables: Sequence[ReplicaTable]) -> list[str]:
    """What is wrong with tables that are right one by one: too many of them."""
    if len(tables) <= MAX_REPLICAS:
        return []
    return [f"there are {len(tables)} replicas; at most {MAX_REPLICAS} are taken"]


def replicas_of(tables: Sequence[ReplicaTable]) -> tuple[ReplicaTable, ...]:
    """Those of the file, by number; without any, the one that there is anyway."""
    return tuple(tables) or (ReplicaTable(),)
