"""Decode and prefill of an 8B-shaped model with random bf16 weights on a card, against transformers and the
limits.

    python -m bench.gpu --out FOLDER

Prints a table and writes every measurement to FOLDER/gpu.jsonl. The limits are of the same card in the same
run: max(bytes ÷ bandwidth of a device copy, FLOPs ÷ rate of a large matmul). Weights are drawn on the card.
Ours runs twice: exact (batch-invariant linears) and with cuBLAS. Not here: a server, a scheduler, a real
model; the CPU's figures (decode_prefill.py). Not yet run on a card.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.kernels.cuda import CudaKernels
from engine.model.config import ModelConfig, parse_config
from engine.model.decoder import Decoder, wanted_tensors
from engine.model.weights import Weights
from engine.plan import PENDING, Placement, Plan, Row, Sampling
from engine.runner_cuda import CudaRunner, InFlight
from engine.sampler import Sampler

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
BLOCK = 16
STREAMS = (1, 8, 32, 64)
CONTEXTS = (128, 2048)
PROMPTS = (512, 2048, 8192)
REPEATS = 5
STEPS = 32  # decode steps a repeat
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Cell:
    kind: str  # "decode": a step of `streams` rows; "prefill": one prompt of `context` tokens
    streams: int
    context: int


@dataclass(frozen=True, slots=True)
class Measured:
    kind: str
    streams: int
    context: int
    system: str
    seconds: float  # a step
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Limits:
    bytes_per_second: float
    flops_per_second: float


class RandomWeights(Weights):
    """Weights drawn on the device when they are taken: no checkpoint, no copy on the host."""

    def __init__(
        self, wanted: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
    ) -> None:
        # not super().__init__: it checks a checkpoint, and here is none
        self._wanted, self._device, self._dtype = wanted, device, dtype

    def take(self, *names: str) -> Tensor:
        return torch.cat([self._draw(self._wanted[name]) for name in names])

    def own(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._draw(self._wanted[name]).to(dtype or self._dtype)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, device=self._device, dtype=self._dtype)
        return noise.mul_(0.1).add_(1.0) if len(shape) == 1 else noise.mul_(1 / math.sqrt(shape[-1]))


def timed(work: Callable[[], None]) -> float:
    """Median seconds of work that ends with the device idle; the first run warms up."""
    found = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        started = perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(perf_counter() - started)
    return median(found[1:])


def measure_limits(device: torch.device) -> Limits:
    """Bytes read and written by a copy of 4 GiB; bf16 products of 8192³, of random numbers."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(8):
            target.copy_(source)

    a, b = (torch.randn(8192, 8192, device=device, dtype=DTYPE) for _ in range(2))

    def product() -> None:
        for _ in range(8):
            a @ b

    return Limits(8 * 2 * source.nbytes / timed(copy), 8 * 2 * 8192**3 / timed(product))


def matrix_numbers(config: ModelConfig) -> int:
    """Weights of all layers' matrices; the output head's come on top."""
    queries, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    return config.layers * layer


def limit_seconds(cell: Cell, config: ModelConfig, limits: Limits) -> float:
    """The least time of a step: weights and earlier KV read once, two FLOPs a multiply-add."""
    body, head = matrix_numbers(config), config.vocab_size * config.hidden_size
    attention = 4 * config.layers * config.heads * config.head_dim  # FLOPs a pair of positions
    kv_bytes = 4 * config.layers * config.kv_heads * config.head_dim  # a position, K and V in bf16
    decode = cell.kind == "decode"
    tokens = cell.streams if decode else cell.context
    pairs = cell.streams * cell.context if decode else cell.context * (cell.context + 1) // 2
    flops = 2 * (tokens * body + cell.streams * head) + attention * pairs
    moved = 2 * (body + head) + kv_bytes * (pairs if decode else cell.context)
    return max(moved / limits.bytes_per_second, flops / limits.flops_per_second)


class Ours:
    """Our runner, its block tables made up: what is in the KV pool changes no timing."""

    def __init__(self, config: ModelConfig, device: torch.device, *, exact: bool, most_streams: int) -> None:
        self.name = "sluice, exact" if exact else "sluice, cuBLAS"
        with torch.inference_mode():
            weights = RandomWeights(wanted_tensors(config), device, DTYPE)
            model = Decoder(config, weights, CudaKernels(DTYPE, device, exact))
        self._each = config.max_positions // BLOCK  # blocks a slot
        self._runner = CudaRunner(
            model,
            Sampler(most_streams, config.vocab_size, device),
            kv_blocks=most_streams * (max(CONTEXTS) + REPEATS * STEPS + 2 * STEPS) // BLOCK + self._each,
            block_size=BLOCK,
            max_sequences=most_streams,
        )
        self._runner.warm_up()
        self._step = 0

    def seconds(self, cell: Cell) -> float:
        return self._decode(cell) if cell.kind == "decode" else self._prefill(cell.context)

    def _decode(self, cell: Cell) -> float:
        """A step of `streams` greedy rows, each launched before the one before it is collected."""
        length = cell.context + (REPEATS + 1) * STEPS + 1
        each = -(-length // BLOCK)
        tables = {slot: tuple(range(slot * each, (slot + 1) * each)) for slot in range(cell.streams)}
        placed = tuple(Placement(slot, Sampling(temperature=0)) for slot in tables)
        first = tuple(
            Row(slot, cell.context, (7,), 0, blocks, samples=True) for slot, blocks in tables.items()
        )
        self._launch(placed, first).collect()
        positions = iter(range(cell.context + 1, length))

        def steps() -> None:
            before = None
            for _ in range(STEPS):
                at = next(positions)
                rows = tuple(Row(slot, at, (PENDING,), each, (), samples=True) for slot in tables)
                current = self._launch((), rows)
                if before is not None:
                    before.collect()
                before = current
            if before is not None:
                before.collect()

        return timed(steps) / STEPS

    def _prefill(self, tokens: int) -> float:
        placed = (Placement(0, Sampling(temperature=0)),)
        prompt = tuple(index % 1000 for index in range(tokens))
        row = Row(0, 0, prompt, 0, tuple(range(-(-tokens // BLOCK))), samples=True)

        def step() -> None:
            self._launch(placed, (row,)).collect()

        return timed(step)

    def _launch(self, placed: tuple[Placement, ...], rows: tuple[Row, ...]) -> InFlight:
        self._step += 1
        return self._runner.launch(Plan(self._step, placed, rows))


class Transformers:
    """The same shape in transformers: eager forward passes over its dynamic cache, SDPA, greedy by argmax."""

    name = "transformers"

    def __init__(self, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {key: value for key, value in CONFIG.items() if key != "architectures"}
        torch.set_default_dtype(DTYPE)
        with device:
            self._model = cast(Any, LlamaForCausalLM(LlamaConfig(**sizes)))
        torch.set_default_dtype(torch.float32)
        self._model.eval()
        self._device = device

    def seconds(self, cell: Cell) -> float:
        return self._decode(cell) if cell.kind == "decode" else self._prefill(cell.context)

    @torch.inference_mode()
    def _decode(self, cell: Cell) -> float:
        prompt = torch.randint(1000, (cell.streams, cell.context), device=self._device)
        out = self._model(prompt, use_cache=True, logits_to_keep=1)
        cache, tokens = out.past_key_values, out.logits.argmax(-1)

        def steps() -> None:
            nonlocal tokens
            for _ in range(STEPS):
                tokens = self._model(tokens, past_key_values=cache, use_cache=True).logits.argmax(-1)

        return timed(steps) / STEPS

    @torch.inference_mode()
    def _prefill(self, tokens: int) -> float:
        prompt = torch.randint(1000, (1, tokens), device=self._device)
        return timed(lambda: self._model(prompt, use_cache=True, logits_to_keep=1))


def cells() -> Iterator[Cell]:
    yield from (Cell("decode", streams, context) for context in CONTEXTS for streams in STREAMS)
    yield from (Cell("prefill", 1, context) for context in PROMPTS)


def measured(cell: Cell, system: str, seconds: float) -> Measured:
    tokens = cell.streams if cell.kind == "decode" else cell.context
    return Measured(cell.kind, cell.streams, cell.context, system, seconds, tokens / seconds)


def run(device: torch.device, *, peers: bool) -> list[Measured]:
    """One system after another, so that each has the card's memory to itself."""
    config, limits = parse_config(dict(CONFIG)), measure_limits(device)
    torch.cuda.empty_cache()
    rows = [measured(cell, "limit", limit_seconds(cell, config, limits)) for cell in cells()]
    makers: list[Callable[[], Ours | Transformers]] = [
        lambda: Ours(config, device, exact=True, most_streams=max(STREAMS)),
        lambda: Ours(config, device, exact=False, most_streams=max(STREAMS)),
        *([lambda: Transformers(device)] if peers else []),
    ]
    for make in makers:
        system = make()
        rows += [measured(cell, system.name, system.seconds(cell)) for cell in cells()]
        del system
        torch.cuda.empty_cache()
    return rows


def table(rows: list[Measured]) -> Table:
    """Tokens a second, and what share of the limit they are."""
    systems = list(dict.fromkeys(row.system for row in rows))
    shown = Table(
        "kind", "streams", "context", *systems, title="tokens/s (share of the limit), 8B shape, bf16"
    )
    for cell in cells():
        found = {row.system: row for row in rows if (row.kind, row.streams, row.context) == _key(cell)}
        limit = found["limit"].tokens_per_second
        speeds = (found[name].tokens_per_second for name in systems)
        shown.add_row(*map(str, _key(cell)), *(f"{speed:,.0f} ({speed / limit:.2f})" for speed in speeds))
    return shown


def _key(cell: Cell) -> tuple[str, int, int]:
    return cell.kind, cell.streams, cell.context


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for gpu.jsonl")
    parser.add_argument("--no-peers", action="store_true", help="ours and the limits alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA device; the CPU's benchmark is bench.decode_prefill")
    rows = run(torch.device("cuda"), peers=not options.no_peers)
    options.out.mkdir(parents=True, exist_ok=True)
    card = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    lines = [card, *map(asdict, rows)]
    (options.out / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Console().print(table(rows))


if __name__ == "__main__":
    main()
