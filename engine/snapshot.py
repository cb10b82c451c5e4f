"""All that a sequence is, as plain data: what it needs to live later, or elsewhere.

Taken when a sequence gives up its blocks (lifecycle.py), or is to go on elsewhere (migration.py). The KV itself is in
the store, under the keys of its full blocks and of its partial tail; noise is a function of (seed, choice, position,
token id) and what penalties count is `tokens`, so a sampler has no state beyond `sampling`. What of the KV the store
has lost by then is computed again.
"""

from dataclasses import dataclass

from engine.plan import Sampling
from engine.request import Request
from engine.text import TextState
from kvstore.block import Key, block_key


@dataclass(frozen=True, slots=True)
class Tail:
    """The block that is not full. Its bytes beyond `tokens` positions mean nothing."""

    key: Key
    tokens: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    request: Request
    sampling: Sampling  # of this choice
    tokens: tuple[int, ...]  # prompt and output
    computed: int  # positions that had KV
    keys: tuple[Key, ...]  # of the full blocks among these
    tail: Tail | None
    text: TextState  # undecoded bytes, and text that may be the beginning of a stop string
    arrived: float
    admitted: float | None
    cached_tokens: int
    preemptions: int
    recomputed_tokens: int
    reloaded_tokens: int
    promotions: int
    migrations: int
    computed_before: int  # positions that were computed once, here or elsewhere
    queued_seconds: float
    token_times: tuple[float, ...]

    @property
    def all_keys(self) -> tuple[Key, ...]:
        """Of the full blocks, and of the tail."""
        return (*self.keys, self.tail.key) if self.tail else self.keys


def tail_of(root: Key, keys: tuple[Key, ...], tokens: tuple[int, ...]) -> Tail | None:
    """The tail after full blocks `keys`, holding `tokens` (fewer than a block). Its key is that of a shorter block."""
    return Tail(block_key(keys[-1] if keys else root, tokens), len(tokens)) if tokens else None
