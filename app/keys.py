"""API keys: the file that lists them, who has which, and what each may do.

The file holds hashes, never keys: those that name tenants everywhere else (app/salt.py) and that `[[class]]` lists. How
fast a key may ask: app/rate.py. Where keys are demanded: app/guard.py.
"""

from collections.abc import Collection, Sequence
from hmac import compare_digest
from itertools import combinations
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.service_classes import ClassTable, Digest

MAX_KEYS = 1024
"""A request's key is compared with every one."""

Role = Literal["inference", "admin"]
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")]
Limit = Annotated[int, Field(ge=0, le=10**6)]


class KeyTable(BaseModel):
    """One `[[key]]`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", str_max_length=4096)

    name: KeyName  # for people and logs
    sha256: Digest  # of "bearer KEY"
    role: Role = "inference"  # admin may do all that inference may, and /admin and /metrics
    max_concurrent: Limit = 0  # completion calls at once; 0: any number
    requests_per_minute: Limit = 0  # completion calls; 0: any number


def conflicts(tables: Sequence[KeyTable]) -> list[str]:
    """What no two keys may share, and too many of them."""
    found = []
    if len(tables) > MAX_KEYS:
        found.append(f"there are {len(tables)} keys; at most {MAX_KEYS} are taken")
    for one, other in combinations(tables[:MAX_KEYS], 2):
        if one.name == other.name:
            found.append(f"two keys are named {one.name!r}: rename one")
        if one.sha256 == other.sha256:
            found.append(f"keys {one.name!r} and {other.name!r} are the same key")
    return found


def strangers(tables: Sequence[KeyTable], classes: Sequence[ClassTable]) -> list[str]:
    """API keys that a service class lists and the file does not: they would never be let in."""
    known = {table.sha256 for table in tables}
    return [
        f"class {each.name!r} lists API key {key[:8]}…, which is not in server.keys_file"
        for each in classes
        for key in each.api_keys
        if key not in known
    ]


class Keys:
    """All keys of a server. Without any, everybody is let in."""

    def __init__(self, tables: Collection[KeyTable] = ()) -> None:
        self.tables = tuple(tables)

    @property
    def demanded(self) -> bool:
        return bool(self.tables)

    def find(self, tenant: str) -> KeyTable | None:
        """The key whose hash is `tenant`. The time that it takes says nothing of how much of a hash was right."""
        found = None
        for table in self.tables:
            if compare_digest(table.sha256, tenant):
                found = table
        return found
