"""Rotary positions (Su et al., 2021): what a config says of them, and the table that they become.

Six kinds, each computed as transformers does: plain; `linear`; `llama3` and `yarn` (Peng et al., 2023), where every
frequency is slowed by its wavelength; `dynamic` and `longrope`, whose frequencies depend on how long the sequence has
become. With those two the key of an early token would change as later ones come, and no block of KV could be kept: they
are served up to their first context alone, in which they are fixed.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from engine.model.reading import Fields

Kind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]
_HIGHEST_FACTOR = 10_000.0


@dataclass(frozen=True, slots=True)
class Rope:
    """A number that its kind does not ask for has a value that does nothing."""

    theta: float
    kind: Kind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192  # llama3, yarn, longrope; dynamic: max_position_embeddings
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # yarn, longrope: multiplies cosines and sines
    short_factors: tuple[float, ...] = ()  # longrope: one a frequency

    def context(self, max_positions: int) -> int:
        """Positions that can be served, of a config that says max_positions.

        yarn is stretched to `factor` times its first context, whether or not max_position_embeddings was raised.
        """
        if self.kind == "yarn":
            return max(max_positions, int(self.original_max_positions * self.factor))
        return min(max_positions, self.original_max_positions) if self.kind == "longrope" else max_positions

    def facts(self, max_positions: int) -> tuple[str, ...]:
        """Sentences worth a log line."""
        if self.kind not in ("dynamic", "longrope"):
            return ()
        return (
            f"rope_type {self.kind} is served up to its first context of {self.context(max_positions)} positions: "
            "beyond, earlier keys would depend on later tokens",
        )


def read_rope(
    fields: Fields, max_positions: int, original_positions: int | None, aliases: dict[str, Kind]
) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before).

    original_positions: the first context where the config is silent. aliases: a family's other names of kinds.
    """
    table = fields.table("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    theta = (table if table.has("rope_theta") else fields).number("rope_theta", 10000.0, low=1.0)
    key = "rope_type" if table.has("rope_type") else "type"
    for place in (table, fields):
        place.only("partial_rotary_factor", (1, 1.0), 1)
    kind = _kinds(aliases).get(str(table.raw.get(key)))
    if kind is None:
        table.only(key, get_args(Kind), "default")
        return Rope(theta)
    return _read_kind(kind, theta, table, fields, max_positions, original_positions)


def _kinds(aliases: dict[str, Kind]) -> dict[str, Kind]:
    """What a config may call them."""
    own: tuple[Kind, ...] = get_args(Kind)
    return {kind: kind for kind in own} | aliases


def _read_kind(
    kind: Kind,
    theta: float,
    table: Fields,
    fields: Fields,
    max_positions: int,
    original_positions: int | None,
) -> Rope:
    if kind == "default":
        return Rope(theta)
    if kind in ("linear", "dynamic"):
        factor = table.number("factor", low=1.0, high=_HIGHEST_FACTOR)
        return Rope(theta, kind, factor, original_max_positions=max_positions)
    outside = fields if original_positions or fields.has("original_max_position_embeddings") else table
    original = outside.whole("original_max_position_embeddings", original_positions or max_positions, least=2)
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            table.number("factor", low=1.0),
            low_freq_factor=table.number("low_freq_factor", low=1e-6),
            high_freq_factor=table.number("high_freq_factor", low=1e-6),
            original_max_positions=original,
        )
    factor = table.number("factor", max(1.0, max_positions / original), low=1.0, high=_HIGHEST_FACTOR)
    return (
        _yarn(theta, factor, original, table) if kind == "yarn" else _longrope(theta, factor, original, table)
    )


def _yarn(theta: float, factor: float, original: int, table: Fields) -> Rope:
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=table.number("beta_fast", 32.0, low=0.0) or 32.0,
        beta_slow=table.number("beta_slow", 1.0, low=0.0) or 1.0,
        truncate=table.flag("truncate", True),
        attention_factor=table.number("attention_factor", _yarn_attention(factor, table), low=0.0),
    )


def _yarn_attention(factor: float, table: Fields) -> float:
    """The paper's temperature of attention, or what `mscale` and `mscale_all_dim` make of it (DeepSeek)."""

    def scaled(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    over, under = table.number("mscale", 0.0, low=0.0), table.number("mscale_all_dim", 0.0, low=0.0)
    return scaled(over) / scaled(under) if over and under else scaled(1)


def _longrope(theta: float, factor: float, original: int, table: Fields) -> Rope:
    usual = math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        theta,
        "longrope",
        factor,
        original_max_positions=original,
        attention_factor=table.number("attention_factor", usual, low=0.0),
        short_factors=table.numbers("short_factor", low=1e-6),
    )


def misfits(rope: Rope, head_dim: int) -> list[str]:
    """Numbers that are fine alone and impossible together."""
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        return ["rope low_freq_factor is not below high_freq_factor"]
    if rope.kind == "yarn" and rope.theta == 1.0:
        return ["rope_theta is 1; supported with yarn: above 1"]
    if rope.kind == "dynamic" and head_dim <= 2:
        return [f"head_dim is {head_dim}; supported with dynamic RoPE: above 2"]
    if rope.kind == "longrope" and len(rope.short_factors) != head_dim // 2:
        return [f"rope short_factor has {len(rope.short_factors)} numbers; supported: head_dim / 2"]
    return []


def rope_table(rope: Rope, head_dim: int, positions: int) -> Tensor:
    """Cosines and sines, fp32 [positions, 2, head_dim // 2]; computed as transformers does, to the bit."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), _frequencies(rope, head_dim))
    return torch.stack((angles.cos(), angles.sin()), dim=1) * rope.attention_factor


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians a position, fp32 [head_dim // 2]."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factors, dtype=torch.float32) * rope.theta**powers)
    if rope.kind == "yarn":
        return _blended(rope.theta**powers, rope, head_dim)
    theta = rope.theta
    if rope.kind == "dynamic":
        first = rope.original_max_positions
        grown = rope.factor * first / first - (rope.factor - 1)  # 1, but for rounding
        theta *= grown ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / (theta**powers)
    if rope.kind == "linear":
        return frequencies / rope.factor
    return _stretched(frequencies, rope) if rope.kind == "llama3" else frequencies


def _stretched(frequencies: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: waves as long as the first context are slowed by `factor`, short ones kept, others mixed."""
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / rope.factor
    share = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (1 - share) * slowed + share * frequencies
    return torch.where(share > 1, frequencies, torch.where(share < 0, slowed, mixed))


def _blended(wavelengths: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """YaRN: those that turn beta_fast times in the first context are kept, beta_slow times slowed; a ramp between."""
    low, high = _turning(rope.beta_fast, rope, head_dim), _turning(rope.beta_slow, rope, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _turning(turns: float, rope: Rope, head_dim: int) -> float:
    """The dimension whose wave turns so often within the first context."""
    return (head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi))) / (
        2 * math.log(rope.theta)
    )
