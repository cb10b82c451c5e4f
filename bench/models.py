"""The models that are measured: by name, or any directory in Hugging Face layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.model.config import ModelConfig, read_config
from engine.model.random_weights import llama_config, write_random_llama

SHIPPED = Path(__file__).parents[1] / "app" / "shipped" / "tales"

RANDOM_100M = llama_config(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=2304,
    tie_word_embeddings=True,
)
"""100.1 million parameters, of which 24.6 are the embedding, which is the output head too."""


@dataclass(frozen=True, slots=True)
class BenchModel:
    name: str
    directory: Path
    config: ModelConfig


def find(name: str, cache: Path) -> BenchModel:
    """`shipped`, `random100m` (written into `cache` the first time), or a directory."""
    known = {"shipped": lambda: SHIPPED, "random100m": lambda: written(cache / "random100m", RANDOM_100M)}
    directory = known[name]() if name in known else Path(name).resolve()
    return BenchModel(name if name in known else directory.name, directory, read_config(directory))


def written(directory: Path, config: dict[str, Any]) -> Path:
    """A random model of these sizes, in bfloat16."""
    if (directory / "config.json").exists():
        return directory.resolve()
    half = directory.with_name(f"{directory.name}.part")
    write_random_llama(half, config, dtype=torch.bfloat16)
    half.rename(directory)
    return directory.resolve()
