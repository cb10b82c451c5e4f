"""Plain torch kernels for any device: slow, and the proof of the others.

Exact by construction: all but copies and single fp32 products and sums is computed for one token alone, in
shapes that depend on its position and nothing else: no other row can touch its bits. Not for serving.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.protocol import AttentionShape, Batch, KVShape, Linear


class ReferenceKernels:
    """The residual stream and all arithmetic inside attention, norms and activations are fp32."""

    exact = True

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.released_seconds = 0.0
        self.identity = f"reference {device.type} torch {torch.__version__}"
        self.dtype = dtype
        self.device = device

    def new_pool(self, blocks: int, shape: KVShape) -> Tensor:
        """[blocks, layers, 2, kv_heads, block_size, head_dim]."""
        inside = (shape.layers, 2, shape.kv_heads, shape.block_size, shape.head_dim)
        return torch.zeros((blocks, *inside), dtype=self.dtype, device=self.device)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        own = weight.clone()  # it may be a view of a mapped file
        return lambda x: _each_row(lambda row: F.linear(row, own, bias), x)

    def twin(self) -> "ReferenceKernels":
        """They keep nothing between calls."""
        return self

    def bound(self, linear: Linear) -> Linear:
        return linear

    def record(self, forward: Callable[[], Tensor]) -> None:
        """Not these: see `Kernels.record`."""

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return table.index_select(0, tokens).float()

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            residual.add_(delta)
        normed = _each_row(lambda row: F.rms_norm(row, row.shape[-1:], weight.float(), eps), residual)
        return normed.to(self.dtype)

    def head_norm(self, qkv: Tensor, weights: Tensor, shape: AttentionShape, eps: float) -> None:
        normed = qkv.view(len(qkv), -1, shape.head_dim)[:, : shape.heads + shape.kv_heads]
        gains = torch.cat(
            [weights[:1].expand(shape.heads, -1), weights[1:].expand(shape.kv_heads, -1)]
        ).float()
        wide = _each_row(lambda row: F.rms_norm(row.float(), row.shape[-1:], None, eps) * gains, normed)
        normed.copy_(wide.to(self.dtype))

    def attend(
        self, pool: Tensor, layer: int, qkv: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch
    ) -> Tensor:
        q, k, v = qkv.view(len(qkv), -1, shape.head_dim).tensor_split(
            (shape.heads, shape.heads + shape.kv_heads), dim=1
        )
        turns = rope[batch.positions.long()]
        q, k = _rotate(q, turns), _rotate(k, turns).to(self.dtype)
        out = torch.empty_like(q)
        starts = batch.row_starts.tolist()
        for slot, first, end in zip(batch.slots.tolist(), starts, starts[1:], strict=False):
            positions = batch.positions[first:end].tolist()
            keys, values = _store(pool, layer, batch.tables[slot], positions, k[first:end], v[first:end])
            for token, position in zip(range(first, end), positions, strict=True):
                seen = slice(max(0, position + 1 - shape.window) if shape.window else 0, position + 1)
                out[token] = _attend_one(q[token], keys[:, seen], values[:, seen], shape.scale)
        return out.to(self.dtype).flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        def gated(row: Tensor) -> Tensor:
            gate, up = row.float().chunk(2, dim=-1)
            return (F.silu(gate.contiguous()) * up).to(self.dtype)

        return _each_row(gated, gate_up)


def _each_row(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """function on each row [1, features] alone, cloned so that even its address is aligned alike."""
    return torch.cat([function(row.clone()) for row in torch.split(rows, 1)])


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [T, heads, head_dim], turns [T, 2, head_dim // 2] (cos, sin) -> fp32, as Hugging Face turns it."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = turns[:, :1], turns[:, 1:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _store(
    pool: Tensor, layer: int, table: Tensor, positions: list[int], k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes one row's k and v, [n, kv_heads, head_dim].

    Returns all of its keys and values so far, each fp32 [kv_heads, context, head_dim].
    """
    block_size = pool.shape[-2]
    slots = table[torch.tensor(positions, device=pool.device) // block_size].long()
    offsets = torch.tensor(positions, device=pool.device) % block_size
    pool[slots, layer, 0, :, offsets] = k
    pool[slots, layer, 1, :, offsets] = v
    blocks = pool[table[: positions[-1] // block_size + 1].long(), layer]
    keys, values = blocks.float().permute(1, 2, 0, 3, 4).flatten(2, 3).unbind(0)
    return keys, values


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One token: q [heads, head_dim], keys and values [kv_heads, context, head_dim] -> [heads, head_dim].

    Products and sums are spelled out: a matmul may choose its reduction order by strides, a sum of a fresh
    tensor goes by its shape alone.
    """
    grouped = q.view(len(keys), -1, 1, q.shape[-1])  # [kv_heads, group, 1, head_dim]
    scores = (grouped * keys.unsqueeze(1)).sum(-1) * scale
    weights = scores.softmax(-1).unsqueeze(-1)  # [kv_heads, group, context, 1]
    return (weights * values.unsqueeze(1)).sum(2).flatten(0, 1)
