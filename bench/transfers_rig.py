"""What the parts of bench.transfers share: sizes of blocks, copies of random slots, a disk that has room."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from bench.models import RANDOM_100M, SHIPPED
from engine.kernels.protocol import KVShape
from engine.model.config import parse_config
from kvstore.copies import DISK, Copy, Place, TierUp
from kvstore.disk import LIMITS, DiskTier
from kvstore.format import value_bytes
from kvstore.memory import MemoryTier, host_tier, pool_tier
from kvstore.store import Opened

BLOCK_SIZE: Final = 16  # tokens
ARENA_BYTES: Final = 256 * 2**20

Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    block_bytes: int


def models() -> list[Model]:
    """Blocks of 16 tokens in bfloat16."""
    shipped = json.loads((SHIPPED / "config.json").read_text())
    return [Model("shipped", _block_bytes(shipped)), Model("random100m", _block_bytes(RANDOM_100M))]


def _block_bytes(raw: dict[str, Any]) -> int:
    config = parse_config(dict(raw))
    shape = KVShape(config.layers, config.kv_heads, BLOCK_SIZE, config.head_dim)
    return shape.elements * torch.bfloat16.itemsize


def arenas(block_bytes: int) -> tuple[MemoryTier, MemoryTier]:
    """A device, whose pool is in the CPU's memory, and a host, of ARENA_BYTES each."""
    blocks = ARENA_BYTES // block_bytes
    pool = torch.ones((blocks, block_bytes // 2), dtype=torch.bfloat16)
    return pool_tier(pool), host_tier(blocks, block_bytes, pinned=False)


def places(keys: Sequence[bytes], slots: Slots) -> tuple[Place, ...]:
    return tuple(map(Place, keys, slots.tolist()))


def copies_of(
    source: str, target: str, batches: Sequence[tuple[Slots, Slots]], keys: Sequence[bytes]
) -> list[Copy]:
    """One a batch, of slots in the source and in the target; `keys` names them all, in order."""
    names = iter(keys)
    found = []
    for id, (those, there) in enumerate(batches):
        own = [next(names) for _ in those]
        found.append(Copy(id, source, target, places(own, those), places(own, there)))
    return found


def batches_of(count: int, batch: int, blocks: int, seed: int) -> list[tuple[Slots, Slots]]:
    """`count` blocks in batches; random slots of both arenas, each once as long as there are any."""
    random = np.random.default_rng(seed)
    turns = -(-count // blocks)
    ends = [np.concatenate([random.permutation(blocks) for _ in range(turns)])[:count] for _ in range(2)]
    return [
        (ends[0][start : start + batch], ends[1][start : start + batch]) for start in range(0, count, batch)
    ]


def keys_of(count: int, seed: int) -> list[bytes]:
    random = np.random.default_rng([seed, count])
    return [random.bytes(32) for _ in range(count)]


def open_disk(path: Path, block_bytes: int, count: int) -> Opened:
    quota = (count + 512) * (value_bytes(block_bytes, PAGESIZE) + 400) * 5 // 4 + 2**25
    tier = DiskTier.open(path, quota_bytes=quota, block_bytes=block_bytes, fingerprint="bench")
    return tier, TierUp(DISK, tier.records(), tier.capacity_blocks, tier.transaction_blocks)


def transaction_blocks(block_bytes: int, batch: int) -> int:
    """Of a copy to disk: the core makes no larger one."""
    return min(batch, LIMITS.of(block_bytes))
