"""What a model's layers ask of a device. One implementation a device, chosen at start.

Ownership: the runner owns the KV pool and the block tables and fills a `Batch` each step; kernels read the
tables, write the pool at the step's positions, and own nothing but packed weights and scratch.

Exactness (design §4.1): every method must give a row the same bits whatever rows stand beside it, and attention
must reduce over KV blocks in one fixed order, for prefill and decode alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class UnsupportedDevice(Exception):
    """The device, or the dtype or a model's shape on it, is not one that Sluice has kernels for."""


Linear = Callable[[Tensor], Tensor]
"""[tokens, in_features] -> [tokens, out_features], dtype kept."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """A block: one contiguous slab for all layers. The order inside [kv_heads, …] is the kernels' own."""

    layers: int
    kv_heads: int
    block_size: int  # tokens
    head_dim: int

    @property
    def elements(self) -> int:
        """Numbers a block holds, K and V of all layers."""
        return self.layers * 2 * self.kv_heads * self.block_size * self.head_dim


@dataclass(frozen=True, slots=True)
class AttentionShape:
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # multiplies q·k
    window: int = 0  # the last positions that a token attends to, its own included; 0: all of them


@dataclass(slots=True)
class Batch:
    """One step's rows as arrays, on the kernels' device: T tokens, R rows.

    Row r owns the tokens row_starts[r]:row_starts[r + 1].
    `tables` is persistent, [max_sequences, max_blocks_per_sequence]; row r's block table is tables[slots[r]].
    Token t sits at positions[t]; its KV goes to block tables[slot][position // block_size], offset
    position % block_size, and it attends to positions 0 … positions[t] of its row, or to the last of these (a window).
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int32 [T]
    row_starts: Tensor  # int32 [R + 1]
    slots: Tensor  # int32 [R]
    tables: Tensor  # int32 [max_sequences, max_blocks]
    longest_row: int  # tokens of the longest row: 1 is a pure decode step
    longest_context: int  # highest position + 1
    scratch: dict[
        object, Any
    ]  # per-step memo of the kernels (views, launch grids), cleared by the runner each step


class Kernels(Protocol):
    """A device's operations on [tokens, features] tensors in the model's dtype."""

    exact: bool

    @property
    def identity(self) -> str:
        """Names all of the machine and the code that decides bits: equal for equal bits of KV, at any time."""

    @property
    def released_seconds(self) -> float:
        """Wall seconds so far in calls that let go of the interpreter's lock; 0.0 if not counted."""

    def new_pool(self, blocks: int, shape: KVShape) -> Tensor:
        """The paged pool, block first: [blocks, layers, 2, …], zeroed, in the model's dtype."""

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Packs weight [out, in] once; the caller drops its own reference."""

    def twin(self) -> "Kernels":
        """The same kernels, in bits too, for another thread: these serve one at a time. Nothing is copied."""

    def bound(self, linear: Linear) -> Linear:
        """A layer that a twin of these has packed, to be called beside these: its weights are shared."""

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """[vocabulary, hidden], [T] -> a new residual stream [T, hidden] (dtype: the kernels' choice)."""

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Adds delta to residual *in place*, returns RMS-norm(residual) * weight in the model's dtype."""

    def head_norm(self, qkv: Tensor, weights: Tensor, shape: AttentionShape, eps: float) -> None:
        """RMS-normalises every head of q and k alone, *in place*.

        qkv: as `attend` takes it; weights: [2, head_dim], of q's heads and of k's.
        """

    def attend(
        self, pool: Tensor, layer: int, qkv: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch
    ) -> Tensor:
        """Rotates q and k by rope, stores k and v of this layer in the pool, attends over the block tables.

        qkv: [T, (heads + 2 * kv_heads) * head_dim]; rope: fp32 [max_positions, 2, head_dim // 2] (cos, sin),
        halves rotated as in Hugging Face's Llama. Returns [T, heads * head_dim].
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * intermediate] -> silu(gate) * up, [T, intermediate]."""

    def record(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """Calls `forward` without computing anything; what it returns does what `forward` asked for, each time anew.

        The same memory is read and written each time; the result is good until another recording runs. None: these
        kernels record nothing, or not all that `forward` does goes through them.
        """
