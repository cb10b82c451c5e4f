"""A model's sizes and constants, from a Hugging Face config.json of one of the families.

Covers what the layers need and refuses the rest; what is one family's own stands in its file. Weights are weights.py's,
sampling defaults generation.py's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.model.errors import UnsupportedModel, listed
from engine.model.families import FAMILIES
from engine.model.family import Family, Traits
from engine.model.llama import LLAMA
from engine.model.reading import Fields, read_json_object
from engine.model.rope import Rope, misfits, read_rope


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
    max_positions: int  # that can be served
    norm_eps: float
    tied: bool  # the output head is the embedding
    rope: Rope
    eos_token_ids: tuple[int, ...]  # generation_config.json, where there is one, overrules these
    traits: Traits
    facts: tuple[str, ...] = ()  # sentences worth a log line


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
    family = _family(fields)
    heads = fields.whole("num_attention_heads")
    hidden = fields.whole("hidden_size")
    layers = fields.whole("num_hidden_layers")
    max_positions = fields.whole("max_position_embeddings", family.max_positions)
    rope = read_rope(fields, max_positions, family.original_positions, family.rope_aliases)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=fields.whole("num_key_value_heads", _unsaid(fields, family, heads)),
        head_dim=fields.whole("head_dim", family.head_dim or max(1, hidden // heads)),
        max_positions=rope.context(max_positions),
        norm_eps=fields.number("rms_norm_eps", family.norm_eps, low=0.0, high=1.0),
        tied=fields.flag("tie_word_embeddings", False),
        rope=rope,
        eos_token_ids=fields.token_ids("eos_token_id"),
        traits=family.traits(fields, layers),
        facts=rope.facts(max_positions),
    )


def _family(fields: Fields) -> Family:
    names = fields.raw.get("architectures")
    if isinstance(names, list) and len(names) == 1 and str(names[0]) in FAMILIES:
        return FAMILIES[str(names[0])]
    fields.problems.append(f"architectures is {names}; supported: one of {', '.join(FAMILIES)}")
    return LLAMA


def _unsaid(fields: Fields, family: Family, heads: int) -> int:
    """KV heads where the config has no number: null is one a head, in all families."""
    silent = "num_key_value_heads" not in fields.raw
    return family.kv_heads if silent and family.kv_heads else heads


def _refuse_unsupported(fields: Fields) -> None:
    fields.only("hidden_act", ("silu",), "silu")
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
    return [*problems, *misfits(config.rope, config.head_dim)]
