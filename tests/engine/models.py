"""Small random models of every kind the family has, and a driver that keeps all logits a runner computes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import app
from engine.kernels.protocol import Kernels
from engine.kernels.select import make_kernels, reference_kernels
from engine.model.loading import Loaded, load_model
from engine.model.random_weights import llama_config, write_random_llama
from engine.plan import PENDING, Placement, Plan, Row, Sampling
from engine.runner import ModelRunner
from engine.sampler import Sampler

CPU = torch.device("cpu")
SHIPPED = Path(app.__file__).parent / "shipped" / "tales"
BLOCK = 16

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"type": "linear", "factor": 2.5}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [2 + 0.5 * i for i in range(8)],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.3}


def family(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **more}


def qwen2(**more: Any) -> dict[str, Any]:
    return family("qwen2", "Qwen2ForCausalLM", **more)


def qwen3(**more: Any) -> dict[str, Any]:
    return family("qwen3", "Qwen3ForCausalLM", **{"head_dim": 32, **more})


def mistral(**more: Any) -> dict[str, Any]:
    return family("mistral", "MistralForCausalLM", **more)


def phi3(**more: Any) -> dict[str, Any]:
    """No padding token: its own would be beyond a small vocabulary."""
    return family("phi3", "Phi3ForCausalLM", pad_token_id=None, original_max_position_embeddings=256, **more)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": qwen2(),
    "qwen2_tied": qwen2(tie_word_embeddings=True, sliding_window=32),  # a window that is not used
    "qwen2_yarn": qwen2(rope_scaling=YARN, rope_theta=1000000.0, max_position_embeddings=64),
    "qwen2_window": qwen2(use_sliding_window=True, sliding_window=40, max_window_layers=1),
    "qwen3": qwen3(),
    "qwen3_biased": qwen3(attention_bias=True, tie_word_embeddings=True, head_dim=16),
    "mistral": mistral(sliding_window=None),
    "mistral_window": mistral(sliding_window=29, head_dim=32),
    "phi3": phi3(),
    "phi3_long": phi3(max_position_embeddings=512, rope_scaling=LONGROPE, sliding_window=100),
}
"""Families beside Llama, the bits of each of which are compared along all ways."""

SHAPES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "rope_parameters": {"rope_theta": None, "rope_parameters": {"rope_theta": 20000.0, **LLAMA3_ROPE}},
    "wide_heads": {"head_dim": 32},
    "odd_sizes": {
        "hidden_size": 96,
        "intermediate_size": 176,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 389,
    },
    "biased": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": LINEAR},
    "dynamic": {"rope_scaling": DYNAMIC},
    "yarn": {"rope_parameters": {"rope_theta": 30000.0, **YARN, "beta_fast": 8, "truncate": False}},
    "yarn_mscale": {"rope_scaling": YARN | {"mscale": 0.9, "mscale_all_dim": 0.4, "beta_slow": 2.0}},
}

KERNELS: dict[str, Callable[[torch.device, torch.dtype], Kernels]] = {
    "reference": reference_kernels,
    "cpu": make_kernels,
}


def write_shape(name: str, path: Path, **more: Any) -> Path:
    """Writes the random model of that shape into `path`; `more` goes to write_random_llama."""
    return write_random_llama(path, llama_config(**SHAPES[name]), seed=len(name), **more)


def load(directory: Path, kernels: str, dtype: str) -> Loaded:
    return load_model(directory, device=CPU, dtype=dtype, kernels=KERNELS[kernels])


def runner_for(loaded: Loaded, *, kv_blocks: int = 256, max_sequences: int = 64) -> ModelRunner:
    """A runner with the real sampler."""
    sampler = Sampler(max_sequences, loaded.config.vocab_size, CPU)
    return ModelRunner(
        loaded.model, sampler, kv_blocks=kv_blocks, block_size=BLOCK, max_sequences=max_sequences
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """The next tokens of one slot."""

    slot: int
    tokens: Sequence[int]


@dataclass
class Driver:
    """Feeds pieces of sequences to a runner and keeps the logits of every position, by slot.

    Blocks are handed out from `free`, last first, so that a shuffled list scatters a sequence over the pool.
    """

    runner: ModelRunner
    free: list[int]
    logits: dict[int, list[Tensor]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def step(self, pieces: Iterable[Piece]) -> None:
        """One step over all pieces, in their order."""
        rows = [self._row(piece) for piece in pieces]
        found = self.runner.logits(rows)
        for row, part in zip(rows, torch.split(found, [len(row.tokens) for row in rows]), strict=True):
            self.logits[row.slot].extend(part.unbind())

    def run(self, slot: int, tokens: Sequence[int], chunk: int) -> None:
        """A sequence alone, `chunk` tokens a step."""
        for start in range(0, len(tokens), chunk):
            self.step([Piece(slot, tokens[start : start + chunk])])

    def all_logits(self, slot: int) -> Tensor:
        """[positions so far, vocabulary]."""
        return torch.stack(self.logits[slot])

    def _row(self, piece: Piece) -> Row:
        if piece.slot not in self.logits:
            self.runner.tables.place(Placement(piece.slot, Sampling()))
            self.logits[piece.slot], self.held[piece.slot] = [], 0
        start, held = len(self.logits[piece.slot]), self.held[piece.slot]
        missing = -(-(start + len(piece.tokens)) // BLOCK) - held
        blocks = tuple(self.free.pop() for _ in range(missing))
        self.held[piece.slot] += missing
        return Row(piece.slot, start, tuple(piece.tokens), held, blocks, samples=True)


def driver_for(loaded: Loaded, *, shuffle: int | None = None, kv_blocks: int = 512) -> Driver:
    """A driver of a fresh pool; `shuffle` seeds the order in which blocks are handed out."""
    order = list(reversed(range(kv_blocks)))
    if shuffle is not None:
        order = torch.randperm(kv_blocks, generator=torch.Generator().manual_seed(shuffle)).tolist()
    return Driver(runner_for(loaded, kv_blocks=kv_blocks), order)


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """`count` ids below `vocabulary`."""
    ids: list[int] = torch.randint(
        vocabulary, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return ids


def greedy(loaded: Loaded, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens drawn at temperature 0, through the runner's whole path."""
    runner = runner_for(loaded, kv_blocks=-(-(len(prompt) + count) // BLOCK), max_sequences=2)
    blocks = tuple(range(-(-(len(prompt) + count) // BLOCK)))
    first = Row(1, 0, tuple(prompt), 0, blocks, samples=True)
    drawn = [*runner.launch(Plan(0, (Placement(1, Sampling(temperature=0)),), (first,))).collect().tokens]
    for step in range(1, count):
        row = Row(1, len(prompt) + step - 1, (PENDING,), len(blocks), (), samples=True)
        drawn += runner.launch(Plan(step, (), (row,))).collect().tokens
    return drawn
