"""The device tier where the device is a CUDA card: the runner's pool, read and written on two streams of its own.

Nobody computes on a block that a copy touches (residency.py), and the engine begins a copy into the device only when
the steps that might still write there are over. So nothing waits for the stream that computes, nor does that wait for
copies: a copy is over when its event is, and is then reported. Not yet run on a card.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.block import Key
from kvstore.copies import DEVICE, Loss, Place
from kvstore.tier import Buffer, TierStats


class CudaTier:
    """`pool`: [blocks, …] on a card. Buffers of pinned memory (the host tier's) are copied to and from directly."""

    name = DEVICE

    def __init__(self, pool: Tensor) -> None:
        self._blocks = pool.view(torch.uint8).view(len(pool), -1)
        self._device = pool.device
        self._down = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]  # torch's omission
        self._up = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]  # torch's omission

    @property
    def block_bytes(self) -> int:
        return int(self._blocks.shape[1])

    def buffer(self, slot: int) -> Buffer | None:
        """None: the CPU cannot address it."""
        return None

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Loss | None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._down):
            for place, buffer in zip(places, into, strict=True):
                torch.from_numpy(buffer).copy_(self._blocks[place.slot], non_blocking=True)
            _wait(self._down)
        return [None] * len(places)

    def write(
        self, places: Sequence[Place], data: Sequence[Buffer], drops: Sequence[Key] = ()
    ) -> list[Loss | None]:
        assert not drops, "who goes by slots is told nothing of keys"
        with torch.cuda.device(self._device), torch.cuda.stream(self._up):
            for place, buffer in zip(places, data, strict=True):
                self._blocks[place.slot].copy_(torch.from_numpy(buffer), non_blocking=True)
            _wait(self._up)
        return [None] * len(places)

    def drop(self, keys: Sequence[Key]) -> None:
        """Nothing: a slot is free when the residency says so."""

    def stats(self) -> TierStats:
        return TierStats(self._blocks.nbytes, self._blocks.nbytes, len(self._blocks))

    def close(self) -> None:
        """The pool goes with its runner."""


def _wait(stream: torch.cuda.Stream) -> None:
    """Until all that is queued on it is done. The thread sleeps: else it would turn on a core that others need."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's omission
    event.record(stream)
    event.synchronize()
