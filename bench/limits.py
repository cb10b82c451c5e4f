"""The least time this machine could take: max(bytes ÷ bandwidth, FLOPs ÷ matmul peak at that many rows).

Both are measured here, generously: bandwidth over as many bytes as a step reads (a small model stays in a
cache), the peak on weights that stay in a cache, the best of every way we have to multiply. Activations,
softmax, sampling and Python are left out, so no engine reaches it. Run it alone for a table of limits.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from bench import models
from bench.cells import Cell, Kind, matrix
from engine.kernels.cpu import CpuKernels
from engine.model.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
ROUND_SECONDS = 0.002  # short, so that some rounds are left alone on a machine with other work
ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Work:
    """What one measured unit must at least do: a decode step of all streams, or a whole prefill."""

    rows: int  # of the largest matrix product
    bytes: int  # weights and KV read
    flops: int
    tokens: int  # that come of it


def work(cell: Cell, config: ModelConfig, item_bytes: int) -> Work:
    """Weights once, KV of every earlier position once; two FLOPs a multiply-add."""
    layer_numbers, head_numbers = _matrices(config)
    kv_numbers = 2 * config.layers * config.kv_heads * config.head_dim  # of a position
    attention = 4 * config.layers * config.heads * config.head_dim  # FLOPs for one pair of positions
    if cell.kind is Kind.DECODE:
        read = layer_numbers + head_numbers + cell.streams * cell.context * kv_numbers
        flops = cell.streams * (2 * (layer_numbers + head_numbers) + attention * cell.context)
        return Work(cell.streams, read * item_bytes, flops, cell.streams)
    tokens = cell.streams * cell.context
    pairs = cell.streams * cell.context * (cell.context + 1) // 2
    flops = 2 * (tokens * layer_numbers + cell.streams * head_numbers) + attention * pairs
    return Work(tokens, (layer_numbers + head_numbers) * item_bytes, flops, tokens)


def _matrices(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the layers' matrices, and in the output head."""
    shapes = matrix_shapes(config)
    return config.layers * sum(n * k for n, k in shapes[:-1]), shapes[-1][0] * shapes[-1][1]


def matrix_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of a layer's matrices, fused as engines do, then the output head's."""
    hidden, heads = config.hidden_size, config.heads * config.head_dim
    return [
        (heads + 2 * config.kv_heads * config.head_dim, hidden),
        (hidden, heads),
        (2 * config.intermediate_size, hidden),
        (hidden, config.intermediate_size),
        (config.vocab_size, hidden),
    ]


class Meter:
    """Measures this machine, each thing once. `threads` are torch's, of the whole process."""

    def __init__(self, config: ModelConfig, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.item_bytes = ITEM_BYTES[dtype]
        self._dtype = getattr(torch, dtype)
        self.bandwidth: Callable[[int], float] = cache(_bandwidth)
        self.peak: Callable[[int], float] = cache(self._peak)

    def seconds(self, cell: Cell) -> float:
        """The limit of a decode step, or of a prefill."""
        need = work(cell, self.config, self.item_bytes)
        return max(need.bytes / self.bandwidth(_rounded(need.bytes)), need.flops / self.peak(need.rows))

    def tokens_per_second(self, cell: Cell) -> float:
        return work(cell, self.config, self.item_bytes).tokens / self.seconds(cell)

    def _peak(self, rows: int) -> float:
        """FLOP/s of the best shape and the best way, with `rows` rows."""
        layer = matrix_shapes(self.config)[:-1]
        return max(_product_rate(rows, shape, self._dtype) for shape in layer)


def _rounded(size: int) -> int:
    """To the next power of two and a half, so that few sizes are measured."""
    step = 2**20
    while step < size:
        step = step * 3 // 2
    return step


def _bandwidth(size: int) -> float:
    """Bytes a second when `size` bytes are read over and over, by all threads: the best of two ways."""
    numbers = torch.ones(size // 4 // 1024 * 1024)
    rows, vector = numbers.view(-1, 1024), torch.ones(1024)
    seconds = min(fastest(numbers.sum), fastest(lambda: torch.mv(rows, vector)))
    return numbers.nbytes / seconds


def _product_rate(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> float:
    weight, x = torch.randn(shape, dtype=dtype), torch.randn(rows, shape[1], dtype=dtype)
    seconds = min(fastest(partial(way, x)) for way in _ways(weight))
    return 2.0 * rows * shape[0] * shape[1] / seconds


def _ways(weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """torch's own product, oneDNN's with packed weights, and the engine's kernel."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return [
        lambda x: functional.linear(x, weight),
        lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        CpuKernels(weight.dtype).linear(weight, None),
    ]


def fastest(call: Callable[[], object]) -> float:
    """Seconds of one call: the best of some rounds, each of so many calls that the clock does not matter."""
    once = min(_timed(call, 1) for _ in range(5))
    calls = max(1, round(ROUND_SECONDS / once))
    return min(_timed(call, calls) for _ in range(ROUNDS))


def _timed(call: Callable[[], object], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begun) / calls


def shown(meter: Meter, title: str, cells: Iterable[Cell]) -> Table:
    table = Table("kind", "streams", "context", "GB/s", "GFLOP/s", "bound by", "tokens/s", title=title)
    for cell in cells:
        need = work(cell, meter.config, meter.item_bytes)
        bandwidth, peak = meter.bandwidth(_rounded(need.bytes)), meter.peak(need.rows)
        bound = "bytes" if need.bytes / bandwidth > need.flops / peak else "FLOPs"
        figures = (
            f"{bandwidth / 1e9:.1f}",
            f"{peak / 1e9:.0f}",
            bound,
            f"{meter.tokens_per_second(cell):,.0f}",
        )
        table.add_row(cell.kind, str(cell.streams), str(cell.context), *figures)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["shipped", "random100m"])
    parser.add_argument("--dtypes", nargs="+", default=list(ITEM_BYTES), choices=list(ITEM_BYTES))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model-cache", type=Path, default=Path(".bench"))
    options = parser.parse_args()
    for name in options.models:
        model = models.find(name, options.model_cache)
        for dtype in options.dtypes:
            cells = matrix(options.streams, options.contexts, prefill_tokens=2048)
            Console().print(shown(Meter(model.config, dtype, options.threads), f"{name}, {dtype}", cells))


if __name__ == "__main__":
    main()
