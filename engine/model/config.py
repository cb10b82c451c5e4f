"""A model's sizes and constants, from a Hugging Face config.json of the Llama architecture.

Covers what the layers need and refuses the rest. Weights are weights.py's, sampling defaults generation.py's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.model.errors import UnsupportedModel, listed
from engine.model.reading import Fields, read_json_object

ARCHITECTURES = ("LlamaForCausalLM",)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. The last four numbers count for `llama3` only (Llama 3.1's stretched long waves)."""

    theta: float
    kind: Literal["default", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    tied: bool  # the output head is the embedding
    attention_bias: bool  # q, k, v and o have a bias
    mlp_bias: bool
    rope: Rope
    eos_token_ids: tuple[int, ...]  # generation_config.json, where there is one, overrules these


def read_config(directory: Path) -> ModelConfig:
    """Parses `directory`/config.json; UnsupportedModel lists everything that Sluice cannot serve."""
    path = directory / "config.json"
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], origin: str = "config.json") -> ModelConfig:
    """A config.json as a dict -> ModelConfig; `origin` names it in errors."""
    fields = Fields(raw, [])
    config = _read(fields)
    if not fields.problems:
        fields.problems.extend(_misfits(config))
    _refuse_unsupported(fields)
    if fields.problems:
        raise UnsupportedModel(listed(f"{origin} asks for what Sluice does not support", fields.problems))
    return config


def _read(fields: Fields) -> ModelConfig:
    heads = fields.whole("num_attention_heads")
    hidden = fields.whole("hidden_size")
    max_positions = fields.whole("max_position_embeddings", 2048)
    return ModelConfig(
        architecture=_architecture(fields),
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        layers=fields.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=fields.whole("head_dim", max(1, hidden // heads)),
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        tied=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        rope=_rope(fields, max_positions),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _architecture(fields: Fields) -> str:
    names = fields.raw.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES:
        return str(names[0])
    fields.problems.append(f"architectures is {names}; supported: one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[0]


def _rope(fields: Fields, max_positions: int) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before)."""
    table = fields.table("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    theta = (table if table.has("rope_theta") else fields).number("rope_theta", 10000.0, low=1.0)
    key = "rope_type" if table.has("rope_type") else "type"
    table.only(key, ("default", "llama3"), "default")
    table.only("partial_rotary_factor", (1, 1.0), 1)
    if table.raw.get(key) != "llama3":
        return Rope(theta)
    return Rope(
        theta,
        "llama3",
        factor=table.number("factor", low=1.0),
        low_freq_factor=table.number("low_freq_factor", low=1e-6),
        high_freq_factor=table.number("high_freq_factor", low=1e-6),
        original_max_positions=table.whole("original_max_position_embeddings", max_positions),
    )


def _refuse_unsupported(fields: Fields) -> None:
    fields.only("hidden_act", ("silu",), "silu")
    if fields.has("sliding_window"):
        fields.problems.append("sliding_window is set; supported: attention over the whole context")
    if fields.has("quantization_config"):
        fields.problems.append("quantization_config is set; supported: float32, bfloat16, float16 weights")


def _misfits(config: ModelConfig) -> list[str]:
    """Numbers that are fine alone and impossible together."""
    problems = []
    if config.heads % config.kv_heads:
        problems.append(
            f"num_attention_heads ({config.heads}) is no multiple of num_key_value_heads ({config.kv_heads})"
        )
    if config.head_dim % 2:
        problems.append(f"head_dim is {config.head_dim}; supported: even numbers (positions turn pairs)")
    rope = config.rope
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        problems.append("rope low_freq_factor is not below high_freq_factor")
    return problems
