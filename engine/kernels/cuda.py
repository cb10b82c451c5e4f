"""CudaKernels: the protocol's operations on an NVIDIA card, in Triton; linears by cuBLAS if not exact.

Not yet run on a card: proven in Triton's interpreter against plain torch, and compiled for sm_90. Not here:
the kernels themselves (triton_*.py), the stream, graphs and pinned copies (runner_cuda.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import triton_attention, triton_matmul, triton_rowwise
from engine.kernels.protocol import AttentionShape, Batch, KVShape, Linear, UnsupportedDevice

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class UnsupportedDtype(UnsupportedDevice):
    """A dtype that no CUDA kernel here takes: choose one of bfloat16, float16, float32 (model.dtype)."""


class CudaKernels:
    """See protocol.Kernels. The residual stream is fp32.

    The pool is [blocks, layers, 2, kv_heads, block_size, head_dim]. exact=True: every linear is a Triton
    matmul, batch-invariant. exact=False: cuBLAS, whose bits depend on the batch. Attention and the row-wise
    kernels are batch-invariant either way. Sizes are free, but head_dim must be even.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, exact: bool) -> None:
        if dtype not in DTYPES:
            raise UnsupportedDtype(f"model.dtype {dtype} on CUDA: use bfloat16, float16 or float32")
        self.exact = exact
        self.released_seconds = 0.0  # a step here waits for nothing: its Python time is all of its time
        self._dtype = dtype
        self._device = device
        self._tiles: dict[tuple[int, int], tuple[triton_matmul.Tile, ...]] = {}  # by weight shape

    @property
    def identity(self) -> str:
        name, capability = (
            torch.cuda.get_device_name(self._device),
            torch.cuda.get_device_capability(self._device),
        )
        return f"cuda {name} {capability} torch {torch.__version__}"

    @property
    def facts(self) -> tuple[str, ...]:
        """Sentences worth a log line: for which weights tiles differ in bits, so that one serves all."""
        full = len(triton_matmul.candidates(self._dtype))
        return tuple(
            f"matmul tiles differ in bits for weights {shape[0]} x {shape[1]}: one serves all, slower"
            for shape, tiles in self._tiles.items()
            if len(tiles) < full
        )

    def new_pool(self, blocks: int, shape: KVShape) -> Tensor:
        size = (blocks, shape.layers, 2, shape.kv_heads, shape.block_size, shape.head_dim)
        return torch.zeros(size, dtype=self._dtype, device=self._device)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        weight = weight.to(self._device, self._dtype).contiguous()
        bias = None if bias is None else bias.to(self._device, self._dtype)
        return self._exact_linear(weight, bias) if self.exact else _fast_linear(weight, bias)

    def _exact_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        shape = (weight.shape[0], weight.shape[1])
        if shape not in self._tiles:
            with _current(weight):
                self._tiles[shape] = triton_matmul.choose_tiles(weight)
        tiles = self._tiles[shape]
        return lambda x: triton_matmul.matmul(x, weight, bias, tiles)

    def twin(self) -> "CudaKernels":
        """They keep nothing between calls, but for the tiles that were chosen as weights were loaded."""
        return self

    def bound(self, linear: Linear) -> Linear:
        return linear

    def record(self, forward: Callable[[], Tensor]) -> None:
        """Not these: decode steps are CUDA graphs (runner_cuda.py)."""

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, table).float()

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        return triton_rowwise.add_norm(residual, delta, weight, eps)

    def head_norm(self, qkv: Tensor, weights: Tensor, shape: AttentionShape, eps: float) -> None:
        triton_rowwise.head_norm(qkv, weights, shape, eps)

    def attend(
        self, pool: Tensor, layer: int, qkv: Tensor, rope: Tensor, shape: AttentionShape, batch: Batch
    ) -> Tensor:
        queries = triton_rowwise.rope_store(pool, layer, qkv, rope, shape, batch)
        return triton_attention.attend(pool, layer, queries, shape, batch)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return triton_rowwise.silu_mul(gate_up)


def _current(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current card: this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _fast_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)
