"""What sets one family of models apart from another, as data: all of them are one decoder (decoder.py).

A family is a file of its own: its `Family`, listed in families.py. To add one: say what transformers takes for fields
that its config.json leaves out, and which traits a config asks for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.model.reading import Fields
from engine.model.rope import Kind


@dataclass(frozen=True, slots=True)
class Traits:
    """What a decoder may have beyond the plainest. All of it decides bytes of KV."""

    qkv_bias: bool = False
    out_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    head_norm: bool = False  # q and k of every head are RMS-normed before they are rotated
    fused: bool = False  # a checkpoint holds q, k and v as one tensor, gate and up as another
    windows: tuple[int, ...] = ()  # by layer: how many positions a token sees, itself included (0: all);
    # empty: every layer sees all


@dataclass(frozen=True, slots=True)
class Family:
    """`traits` reads a config of so many layers, and adds to the fields' problems what cannot be served."""

    architecture: str
    traits: Callable[[Fields, int], Traits]
    max_positions: int  # these are taken where config.json is silent, as transformers does
    kv_heads: int | None = None  # None: one a head
    head_dim: int | None = None  # None: hidden_size / heads
    norm_eps: float = 1e-6
    original_positions: int | None = None  # of stretched RoPE; None: max_positions
    rope_aliases: dict[str, Kind] = field(default_factory=dict)  # its own names of kinds of RoPE


def window(fields: Fields, default: int) -> int:
    """The config's `sliding_window`: null is none (0), and what is not there is `default`."""
    nulled = "sliding_window" in fields.raw and not fields.has("sliding_window")
    return 0 if nulled else fields.whole("sliding_window", default, least=min(1, default))


def all_or_nothing(positions: int, layers: int) -> tuple[int, ...]:
    """The same window in every layer."""
    return (positions,) * layers if positions else ()


def windows_by_type(fields: Fields, positions: int, layers: int, first: int) -> tuple[int, ...]:
    """Windows where `layer_types` says "sliding_attention"; without it, in the layers from `first` on."""
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        return _any(tuple(positions if index >= first else 0 for index in range(layers)))
    known = {"full_attention": 0, "sliding_attention": positions}
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not all(kind in known for kind in map(str, kinds))
    ):
        fields.refuse("layer_types", f"{' or '.join(known)} for each of {layers} layers")
        return ()
    if not positions and "sliding_attention" in kinds:
        fields.refuse("layer_types", "sliding_attention only with a sliding_window in use")
    return _any(tuple(known[kind] for kind in kinds))


def _any(windows: tuple[int, ...]) -> tuple[int, ...]:
    return windows if any(windows) else ()
