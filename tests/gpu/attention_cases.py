"""A pool of random KV, rows over it, and steps cut from the same tokens in different ways."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.protocol import AttentionShape, Batch, Kernels, KVShape

BLOCK = 16
LAYER = 1  # of two: the other must stay as it is


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start … end - 1 of a slot."""

    slot: int
    start: int
    end: int


class World:
    """Slots with `context` positions each, in scattered blocks, and the tokens that steps may compute."""

    def __init__(
        self, shape: AttentionShape, dtype: torch.dtype, device: torch.device, *, slots: int, context: int
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        each = -(-context // BLOCK)
        self.shape, self.device, self.context = shape, device, context
        size = (slots * each + 1, 2, 2, shape.kv_heads, BLOCK, shape.head_dim)
        self.pool = torch.randn(size, generator=generator).to(device, dtype)
        scattered = torch.randperm(slots * each, generator=generator) + 1
        self.tables = scattered.view(slots, each).int().to(device)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = torch.randn((slots, context, width), generator=generator).to(device, dtype)
        self.rope = torch.randn((context, 2, shape.head_dim // 2), generator=generator).to(device)

    def step(
        self, kernels: Kernels, pool: Tensor, spans: Sequence[Span], *, padding: int = 0
    ) -> list[Tensor]:
        """One step over the spans, then `padding` empty rows and as many tokens of none of them.

        Returns [tokens, …] for each span, and for the padding if there is any.
        """
        qkv = torch.cat([self.qkv[span.slot, span.start : span.end] for span in spans])
        out = kernels.attend(
            pool, LAYER, _padded(qkv, padding), self.rope, self.shape, self.batch(spans, padding)
        )
        return list(torch.split(out, [span.end - span.start for span in spans] + [padding] * bool(padding)))

    def batch(self, spans: Sequence[Span], padding: int = 0) -> Batch:
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        starts = torch.tensor([0, *(span.end - span.start for span in spans), *[0] * padding]).cumsum(0)
        slots = torch.tensor([*(span.slot for span in spans), *[0] * padding])
        return Batch(
            tokens=torch.zeros(len(positions) + padding, dtype=torch.int64, device=self.device),
            positions=_padded(positions, padding).int().to(self.device),
            row_starts=starts.int().to(self.device),
            slots=slots.int().to(self.device),
            tables=self.tables,
            longest_row=max(span.end - span.start for span in spans),
            longest_context=self.context if padding else int(positions.max()) + 1,
            scratch={},
        )

    def kv_shape(self) -> KVShape:
        return KVShape(2, self.shape.kv_heads, BLOCK, self.shape.head_dim)


def _padded(tensor: Tensor, padding: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros((padding, *tensor.shape[1:]))])
