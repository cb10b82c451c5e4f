"""The CPU kernels alone: one step of a Llama-shaped stack of random weights, by operation.

No runner, no sampler, no tokenizer: see decode_prefill.py for the whole engine. Prints the minimum and the median
of the repetitions. Where other processes want the cores, wall times of several threads say little: each operation
waits for its slowest thread. --cpu-time counts one thread's own processor time instead: a cost, not a throughput.

    python -m bench.kernels --model small --dtype bfloat16 [--threads 2]
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor

from engine.kernels.cpu import CpuKernels
from engine.kernels.protocol import AttentionShape, Batch, KVShape

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inter: int
    vocabulary: int
    head_dim: int = 64


MODELS = {
    "small": Shape(256, 6, 4, 2, 768, 4096),  # the shipped model's
    "100m": Shape(768, 12, 12, 4, 2048, 32000),
}


class Stack:
    """Random weights of a shape, and a step through them that times every operation."""

    def __init__(self, shape: Shape, dtype: torch.dtype, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.shape, self.kernels = shape, CpuKernels(dtype)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        sizes = {
            "qkv": (width, shape.hidden),
            "out": (shape.hidden, shape.heads * shape.head_dim),
            "gate_up": (2 * shape.inter, shape.hidden),
            "down": (shape.hidden, shape.inter),
        }
        self.layers = [
            {name: self._linear(size, dtype) for name, size in sizes.items()} for _ in range(shape.layers)
        ]
        self.head = self._linear((shape.vocabulary, shape.hidden), dtype)
        self.table = torch.randn(shape.vocabulary, shape.hidden).to(dtype)
        self.norm = torch.ones(shape.hidden, dtype=dtype)
        self.rope = torch.randn(4096, 2, shape.head_dim // 2)
        self.attention = AttentionShape(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5)
        self.kernels.warm_up()

    def _linear(self, size: tuple[int, int], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return self.kernels.linear((torch.randn(size) * size[1] ** -0.5).to(dtype), None)

    def batch(self, rows: int, start: int, tokens: int) -> tuple[Batch, Tensor]:
        blocks = -(-(start + tokens) // BLOCK)
        pool = self.kernels.new_pool(
            rows * blocks, KVShape(self.shape.layers, self.shape.kv_heads, BLOCK, self.shape.head_dim)
        )
        pool.normal_()  # memory that was never written would be read from one page of zeros, in a cache
        tables = torch.randperm(rows * blocks).int().view(rows, blocks)
        positions = torch.arange(start, start + tokens, dtype=torch.int32).repeat(rows)
        starts = torch.arange(rows + 1, dtype=torch.int32) * tokens
        ids = torch.randint(0, self.shape.vocabulary, (rows * tokens,))
        slots = torch.arange(rows, dtype=torch.int32)
        return Batch(ids, positions, starts, slots, tables, tokens, start + tokens, {}), pool

    def step(self, batch: Batch, pool: Tensor, spent: dict[str, float]) -> None:
        """One forward pass, logits of every row's last token; adds each operation's seconds to `spent`."""

        def timed(name: str, operation: Callable[..., Tensor], *arguments: Any) -> Tensor:
            start = self.clock()
            result = operation(*arguments)
            spent[name] += self.clock() - start
            return result

        k, norm = self.kernels, (self.norm, 1e-5)
        batch.scratch.clear()
        stream = timed("rowwise", k.embed, self.table, batch.tokens)
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            normed = timed("rowwise", k.add_norm, stream, delta, *norm)
            qkv = timed("linear", layer["qkv"], normed)
            mixed = timed("attention", k.attend, pool, index, qkv, self.rope, self.attention, batch)
            normed = timed("rowwise", k.add_norm, stream, timed("linear", layer["out"], mixed), *norm)
            product = timed("rowwise", k.silu_mul, timed("linear", layer["gate_up"], normed))
            delta = timed("linear", layer["down"], product)
        last = (batch.row_starts[1:] - 1).long()
        timed("head", self.head, timed("rowwise", k.add_norm, stream, delta, *norm)[last])


def measure(stack: Stack, rows: int, start: int, tokens: int, repetitions: int) -> str:
    batch, pool = stack.batch(rows, start, tokens)
    spent: dict[str, float] = defaultdict(float)
    stack.step(batch, pool, defaultdict(float))
    seconds = []
    for _ in range(repetitions):
        begin = stack.clock()
        stack.step(batch, pool, spent)
        seconds.append(stack.clock() - begin)
    best, median = min(seconds), statistics.median(seconds)
    parts = "  ".join(f"{name} {value / repetitions * 1e6:.0f}" for name, value in sorted(spent.items()))
    rates = f"{rows * tokens / best:9.0f} tok/s ({rows * tokens / median:9.0f} median)"
    return f"{rows:3} x {tokens:4} at {start:4}: {best * 1e3:8.3f} ms {rates}  mean µs: {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, not wall time")
    options = parser.parse_args()
    threads = 1 if options.cpu_time else options.threads
    torch.set_num_threads(threads)
    stack = Stack(
        MODELS[options.model],
        getattr(torch, options.dtype),
        thread_time if options.cpu_time else perf_counter,
    )
    kind = "processor time, 1 thread" if options.cpu_time else f"wall time, {threads} threads"
    print(f"{options.model} {options.dtype} {kind}; {'; '.join(stack.kernels.facts)}")
    for context in (128, 512, 2047):
        for rows in (1, 8, 32):
            print(measure(stack, rows, context, 1, 30))
    for tokens in (128, 512, 2048):
        print(measure(stack, 1, 0, tokens, 5))


if __name__ == "__main__":
    main()
