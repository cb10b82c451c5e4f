"""A card's pool and the host tier: copies against the runtime's own, and what spilling costs decode; a part of
bench.transfers. Not yet run on a card.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

import torch
from rich.table import Table
from torch import Tensor

from bench.gpu import CONFIG, Cell, Ours
from engine.model.config import parse_config
from kvstore.copies import Place
from kvstore.cuda import CudaTier
from kvstore.memory import MemoryTier, host_tier

ROUNDS: Final = 5
MOVED_BYTES: Final = 1 << 30
BATCHES: Final = (1, 8, 64)
STREAMS, CONTEXT = 8, 2048
GOAL: Final = 0.8
MOST_DISTURBED: Final = 0.05


@dataclass(frozen=True, slots=True)
class Figure:
    what: str
    value: float
    peer: float
    ratio: float
    wanted: str
    reached: bool


def run() -> list[Figure]:
    """With the pool of an 8B-shaped model, whose blocks have 2 MiB."""
    device = torch.device("cuda")
    ours = Ours(parse_config(dict(CONFIG)), device, exact=False, most_streams=STREAMS)
    tier = CudaTier(ours._runner.pool)
    blocks = min(len(ours._runner.pool), 256)
    found = []
    for pinned in (True, False):
        host = host_tier(blocks, tier.block_bytes, pinned=pinned)
        found += copies(tier, host, blocks, pinned)
        if pinned:
            found.append(disturbed(ours, tier, host, blocks))
        host.close()
    return found


def copies(tier: CudaTier, host: MemoryTier, blocks: int, pinned: bool) -> list[Figure]:
    """Both ways by batches, against one runtime copy of the same bytes in one piece, of torch's own pinned memory."""
    found = []
    for batch in BATCHES:
        raw = torch.empty(batch * tier.block_bytes, dtype=torch.uint8).pin_memory()
        card = torch.empty_like(raw, device="cuda")
        found.append(
            _compared("spill", batch, pinned, partial(_batches, tier.read, host, blocks, batch), raw, card)
        )
        found.append(
            _compared("fetch", batch, pinned, partial(_batches, tier.write, host, blocks, batch), card, raw)
        )
    return found


def _compared(
    way: str, batch: int, pinned: bool, ours: Callable[[], None], target: Tensor, source: Tensor
) -> Figure:
    mine = median(_rate(target.nbytes, ours) for _ in range(ROUNDS))
    peer = median(_rate(target.nbytes, partial(_repeated, target, source)) for _ in range(ROUNDS))
    name = f"{way} {'pinned' if pinned else 'pageable'}, {batch} blocks, GB/s"
    reached = not pinned or mine >= GOAL * peer
    return Figure(name, mine, peer, mine / peer, f"≥ {GOAL}" if pinned else "-", reached)


def _rate(size: int, work: Callable[[], None]) -> float:
    """GB/s of as many copies as make MOVED_BYTES."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    return MOVED_BYTES // size * size / (time.perf_counter() - began) / 1e9


def _batches(move: Callable[..., object], host: MemoryTier, blocks: int, batch: int) -> None:
    for number in range(MOVED_BYTES // (batch * host.block_bytes)):
        slots = [(number * batch + index) % blocks for index in range(batch)]
        move([Place(b"", slot) for slot in slots], [host.buffer(slot) for slot in slots])


def _repeated(target: Tensor, source: Tensor) -> None:
    for _ in range(MOVED_BYTES // target.nbytes):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()


def disturbed(ours: Ours, tier: CudaTier, host: MemoryTier, blocks: int) -> Figure:
    """Decode steps alone, and while a thread spills without a pause."""
    cell, stop = Cell("decode", STREAMS, CONTEXT), threading.Event()

    def spill() -> None:
        while not stop.is_set():
            _batches(tier.read, host, blocks, min(blocks, 64))

    alone = ours.seconds(cell)
    thread = threading.Thread(target=spill)
    thread.start()
    beside = ours.seconds(cell)
    stop.set()
    thread.join()
    ratio = beside / alone
    name = f"decode step, {STREAMS} streams, spilling ÷ alone, ms"
    return Figure(
        name, beside * 1e3, alone * 1e3, ratio, f"≤ {1 + MOST_DISTURBED}", ratio <= 1 + MOST_DISTURBED
    )


def table(figures: Sequence[Figure]) -> Table:
    shown = Table(
        "what", "sluice", "peer", "ratio", "wanted", title=f"device and host, {torch.cuda.get_device_name()}"
    )
    for each in figures:
        mark = "" if each.reached else "!"
        shown.add_row(
            each.what, f"{each.value:.2f}", f"{each.peer:.2f}", f"{each.ratio:.2f}{mark}", each.wanted
        )
    return shown
