"""Small stores for the tests of the disk tier: blocks by number, whose bytes follow from it."""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np

from kvstore.block import Key
from kvstore.copies import Loss, Place
from kvstore.disk import DiskTier
from kvstore.tier import Buffer

BLOCK_BYTES = 20_000  # five pages
QUOTA_BYTES = 4 * 2**20
HOUSE = Path(__file__).parent.parent.parent


def key_of(number: int) -> Key:
    return sha256(b"block %d" % number).digest()


def place_of(number: int, parent: int | None = None) -> Place:
    """A block without parent, or whose parent is another."""
    above = b"" if parent is None else key_of(parent)
    return Place(key_of(number), parent=above, depth=number, tokens=16)


def block_of(number: int, size: int = BLOCK_BYTES) -> Buffer:
    return np.frombuffer(Random(number).randbytes(size), np.uint8)


def open_tier(
    path: Path,
    *,
    quota_bytes: int = QUOTA_BYTES,
    block_bytes: int = BLOCK_BYTES,
    fingerprint: str = "model",
) -> DiskTier:
    return DiskTier.open(path, quota_bytes=quota_bytes, block_bytes=block_bytes, fingerprint=fingerprint)


def write(tier: DiskTier, numbers: Iterable[int], drops: Iterable[int] = ()) -> list[Loss | None]:
    """Blocks without parents, in as many transactions as it takes; the drops go with the first."""
    wanted, dropped, losses = list(numbers), [key_of(number) for number in drops], []
    for start in range(0, max(1, len(wanted)), tier.transaction_blocks):
        some = wanted[start : start + tier.transaction_blocks]
        blocks = [block_of(number, tier.block_bytes) for number in some]
        losses += tier.write([place_of(number) for number in some], blocks, dropped)
        dropped = []
    return losses


def losses(tier: DiskTier, numbers: Sequence[int]) -> list[Loss | None]:
    """What reading them answers; those read must be right."""
    buffers = [np.zeros(tier.block_bytes, np.uint8) for _ in numbers]
    answers = tier.read([place_of(number) for number in numbers], buffers)
    for number, answer, buffer in zip(numbers, answers, buffers, strict=True):
        assert answer is not None or np.array_equal(buffer, block_of(number, tier.block_bytes))
    return answers


def kept(tier: DiskTier) -> set[Key]:
    return {place.key for place in tier.records()}


def filled(path: Path, count: int = 40) -> list[int]:
    """A closed store of so many blocks that has seen some churn. Their numbers."""
    tier = open_tier(path)
    write(tier, range(2 * count))
    write(tier, range(2 * count, 3 * count), range(2 * count))
    write(tier, [], [])
    assert tier.stats().blocks == count
    tier.close()
    return list(range(2 * count, 3 * count))


def crowded(path: Path, count: int) -> int:
    """A closed store of so many blocks, written one after another, without churn. The bytes of its file."""
    tier = open_tier(path, quota_bytes=64 * 2**20)
    assert not any(write(tier, range(count)))
    tier.close()
    return (path / "data.mdb").stat().st_size


def python(source: str, *arguments: object) -> "subprocess.Popen[str]":
    """A child process that runs this in the repository, its output piped."""
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, cwd=HOUSE, text=True, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
